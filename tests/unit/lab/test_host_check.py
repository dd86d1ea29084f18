from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from refault.lab import host_check
from refault.lab.host_check import check_host


def program(directory: Path, says: str) -> str:
    path = directory / "qemu"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_qemu_is_missing_and_says_what_to_install() -> None:
    findings, version = check_host("no-such-qemu")
    assert version is None
    assert findings[0].grade == "missing"
    assert "apt install qemu-system-x86" in findings[0].text


def test_something_else_than_qemu_is_not_taken_for_it(tmp_path: Path) -> None:
    findings, version = check_host(program(tmp_path, "hello"))
    assert (findings[0].grade, version) == ("missing", None)
    assert "hello" in findings[0].text


def test_a_qemu_without_recovery_is_refused(tmp_path: Path) -> None:
    findings, version = check_host(program(tmp_path, "QEMU emulator version 2.11.1"))
    assert (findings[0].grade, version) == ("missing", None)


@pytest.mark.parametrize(
    ("says", "number", "handshake"), [("7.2.22 (Debian)", (7, 2, 22), True), ("10.0.2", (10, 0, 2), False)]
)
def test_what_is_dangerous_goes_by_version(
    tmp_path: Path, says: str, number: tuple[int, int, int], handshake: bool
) -> None:
    findings, version = check_host(program(tmp_path, f"QEMU emulator version {says}"))
    assert version == number
    dangers = [each.text for each in findings if each.grade == "danger"]
    assert any("handshake" in text for text in dangers) == handshake
    assert any("on both hosts" in text for text in dangers) == (not handshake)


def test_userfaultfd_not_permitted_says_how_to_permit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidding:
        def syscall(self, *_: object) -> int:
            ctypes.set_errno(1)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Forbidding())
    monkeypatch.setattr(host_check, "_DEVICE", Path("/nonexistent"))
    finding = host_check._userfaultfd((7, 2, 0))
    assert finding.grade == "missing"
    assert "vm.unprivileged_userfaultfd=1" in finding.text
