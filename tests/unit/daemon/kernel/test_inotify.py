"""Files that come and go, as the kernel tells of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from refault.daemon.kernel import inotify
from refault.daemon.kernel.inotify import Changes, path_and_entries_watched, watched


async def is_told(changes: Changes) -> None:
    with trio.fail_after(9):
        await changes.wait()


async def is_not_told(changes: Changes) -> None:
    """Not of anything that has happened so far: what happens afterwards is told after it."""
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert not changes._happened.is_set()


def _replace(path: Path) -> None:
    path.with_name("other").touch()
    path.with_name("other").rename(path)


@pytest.mark.parametrize(
    "change",
    [
        Path.unlink,
        _replace,
        lambda path: path.rename(path.with_name("away")),
        lambda path: path.parent.rename(path.parent.with_name("b2")),
        lambda path: path.parent.parent.rename(path.parent.parent.with_name("a2")),
    ],
)
async def test_what_goes_or_is_replaced_is_told(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "a" / "b" / "c"
    path.parent.mkdir(parents=True)
    path.touch()
    with watched(str(path)) as changes:
        path.with_name("neighbour").touch()
        (tmp_path / "a" / "neighbour").touch()
        await is_not_told(changes)
        change(path)
        await is_told(changes)
        await is_not_told(changes)


async def test_what_comes_is_told_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with watched(str(path)) as changes:
        path.parent.mkdir()
        await is_told(changes)
    with watched(str(path)) as changes:
        path.touch()
        await is_told(changes)


async def test_a_directory_that_is_removed_is_told_and_another_of_its_name_is_heard_of(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a" / "b"
    for _ in range(2):
        path.parent.mkdir()
        with watched(str(path)) as changes:
            path.parent.rmdir()
            await is_told(changes)


async def test_those_who_share_a_directory_hear_each_of_his_own(tmp_path: Path) -> None:
    with watched(str(tmp_path / "b")) as b:
        with (
            watched(str(tmp_path / "a")) as a,
            path_and_entries_watched(str(tmp_path / "c"), [str(tmp_path)]) as both,
        ):
            (tmp_path / "a").touch()
            await is_told(a)
            await is_told(both)
            await is_not_told(b)
        (tmp_path / "b").touch()
        await is_told(b)


async def test_all_are_told_where_events_were_lost(tmp_path: Path) -> None:
    with watched(str(tmp_path / "a")) as changes:
        hub = inotify._of_this_loop()
        hub._take(inotify._EVENT.pack(-1, inotify._OVERFLOW, 0, 0))
        await is_told(changes)


async def test_where_the_kernel_cannot_tell_it_is_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    def none_left(*_: object) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(inotify._Hub, "add", none_left)
    with watched(str(tmp_path / "a")) as changes:
        await changes.wait()
    assert trio.current_time() == pytest.approx(inotify.BLIND_LOOK)


async def test_nothing_is_left_of_a_watch(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    directories = [str(tmp_path), str(tmp_path / "none")]
    with watched(str(tmp_path / "a" / "b")), path_and_entries_watched(str(tmp_path), directories):
        hub = inotify._of_this_loop()
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert hub._watches == {}
    assert len(os.listdir("/proc/self/fd")) == before
    for _ in range(3):  # as soon as it has begun: the same number again
        with watched(str(tmp_path / "a")) as changes:
            pass
    with watched(str(tmp_path / "a")) as changes:
        (tmp_path / "a").touch()
        await is_told(changes)
