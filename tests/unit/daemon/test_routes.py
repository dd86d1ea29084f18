"""A change of a link is heard of, in the network namespace where it happens."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio

from refault.lab.netns import two_hosts
from refault.lab.process import Process, started

LISTENS = """
import trio
from refault.daemon import routes
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
