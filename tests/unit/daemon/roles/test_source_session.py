"""Which lane of a session a further connection of a source's QEMU is."""

from __future__ import annotations

import socket
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from refault.channel.relay import SessionEnd
from refault.daemon.roles import source_session
from refault.daemon.roles.source_session import lane_of

_DIALS: Any = SimpleNamespace(session=SessionEnd.DIALS)


def _init(number: int) -> bytes:
    return struct.pack(">II16sB7x32x", 0x11223344, 1, bytes(16), number)


async def test_a_multifd_channel_is_the_lane_whose_number_it_says() -> None:
    ours, qemu = socket.socketpair()
    with ours, qemu:
        ours.setblocking(False)
        found: list[int] = []

        async def find() -> None:
            found.append(await lane_of(_DIALS, ours, multifd=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(find)
            for part in (_init(4)[:30], _init(4)[30:] + b"pages"):
                qemu.send(part)
                await trio.sleep(0.005)
        assert found == [5]
        assert ours.recv(100) == _init(4) + b"pages"  # nothing is consumed


@pytest.mark.parametrize("said", [b"", b"x" * 64])
async def test_one_that_says_no_number_is_none(said: bytes) -> None:
    ours, qemu = socket.socketpair()
    with ours, qemu:
        ours.setblocking(False)
        qemu.send(said)
        qemu.shutdown(socket.SHUT_WR)
        assert await lane_of(_DIALS, ours, multifd=True) == 0


async def test_one_that_says_nothing_is_waited_for_no_longer_than_need_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source_session, "SAYS_WITHIN", 0.01)
    ours, qemu = socket.socketpair()
    with ours, qemu:
        ours.setblocking(False)
        assert await lane_of(_DIALS, ours, multifd=True) == 0
        assert await lane_of(_DIALS, ours, multifd=False) == 1  # a preempt channel says nothing for long
        bare: Any = SimpleNamespace(session=SessionEnd.NO)
        assert await lane_of(bare, ours, multifd=True) == 1
