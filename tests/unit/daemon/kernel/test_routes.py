"""A change of a link is heard of, in the network namespace where it happens."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio

from refault.daemon.kernel.routes import LONGEST_PAUSE, PAUSE, Pauses
from refault.lab.netns import two_hosts
from refault.lab.process import Process, started

LISTENS = """
import trio
from refault.daemon.kernel import routes
def changed():
    print("changed", flush=True)
    return True
async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(routes.watch, changed)
        await trio.testing.wait_all_tasks_blocked()
        print("listens", flush=True)
import trio.testing
trio.run(main)
"""


async def told(process: Process, text: str) -> None:
    with trio.fail_after(20):
        while text not in process.tail():
            await trio.sleep(0.01)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces")
async def test_a_link_that_comes_up_is_heard_of(tmp_path: Path) -> None:
    with two_hosts() as (here, there):
        there.link("down")
        command = [*here.prefix, sys.executable, "-c", LISTENS]
        with started("listener", command, tmp_path / "output") as listener:
            await told(listener, "listens")
            assert "changed" not in listener.tail()
            there.link("up")
            await told(listener, "changed")


def test_where_something_changes_all_the_time_it_is_made_use_of_less_and_less() -> None:
    pauses, now, used = Pauses(), 0.0, 0
    while now < 60:
        now += pauses.after(now) + 0.01
        used += 1
    # 1, 2 and 4 seconds, then 8: with eight tries for each, about one try in a second.
    assert used <= 3 + 60 / LONGEST_PAUSE


def test_after_a_quiet_time_the_next_change_is_one_like_the_first() -> None:
    pauses = Pauses()
    assert [pauses.after(now) for now in (0, 1, 3)] == [PAUSE, 2, 4]
    assert pauses.after(3 + LONGEST_PAUSE * 1.25 + 0.01) == PAUSE
