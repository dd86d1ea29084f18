"""How long what is out-of-band waits for a descriptor on its way; how often a QEMU that ends is met."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
from tests.unit.qmp.played import GREETING, Played

from refault.daemon.kept.recorder import Recorder
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.first_client import FirstClient
from refault.daemon.monitor.keeper import Keeper
from refault.daemon.monitor.presence import Presence
from refault.daemon.monitor.upstream import _STEADY_AFTER, URGENT_AFTER, Upstream

GETFD = b'{"execute": "getfd", "arguments": {"fdname": "%s"}}'


def upstream_of(played: Played, directory: Path) -> Upstream:
    core, qemu, presence = played.core, Address(str(directory / "qemu")), Presence()
    recorder = Recorder("vm", None, bytes, lambda: None)
    keeper = Keeper(
        "vm",
        core,
        recorder,
        flush=lambda: None,
        fronts=list,
        clients=list,
        borrows=lambda: False,
    )
    upstream = Upstream(
        "vm",
        qemu,
        core,
        presence,
        FirstClient("vm", qemu, (), presence, over=False),
        flush=lambda: upstream.mind_urgent(),
        lost=lambda: None,
        unanswered=lambda: None,
        recorder=recorder,
        keeper=keeper,
    )
    return upstream


async def test_a_qemu_that_ends_as_soon_as_it_has_come_is_met_ever_less_often(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = upstream_of(Played(), tmp_path)
    lives, met = 0.0, list[float]()

    async def reach() -> socket.socket:
        met.append(trio.current_time())
        ours, qemus = socket.socketpair()
        ours.setblocking(False)
        qemus.sendall(GREETING % b"")
        nursery.start_soon(ends, qemus)
        return ours

    async def ends(qemus: socket.socket) -> None:
        with qemus:
            await trio.sleep(lives)

    monkeypatch.setattr(upstream, "_reach", reach)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upstream.run)
        await trio.sleep(20)
        assert met[1] < 0.2
        assert len(met) < 30
        lives = _STEADY_AFTER
        await trio.sleep(20)
        assert met[-1] - met[-2] < lives + 0.1
        nursery.cancel_scope.cancel()


async def test_what_is_urgent_waits_no_longer_for_that_another_descriptor_went_before(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    played = Played()
    core, upstream = played.core, upstream_of(played, tmp_path)
    client = played.client("oob")
    async with trio.open_nursery() as nursery:
        upstream._connection = nursery

        def pass_one(name: bytes) -> object:
            core.receive(client, GETFD % name, os.dup(0))
            [getfd] = played.commands()
            core.receive(client, b'{"exec-oob": "o"}')
            assert len(core.urgent) == 1
            upstream.mind_urgent()
            return getfd["id"]

        first = pass_one(b"a")
        await trio.sleep(URGENT_AFTER / 2)
        played.reply(first)
        assert not core.urgent
        played.commands()
        pass_one(b"b")
        await trio.sleep(URGENT_AFTER * 0.9)
        assert len(core.urgent) == 1
        await trio.sleep(URGENT_AFTER * 0.2)
        assert not core.urgent
    for fd in played.fds:
        os.close(fd)
