"""`migrate-incoming` and what comes after it, beside a bare QEMU."""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.integration.beside import REFAULT, end, listens
from tests.integration.qemus import ALL_BINARIES, BINARIES
from tests.integration.slow_resolver import SLOW_NAME, slow_resolver

from refault.lab import bare, qmp_client
from refault.lab.channel import free_port
from refault.lab.qmp_client import QmpClient, QmpError

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

RELAYED = pytest.mark.parametrize("relayed", [False, True], ids=["bare", "relayed"])


def inet(port: int, **further: object) -> dict[str, Any]:
    address = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": str(port), **further}
    return {"channel-type": "main", "addr": address}


def refused(port: int) -> dict[str, dict[str, Any]]:
    """What QEMU refuses for the command itself, whatever becomes of the address."""
    uri = f"tcp:127.0.0.1:{port}"
    return {
        "both": {"uri": uri, "channels": [inet(port)]},
        "neither": {},
        "unknown argument": {"uri": uri, "uri2": uri},
        "no text": {"uri": port},
        "no text, and channels": {"uri": port, "channels": [inet(port)]},
        "two channels": {"channels": [inet(port), inet(port)]},
        "a channel with more": {"channels": [{**inet(port), "more": 1}]},
        "an address with more": {"channels": [inet(port, more=1)]},
        "an address of another type": {"channels": [inet(port, ipv4="yes")]},
        "of no kind": {"uri": f"carrier-pigeon:{port}"},
    }


async def reply(client: QmpClient, command: str, arguments: dict[str, Any]) -> object:
    try:
        return await client.execute(command, arguments)
    except QmpError as error:
        return (error.kind, error.description)


@pytest.mark.parametrize("binary", ALL_BINARIES)
async def test_what_qemu_refuses_it_refuses_itself_and_nothing_is_bound(tmp_path: Path, binary: str) -> None:
    port = free_port()
    replies: list[dict[str, object]] = []
    for relayed in (False, True):
        directory = tmp_path / str(relayed)
        directory.mkdir()
        async with end(directory, "dst", binary=binary, incoming="defer", relayed=relayed) as dst:
            told = {}
            for what, arguments in refused(port).items():
                told[what] = await reply(dst.client, "migrate-incoming", arguments)
                assert not listens(port), what
            told["right"] = await reply(dst.client, "migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
            assert listens(port)
            other = free_port()
            again = {"uri": f"tcp:127.0.0.1:{other}"}
            told["again"] = await reply(dst.client, "migrate-incoming", again)
            assert not listens(other)
            assert listens(port)
        async with end(directory, "src", binary=binary, relayed=relayed) as src:
            told["no -incoming"] = await reply(src.client, "migrate-incoming", again)
            assert not listens(other)
        replies.append(told)
    assert replies[1] == replies[0]
    assert replies[0]["right"] == {}


ADDRESSES = {
    "in-use": "tcp:127.0.0.1:{taken}",
    "in-use-by-name": "tcp:localhost:{taken_everywhere}",
    "of-another-host": "tcp:192.0.2.1:{port}",
    "unknown": "tcp:nobody.invalid:{port}",
}


@pytest.mark.parametrize("binary", BINARIES)
async def test_an_address_that_cannot_be_had_is_refused_as_by_qemu(tmp_path: Path, binary: str) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        both = stack.enter_context(
            socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        )
        ports = {"port": port, "taken": taken.getsockname()[1], "taken_everywhere": both.getsockname()[1]}
        commands = {what: {"uri": uri.format(**ports)} for what, uri in ADDRESSES.items()}
        told: list[dict[str, object]] = [{}, {}]
        for what, arguments in commands.items():  # 10.0 takes no command after one that has failed so
            directory = tmp_path / what
            directory.mkdir()
            async with end(directory, "dst", binary=binary, incoming="defer", relayed=False) as dst:
                told[0][what] = await reply(dst.client, "migrate-incoming", arguments)
        async with end(tmp_path, "dst", binary=binary, incoming="defer") as dst:
            for what, arguments in commands.items():
                told[1][what] = await reply(dst.client, "migrate-incoming", arguments)
            assert told[1] == told[0]
            wrong = {**commands["in-use"], "uri2": 1}
            assert "uri2" in str(await reply(dst.client, "migrate-incoming", wrong))
            if dst.client.version >= (8, 2, 0):
                in_channels = {"channels": [inet(ports["taken"])]}
                assert await reply(dst.client, "migrate-incoming", in_channels) == told[0]["in-use"]
            # And refault's QEMU takes the next one.
            assert await reply(dst.client, "migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"}) == {}
            assert listens(port)


NAMES = ["localhost", "127.0.0.1", "[::1]", "0", "", "[::]"]


@pytest.mark.parametrize("host", NAMES)
async def test_where_it_listens_is_where_qemu_would_and_told_as_by_qemu(tmp_path: Path, host: str) -> None:
    binary = BINARIES[NAMES.index(host) % len(BINARIES)]
    port = free_port()
    told = []
    for relayed in (False, True):
        directory = tmp_path / str(relayed)
        directory.mkdir()
        async with end(directory, "dst", binary=binary, incoming="defer", relayed=relayed) as dst:
            await dst.client.execute("migrate-incoming", {"uri": f"tcp:{host}:{port}"})
            told.append((await dst.client.execute("query-migrate"))["socket-address"])
            with contextlib.ExitStack() as connections:  # a bare QEMU ends as soon as one of them does
                for number in ("127.0.0.1", "::1"):
                    try:
                        connections.enter_context(socket.create_connection((number, port), timeout=5))
                        told[-1].append(number)
                    except OSError as error:
                        told[-1].append((number, error.errno))
    assert told[1] == told[0]


async def test_port_0_is_told(tmp_path: Path) -> None:
    async with end(tmp_path, "dst", incoming="defer") as dst:
        await dst.client.execute("migrate-incoming", {"uri": "tcp:localhost:0"})
        for address in (await dst.client.execute("query-migrate"))["socket-address"]:
            socket.create_connection((address["host"], address["port"]), timeout=5).close()


async def test_nobody_waits_for_a_resolver_but_who_named_the_host(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.touch()
    preloaded = ["env", f"LD_PRELOAD={slow_resolver(tmp_path)}", f"HELD={held}"]
    port = free_port()
    async with (
        end(tmp_path, "dst", incoming="defer", command=[*preloaded, *REFAULT]) as dst,
        qmp_client.connect(str(tmp_path / "dst.client")) as other,
        trio.open_nursery() as nursery,
    ):
        named = {"uri": f"tcp:{SLOW_NAME}:{port}"}
        nursery.start_soon(functools.partial(dst.client.execute, "migrate-incoming", named))
        with trio.fail_after(20):
            assert await bare.migration_status(other) == "none"
            assert (await other.execute("query-status"))["status"] == "inmigrate"
            assert not listens(port)
            held.unlink()
            while not listens(port):
                await trio.sleep(0.05)


# ---- what is set after migrate-incoming ----

LATE: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, int]]] = {
    "how many": (("multifd",), (), {"multifd-channels": 4}),
    "multifd": ((), ("multifd",), {"multifd-channels": 3}),
    "preempt": ((), ("postcopy-ram", "postcopy-preempt"), {}),
    "no more": (("multifd",), (), {}),
}
"""What is switched on before `migrate-incoming`, what after it, and with which parameters."""


async def capability(client: QmpClient, name: str, state: bool = True) -> object:
    return await reply(
        client, "migrate-set-capabilities", {"capabilities": [{"capability": name, "state": state}]}
    )


@pytest.mark.parametrize("what", LATE)
@pytest.mark.parametrize("binary", BINARIES)
async def test_what_is_set_after_migrate_incoming_holds_or_is_refused_as_by_qemu(
    tmp_path: Path, binary: str, what: str
) -> None:
    before, after, parameters = LATE[what]
    ends = []
    for relayed in (False, True):
        directory = tmp_path / str(relayed)
        directory.mkdir()
        port = free_port()
        async with (
            end(directory, "src", binary=binary, relayed=relayed) as src,
            end(directory, "dst", binary=binary, incoming="defer", relayed=relayed) as dst,
        ):
            told = [await capability(dst.client, name) for name in before]
            await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
            told += [await capability(dst.client, name) for name in after]
            if what == "no more":
                told.append(await capability(dst.client, "multifd", state=False))
            told.append(await reply(dst.client, "migrate-set-parameters", parameters))
            # A bare QEMU since 8.0 stands still: it listens for no more than were to come at first.
            stands_still = what == "how many" and not relayed and dst.client.version >= (8, 0, 0)
            if all(answer == {} for answer in told) and not stands_still:
                if what != "no more":
                    for name in (*before, *after):
                        assert await capability(src.client, name) == {}
                await src.client.execute("migrate-set-parameters", {**parameters, "max-bandwidth": 0})
                await src.client.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
                with trio.fail_after(40):
                    await bare.wait_status(src.client, "completed")
                    await bare.wait_status(dst.client, "completed")
                await dst.qemu.wait_progress()
        ends.append(told)
    assert ends[1] == ends[0]


# ---- a peer with several addresses ----


@contextlib.asynccontextmanager
async def nat(port: int, hosts: tuple[str, ...]) -> AsyncIterator[int]:
    """A port that leads to `port`, each connection from the next of these addresses of this host."""
    several = itertools.cycle(hosts)

    async def through(near: trio.SocketStream) -> None:
        far = trio.socket.socket()
        await far.bind((next(several), 0))
        await far.connect(("127.0.0.1", port))
        async with trio.SocketStream(far) as stream, near, trio.open_nursery() as nursery:
            nursery.start_soon(carry, near, stream)
            nursery.start_soon(carry, stream, near)

    async with trio.open_nursery() as nursery:
        serve = functools.partial(trio.serve_tcp, host="127.0.0.1")
        [listener] = await nursery.start(serve, through, 0)
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def carry(one: trio.SocketStream, other: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in one:
            await other.send_all(data)
        await other.send_eof()


LANES = {"multifd": ("multifd",), "preempt": ("postcopy-ram", "postcopy-preempt")}


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("binary", BINARIES)
async def test_a_peer_with_several_addresses_is_one_peer(tmp_path: Path, binary: str, lanes: str) -> None:
    port = free_port()
    async with (
        end(tmp_path, "src", binary=binary, relayed=False) as src,
        end(tmp_path, "dst", binary=binary, incoming="defer") as dst,
        nat(port, ("127.0.0.1", "127.0.0.2", "127.0.0.3")) as way,
    ):
        await bare.set_capabilities(src.client, *LANES[lanes])
        await bare.set_capabilities(dst.client, *LANES[lanes])
        for client in (src.client, dst.client):
            await client.execute("migrate-set-parameters", {"multifd-channels": 4})
        limits = {"max-bandwidth": bare.PRECOPY_BANDWIDTH, "downtime-limit": bare.DOWNTIME_LIMIT}
        await src.client.execute("migrate-set-parameters", limits)
        await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
        await src.client.execute("migrate", {"uri": f"tcp:127.0.0.1:{way}"})
        with trio.fail_after(20):
            await bare.wait_sent(src.client, 0.1)
            if lanes == "preempt":
                await src.client.execute("migrate-start-postcopy")
            await src.client.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 300})
            await bare.wait_status(src.client, "completed")
            await bare.wait_status(dst.client, "completed")
        await dst.qemu.wait_progress()


async def test_multifd_channels_of_another_vm_are_not_taken_for_ours(tmp_path: Path) -> None:
    """Nor do those that are there twice, and before ours, keep it from the main connection's host."""
    port = free_port()
    async with (
        end(tmp_path, "src", relayed=False) as src,
        end(tmp_path, "dst", incoming="defer") as dst,
        trio.open_nursery() as nursery,
    ):
        for client in (src.client, dst.client):
            await bare.set_capabilities(client, "multifd")
        await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
        ours, others = bytes(16), bytes(15) + b"\1"
        for number, uuid in ((0, others), (1, others), (0, ours), (1, ours), (7, ours)):
            await nursery.start(stranger, port, struct.pack(">II16sB39x", 0x11223344, 1, uuid, number))
        await src.client.execute("migrate-set-parameters", {"max-bandwidth": 0})
        await src.client.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        with trio.fail_after(20):
            await bare.wait_status(src.client, "completed")
            await bare.wait_status(dst.client, "completed")
        await dst.qemu.wait_progress()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("here", "there"), [(6, 2), (2, 0)])
@RELAYED
async def test_more_multifd_channels_than_the_destination_takes_lose_no_page(
    tmp_path: Path, relayed: bool, here: int, there: int
) -> None:
    """What they carry would reach nobody: the migration fails, and the guest goes on at the source. With
    much bandwidth all would be sent before they come."""
    port = free_port()
    async with (
        end(tmp_path, "src", relayed=relayed) as src,
        end(tmp_path, "dst", incoming="defer", relayed=relayed) as dst,
    ):
        for client, channels in ((src.client, here), (dst.client, there)):
            if channels:
                await bare.set_capabilities(client, "multifd")
                await client.execute("migrate-set-parameters", {"multifd-channels": channels})
        await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
        slow = {"max-bandwidth": 128 << 10, "downtime-limit": bare.DOWNTIME_LIMIT}
        await src.client.execute("migrate-set-parameters", slow)
        await src.client.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        with trio.fail_after(40):
            await bare.wait_status(src.client, "failed")
        assert (await src.client.execute("query-status"))["running"]
        await src.qemu.wait_progress()


async def stranger(
    port: int, says: bytes, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Comes from another address, says that, and stays."""
    with trio.socket.socket() as sock:
        await sock.bind(("127.0.0.9", 0))
        await sock.connect(("127.0.0.1", port))
        await sock.send(says)
        task_status.started()
        await trio.sleep_forever()
