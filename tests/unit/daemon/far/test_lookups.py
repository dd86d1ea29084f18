"""Names: a resolver that is slow delays, and no look-up is begun while one goes on."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import trio

from refault.daemon.far import lookups
from refault.daemon.far.dial import connect_any
from refault.daemon.far.lookups import look_up
from refault.migration.endpoint import Inet

NAME = "slow.test"


class Resolver:
    """Knows one name, and answers when it is let."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers = threading.Event()
        self.error: OSError | None = None
        self._real = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, **more: Any) -> Any:
        if host != NAME.encode() or more.get("flags") == socket.AI_NUMERICHOST:
            return self._real(host, port, **more)
        self.asked += 1
        self.answers.wait(10)
        if self.error is not None:
            raise self.error
        return self._real("127.0.0.1", port, **more)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    slow = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    return slow


async def asked(resolver: Resolver, times: int) -> None:
    with trio.fail_after(9):
        while resolver.asked < times:
            await trio.sleep(0.001)


async def test_a_look_up_under_way_serves_all_who_ask_and_the_next_is_a_new_one(resolver: Resolver) -> None:
    found = []

    async def ask(port: int) -> None:
        found.append((await look_up(NAME, port))[0][4])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 1)
        nursery.start_soon(ask, 2)
        await asked(resolver, 1)
        resolver.answers.set()
    assert sorted(found) == [("127.0.0.1", 1), ("127.0.0.1", 2)]
    assert resolver.asked == 1
    await look_up(NAME, 3)
    assert resolver.asked == 2


async def test_what_is_found_after_all_gave_up_is_there_for_the_next(resolver: Resolver) -> None:
    with trio.move_on_after(0.05):
        await look_up(NAME, 1)
    resolver.answers.set()
    with trio.fail_after(9):
        await look_up(NAME, 2)
    assert resolver.asked == 1


async def test_what_was_found_long_ago_is_not_used(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver.answers.set()
    with trio.move_on_after(0.0):
        await look_up(NAME, 1)
    await asked(resolver, 1)
    monkeypatch.setattr(lookups, "KEPT", -1.0)
    await lookups._all()[NAME].over.wait()
    await look_up(NAME, 2)
    assert resolver.asked == 2


async def test_an_error_of_the_resolver_is_told_to_all(resolver: Resolver) -> None:
    resolver.error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    resolver.answers.set()
    with pytest.raises(OSError, match="Temporary failure"):
        await look_up(NAME, 1)


@pytest.mark.parametrize("name", ["nowhere.invalid", "a..b", "x" * 200])
async def test_what_is_no_name_of_a_host_is_an_error_as_any(name: str) -> None:
    with pytest.raises(OSError, match=r"."):
        await look_up(name, 1)


async def test_the_seconds_of_a_dial_begin_when_the_name_is_known(resolver: Resolver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]

        async def answer() -> None:
            await trio.sleep(0.6)
            resolver.answers.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            connection, _ = await connect_any([Inet(NAME, port)], 0.5)
        connection.close()
    assert resolver.asked == 1


async def test_a_name_that_is_looked_up_holds_no_other_address_up(resolver: Resolver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        with trio.fail_after(9):
            connection, endpoint = await connect_any([Inet(NAME, port), Inet("127.0.0.1", port)], 2)
        assert endpoint.host == "127.0.0.1"
        connection.close()
    resolver.answers.set()
