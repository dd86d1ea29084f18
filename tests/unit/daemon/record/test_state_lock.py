"""Whose the state is, among real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from refault.daemon.host.errors import OperatorError
from refault.daemon.record import state_lock
from refault.daemon.record.state_lock import StateLock

HOLDER = """
import sys, trio
from pathlib import Path
from refault.daemon.record.state_lock import StateLock
lock = StateLock(Path(sys.argv[1]), "vm1")
trio.run(lock.claim)
print("held" if lock.held else "not held", flush=True)
sys.stdin.read()
lock.release()
"""


@contextmanager
def holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


async def test_one_of_a_name_alone_and_its_pid_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_lock, "CLAIM_PATIENCE", 0.1)
    lock, other = StateLock(tmp_path, "vm1"), StateLock(tmp_path, "vm2")
    with holder(tmp_path) as process:
        with pytest.raises(
            OperatorError, match=rf"\(pid {process.pid}\) keeps the state of a VM of the name"
        ):
            await lock.claim()
        assert not lock.held
        await other.claim()
        assert other.held
        other.release()
    assert sorted(os.listdir(tmp_path)) == ["vm1.lock"]  # it was killed


@pytest.mark.parametrize("end", ["killed", "ended"])
async def test_the_end_of_its_holder_frees_it(tmp_path: Path, end: str) -> None:
    lock = StateLock(tmp_path, "vm1")
    with holder(tmp_path) as process:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lock.claim)
            await trio.sleep(0.1)
            assert not lock.held
            if end == "killed":
                process.send_signal(signal.SIGKILL)
            else:
                assert process.stdin is not None
                process.stdin.close()
        assert lock.held
    lock.release()
    assert os.listdir(tmp_path) == []


async def test_a_directory_that_is_not_usable_keeps_nobody_out(tmp_path: Path) -> None:
    lock = StateLock(tmp_path / "none", "vm1")
    await lock.claim()
    assert not lock.held
    with pytest.raises(OperatorError, match=r"cannot keep state in .*/none: No such file"):
        await lock.keep()
    (tmp_path / "none").mkdir()
    async with trio.open_nursery() as nursery:
        await nursery.start(lock.keep)
        assert lock.held
        nursery.cancel_scope.cancel()
    lock.release()
    (tmp_path / "file").touch()
    with pytest.raises(OperatorError, match=r"cannot keep state in .*/file: Not a directory"):
        await StateLock(tmp_path / "file", "vm1").keep()


async def test_a_lock_whose_file_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_lock, "_SETTLES", 0.01)
    lock, next_one = StateLock(tmp_path, "vm1"), StateLock(tmp_path, "vm1")
    await lock.claim()
    (tmp_path / "vm1.lock").unlink()
    await next_one.claim()
    assert next_one.held
    with pytest.raises(OperatorError, match="was removed or replaced"), trio.fail_after(9):
        await lock.keep()
    assert not lock.held
    with pytest.raises(OperatorError, match="another refault"):
        await lock.keep()
    next_one.release()


async def test_a_file_that_is_not_ours_is_followed_nowhere(tmp_path: Path) -> None:
    (tmp_path / "vm1.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OperatorError, match=r"vm1\.lock: .*; remove that file"):
        await StateLock(tmp_path, "vm1").keep()
    assert not (tmp_path / "precious").exists()
