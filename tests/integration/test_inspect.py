"""`refault inspect` on streams that real QEMUs saved."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio

from refault.cli.main import main
from refault.lab import bare
from refault.lab.guest import Guest
from refault.lab.qemu import DEFAULT_BINARY, start_qemu

from .qemus import BINARIES

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

ROUNDS = 6  # XBZRLE has something to compare with from the third on
GUEST = Guest(vcpus=1, log_pages=10, tick_ns=1_000_000)


def to(file: Path) -> str:
    """An address of a file that is there when it is whole, which is later than QEMU has completed."""
    return f"exec:cat >{file}.part && mv {file}.part {file}"


async def saved(directory: Path, binary: str, *capabilities: str, extra: tuple[str, ...] = ()) -> Path:
    file = directory / "stream"
    async with start_qemu(GUEST, directory, binary=binary, extra=extra) as qemu:
        await qemu.wait_guest()
        await bare.set_capabilities(qemu.qmp, *capabilities)
        await qemu.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 34})
        await qemu.qmp.execute("stop")
        await qemu.qmp.execute("migrate", {"uri": to(file)})
        with trio.fail_after(20):
            await bare.wait_status(qemu.qmp, "completed")
            while not file.exists():
                await trio.sleep(0.01)
    return file


@pytest.mark.parametrize("binary", BINARIES)
async def test_a_saved_precopy_stream(
    tmp_path: Path, binary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = await saved(tmp_path, binary)
    assert main(["inspect", str(file)]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"stream: {file.stat().st_size} bytes, version 3\nmachine: pc-i440fx", told)
    row = re.search(r"pc\.ram +(\d+) +host's +(\d+) +(\d+) +0 +0 +0\n", told)
    assert row is not None
    length, whole, zero = (int(number) for number in row.groups())
    assert length == GUEST.ram_bytes
    assert whole + zero >= length // 4096
    assert whole * 4096 > GUEST.written_bytes
    assert re.search(r"ram +\d+ +1 +\d+ +1 +0 +\d+\n", told)
    assert re.search(r"cannot be read from byte \d+ on: device state, .*\(section timer\)\n$", told)


@pytest.mark.parametrize(
    ("binary", "capability", "column"),
    [*((binary, "xbzrle", 2) for binary in BINARIES), (DEFAULT_BINARY, "compress", 3)],
)
async def test_every_page_is_counted_by_its_kind(
    tmp_path: Path, binary: str, capability: str, column: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guest that keeps writing, in several rounds, against QEMU's own count of what it sent."""
    file = tmp_path / "stream"
    busy = Guest(vcpus=2, log_pages=10, tick_ns=300_000)
    async with start_qemu(busy, tmp_path, binary=binary) as qemu:
        await qemu.wait_guest()
        await bare.set_capabilities(qemu.qmp, capability)
        await qemu.qmp.execute("migrate-set-parameters", {"max-bandwidth": 30 << 20, "downtime-limit": 1})
        await qemu.qmp.execute("migrate", {"uri": to(file)})
        with trio.fail_after(20):
            while (answer := await bare.wait_status(qemu.qmp, "active", "completed"))["status"] == "active":
                if answer["ram"]["dirty-sync-count"] >= ROUNDS:
                    break
                await trio.sleep(0.05)
        await qemu.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 34, "downtime-limit": 2000})
        with trio.fail_after(20):
            sent = (await bare.wait_status(qemu.qmp, "completed"))["ram"]
            while not file.exists():
                await trio.sleep(0.01)
    assert main(["inspect", str(file)]) == 0
    told = capsys.readouterr().out
    rows = re.findall(r"\S+ +\d+ +host's +(\d+) +(\d+) +(\d+) +(\d+) +0\n", told)
    whole, zero, *packed = (sum(int(row[i]) for row in rows) for i in range(4))
    assert packed[column - 2] > 0
    assert whole + zero + sum(packed) >= busy.ram_bytes // 4096
    if capability == "xbzrle":
        assert (whole, zero) == (sent["normal"], sent["duplicate"])
    assert re.search(r"on: device state, .*\(section timer\)\n$", told)


@pytest.mark.parametrize("binary", BINARIES)
async def test_shared_memory_that_is_left_out(
    tmp_path: Path, binary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = f"memory-backend-memfd,id=ram0,size={GUEST.ram_bytes >> 10}K,share=on"
    extra = ("-object", memory, "-machine", "memory-backend=ram0")
    file = await saved(tmp_path, binary, "x-ignore-shared", extra=extra)
    assert main(["inspect", str(file)]) == 0
    told = capsys.readouterr().out
    assert "capabilities: x-ignore-shared\n" in told
    assert re.search(rf"ram0 +{GUEST.ram_bytes} +host's +\d+ +\d+ +0 +0 +0\n", told)
    assert "cannot be read" in told


def test_what_is_no_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello, this is no migration stream")
    (tmp_path / "empty").touch()
    assert main(["inspect", str(tmp_path / "text")]) == 0
    assert "it does not begin as a QEMU migration stream" in capsys.readouterr().out
    for name in ("empty", "none"):
        assert main(["inspect", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
