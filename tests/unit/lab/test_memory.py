"""Reading a process's memory from outside."""

from __future__ import annotations

import errno
import os

import pytest

from refault.lab.memory import ProcessMemory


def test_a_page_that_is_discarded_between_two_looks_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def pread(fd: int, length: int, _: int) -> bytes:
        looks.append(fd)
        if len(looks) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return b"\xff" * length  # the page map: present

    monkeypatch.setattr(os, "pread", pread)
    assert ProcessMemory(os.getpid(), 0).read(0, 8) is None
    assert len(looks) == 2
