"""What is left of the descriptors that a process may have, and for whom."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import trio
from tests.support.exhausted import exhausted, permitted
from tests.unit.daemon.pictures import PICTURE

from refault.daemon.host.descriptors import why_few
from refault.daemon.monitor.address import Address
from refault.daemon.telling.control import serve_control
from refault.daemon.telling.snapshot import decode


def test_few_are_told() -> None:
    with permitted(160), contextlib.ExitStack() as stack:
        assert why_few() is None
        with contextlib.suppress(OSError):  # others are open already
            for _ in range(158):
                stack.callback(os.close, os.eventfd(0))
        assert "LimitNOFILE=" in str(why_few())
    with exhausted():
        assert "LimitNOFILE=" in str(why_few())


async def test_the_status_is_told_where_no_descriptor_is_left(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, Address(path), lambda: PICTURE)
        clients = [trio.socket.socket(socket.AF_UNIX) for _ in range(3)]
        with exhausted(), trio.fail_after(10):
            for client in clients:
                with client:
                    await client.connect(path)
                    told = b""
                    while data := await client.recv(1 << 16):
                        told += data
                    assert decode(told) == PICTURE
        nursery.cancel_scope.cancel()
