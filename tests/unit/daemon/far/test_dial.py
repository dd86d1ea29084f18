"""Dialling: one address after the other, and no connection that was made is given up."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from refault.daemon.far import dial
from refault.daemon.far.dial import NoAnswer, connect, connect_any
from refault.lab.channel import free_port
from refault.migration.endpoint import Inet


@contextlib.contextmanager
def listening() -> Iterator[tuple[socket.socket, Inet]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server, Inet("127.0.0.1", server.getsockname()[1])


def refused() -> Inet:
    return Inet("127.0.0.1", free_port())


@contextlib.contextmanager
def silent() -> Iterator[tuple[socket.socket, Inet]]:
    """A listener whose queue is full: the kernel does not answer a SYN."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        where = server.getsockname()
        stack.enter_context(socket.create_connection(where))
        yield server, Inet("127.0.0.1", where[1])


async def test_a_refused_connection_is_told_in_words() -> None:
    endpoint = refused()
    with pytest.raises(OSError, match=r"cannot connect to tcp:127\.0\.0\.1:\d+: .*[Rr]efused"):
        await connect(endpoint, 5)


async def test_an_unknown_host_is_told_in_words() -> None:
    with pytest.raises(OSError, match=r"cannot connect to tcp:nowhere\.invalid:4444: "):
        await connect(Inet("nowhere.invalid", 4444), 20)


async def test_a_name_is_not_waited_for_where_other_addresses_are_to_be_dialled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def looks_up(*_: object) -> Any:
        await trio.sleep_forever()

    monkeypatch.setattr(dial, "look_up", looks_up)
    with pytest.raises(NoAnswer, match="still being looked up"):
        await connect(Inet("host.invalid", 4444), 5, found_within=0.01)


async def test_a_refusal_leads_to_the_next_address_at_once() -> None:
    with listening() as (_, there):
        connection, endpoint = await connect_any([refused(), there], 5)
        assert endpoint == there
        connection.close()


async def test_silence_leads_to_the_next_address_soon_and_each_is_told_when_none_answers() -> None:
    with silent() as (_, quiet), listening() as (_, there):
        began = trio.current_time()
        connection, endpoint = await connect_any([quiet, there], 5)
        assert endpoint == there
        assert trio.current_time() - began < 4  # it is not waited out
        connection.close()
        with pytest.raises(
            OSError, match=f"no answer from {quiet.uri} .*; cannot connect to {refused().uri[:14]}"
        ):
            await connect_any([quiet, refused()], 0.1)


async def test_a_silent_address_is_dialled_again_until_it_answers(nursery: trio.Nursery) -> None:
    with silent() as (server, quiet):

        async def answer() -> None:
            await trio.sleep(0.3)
            server.accept()[0].close()

        nursery.start_soon(answer)
        with trio.fail_after(8):
            connection, _ = await connect_any([quiet, refused()], 5)
        connection.close()


async def test_what_is_given_up_is_never_accepted() -> None:
    with silent() as (server, quiet):
        with pytest.raises(NoAnswer):
            await connect(quiet, 0.1)
        server.accept()[0].close()
        server.settimeout(1.5)  # a SYN that was still in the air would be sent again by now
        with pytest.raises(TimeoutError):
            server.accept()


async def test_a_connection_that_is_made_while_it_is_given_up_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait = trio.lowlevel.wait_writable

    async def late(sock: Any) -> None:
        await wait(sock)
        await trio.sleep_forever()

    monkeypatch.setattr(trio.lowlevel, "wait_writable", late)
    with listening() as (server, there):
        connection = await connect(there, 0.1)
        peer, _ = server.accept()
        await connection.send(b"QEVM")
        peer.send(b"!")
        assert peer.recv(4) == b"QEVM"
        monkeypatch.undo()
        with trio.fail_after(9):
            assert await connection.recv(1) == b"!"  # no filter is left on it
        connection.close()
        peer.close()
