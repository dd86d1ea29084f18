"""How long what is out-of-band waits for a descriptor on its way to QEMU."""

from __future__ import annotations

import os
from pathlib import Path

import trio
from tests.unit.qmp.played import Played

from refault.daemon.kept.recorder import Recorder
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.first_client import FirstClient
from refault.daemon.monitor.keeper import Keeper
from refault.daemon.monitor.presence import Presence
from refault.daemon.monitor.upstream import URGENT_AFTER, Upstream

GETFD = b'{"execute": "getfd", "arguments": {"fdname": "%s"}}'


async def test_what_is_urgent_waits_no_longer_for_that_another_descriptor_went_before(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    played = Played()
    core, qemu, presence = played.core, Address(str(tmp_path / "qemu")), Presence()
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
