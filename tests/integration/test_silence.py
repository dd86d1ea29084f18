"""Two hosts and a network that goes silent: noticed in postcopy, waited out in precopy, and never guessed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio
from tests.campaign.hosts import Setting, on_two_hosts
from tests.integration.qemus import OTHERS_NIGHTLY

from refault.channel.relay import DEAD_AFTER_SECONDS
from refault.daemon.far.dialled import DIAL_TIMEOUT
from refault.lab.channel import free_port

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]


BUSY = 30
"""Seconds more that a busy machine may take: TCP alone would take a quarter of an hour."""


async def test_a_silent_network_is_noticed_in_postcopy_and_left_when_it_is_back(tmp_path: Path) -> None:
    async with on_two_hosts(tmp_path) as lab:
        await lab.begin(1 << 20)
        await lab.postcopy()
        monitors = lab.pair.source.qmp, lab.pair.destination.qmp
        since = [len(qmp.events) for qmp in monitors]
        down = trio.current_time()
        lab.hosts[1].link("down")
        with trio.fail_after(DEAD_AFTER_SECONDS + BUSY):
            for qmp, seen in zip(monitors, since, strict=True):
                paused = await qmp.wait_migration("postcopy-paused", since=seen)
                assert paused.emitted - down < DEAD_AFTER_SECONDS + BUSY / 2
        lab.hosts[1].link("up")
        with trio.fail_after(BUSY):  # a new connection's SYN may have to be sent again first
            for qmp, seen in zip(monitors, since, strict=True):
                await qmp.wait_migration("postcopy-active", since=seen)
        await lab.finish()


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_a_second_network_recovers_what_the_first_lost_for_ever(tmp_path: Path, binary: str) -> None:
    async with on_two_hosts(tmp_path, Setting(binary, recover_port=free_port())) as lab:
        await lab.begin(1 << 20)
        await lab.postcopy()
        monitors = lab.pair.source.qmp, lab.pair.destination.qmp
        since = [len(qmp.events) for qmp in monitors]
        lab.hosts[1].link("down")
        with trio.fail_after(DEAD_AFTER_SECONDS + BUSY):
            paused = [
                await qmp.wait_migration("postcopy-paused", since=seen)
                for qmp, seen in zip(monitors, since, strict=True)
            ]
            active = [
                await qmp.wait_migration("postcopy-active", since=seen)
                for qmp, seen in zip(monitors, since, strict=True)
            ]
        noticed, again = (max(event.emitted for event in events) for events in (paused, active))
        assert again - noticed < 5 * DIAL_TIMEOUT  # of the dead one; the rest is a busy machine's
        with trio.fail_after(BUSY):
            while not any("recovered in" in line for line in lab.log("src")):
                await trio.sleep(0.02)
        # Lost once more, it is recovered there at once: the dead network is not tried first again.
        since = [len(qmp.events) for qmp in monitors]
        await lab.pair.source.qmp.execute("migrate-pause", oob=True)
        with trio.fail_after(BUSY):
            for qmp, seen in zip(monitors, since, strict=True):
                await qmp.wait_migration("postcopy-active", since=seen)
        log = lab.refaults[0].tail(1000).splitlines()
        last_attempt = [line for line in log if "recovery attempt" in line][-1]
        assert last_attempt.partition("resume to ")[2].startswith(f"tcp:{lab.hosts[1].addresses[1]}")
        await lab.finish()


async def test_a_peer_that_is_stopped_but_whose_host_answers_is_not_cut(tmp_path: Path) -> None:
    async with on_two_hosts(tmp_path) as lab:
        await lab.begin(1 << 20)
        await lab.postcopy()
        since = len(lab.pair.source.qmp.events)
        lab.refaults[1].signal(signal.SIGSTOP)
        await trio.sleep(DEAD_AFTER_SECONDS + 3)
        lab.refaults[1].signal(signal.SIGCONT)
        await lab.finish()
        told = {event.data.get("status") for event in lab.pair.source.qmp.events[since:]}
        assert "postcopy-paused" not in told


async def test_in_precopy_a_silent_network_is_waited_out(tmp_path: Path) -> None:
    async with on_two_hosts(tmp_path) as lab:
        await lab.begin(4 << 20)
        lab.hosts[1].link("down")
        await trio.sleep(DEAD_AFTER_SECONDS + 3)
        lab.hosts[1].link("up")
        await lab.postcopy()
        await lab.finish()
