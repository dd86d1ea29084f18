"""`refault events` beside a real migration: each line as it happens, over a kill of the daemon."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from tests.integration.test_main_job import REFAULT, begin_postcopy, fronted

from refault.lab.channel import Loss

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

WITHIN = 40.0
AWAY = "source.control"
"""Where it was asked for."""


class Follower:
    """One whose output is read through a pipe."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._held = b""

    async def line(self) -> dict[str, object]:
        assert self.process.stdout is not None
        with trio.fail_after(WITHIN):
            while b"\n" not in self._held:
                data = await self.process.stdout.receive_some()
                assert data, "it has ended"
                self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return dict(json.loads(line))

    async def loss(self) -> str:
        """The next one, which is recovered; its id."""
        lost, over = await self.line(), await self.line()
        assert (lost["event"], over["event"]) == ("lost", "recovered")
        assert lost["recovery_id"] == over["recovery_id"]
        return str(lost["recovery_id"])

    async def ended(self) -> tuple[int, list[str]]:
        """Its exit status, and what it said beside that its daemon was away."""
        assert self.process.stderr is not None
        with trio.fail_after(WITHIN):
            said = b"".join([data async for data in self.process.stderr]).decode().splitlines()
            return await self.process.wait(), [line for line in said if AWAY not in line]


@asynccontextmanager
async def following(control: Path) -> AsyncIterator[Follower]:
    command = [*REFAULT, "events", "--control", str(control)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Who is started in the background of a shell, as a CI may be, has its children ignore SIGINT.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(trio.run_process, command, check=False, preexec_fn=heeds, **pipes)
        )
        yield Follower(process)
        nursery.cancel_scope.cancel()


async def test_losses_are_followed_over_a_kill_of_the_daemon(tmp_path: Path) -> None:
    """Until who follows is told to end, or nobody reads what he has to say."""
    async with fronted(tmp_path) as (pair, channel, driver):
        control = driver.controls[0]
        async with following(control) as follower, following(control) as unread:
            await begin_postcopy(pair, channel, driver)
            await channel.lose(Loss.RESET)
            first = await follower.loss()
            assert await unread.loss() == first
            assert unread.process.stdout is not None
            await unread.process.stdout.aclose()
            driver.processes[0].kill()
            driver.start_again(0)
            assert await follower.loss() != first
            assert await unread.ended() == (1, [])
            follower.process.send_signal(signal.SIGINT)
            assert await follower.ended() == (130, [])
