"""Connecting to QEMU, or a manager: what counts as nobody, and how long the pauses are."""

from __future__ import annotations

import socket

import pytest
import trio

from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.monitor.dial import dial, pauses


def test_the_pauses() -> None:
    assert pauses(parse_address("/q")) == (0.05, 1.0)
    assert pauses(parse_address("/q,reconnect=5")) == (0.05, 5.0)
    assert pauses(parse_address("/q,reconnect-ms=20")) == (0.02, 0.02)


async def test_a_connection_to_ourselves_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens the kernel may choose the very port for our end, and connect the two."""
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        end.connect(end.getsockname())
        port = end.getsockname()[1]

        async def open_tcp_stream(host: str, port: int) -> trio.SocketStream:
            return trio.SocketStream(trio.socket.from_stdlib_socket(end.dup()))

        monkeypatch.setattr(trio, "open_tcp_stream", open_tcp_stream)
        with pytest.raises(ConnectionRefusedError):
            await dial(Address(None, "127.0.0.1", port), 5)


@pytest.mark.parametrize(("options", "reached"), [("", True), (",ipv4=on", True), (",ipv6=on", False)])
async def test_the_family_that_was_asked_for(options: str, reached: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = parse_address(f"tcp:localhost:{listener.getsockname()[1]}{options}")
        try:
            (await dial(address, 5)).close()
        except OSError:
            assert not reached
        else:
            assert reached


async def test_an_abstract_name() -> None:
    address = parse_address("unix:refault-test-dial,abstract=on,tight=off")
    with pytest.raises(ConnectionRefusedError):
        await dial(address, 5)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address.sun_path)
        listener.listen()
        (await dial(address, 5)).close()
