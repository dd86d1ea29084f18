"""Descriptors that clients pass: the right one, under the right name, to the right command, and none left
behind.
"""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import qemus
from tests.integration.qmp_tools import (
    Client,
    Message,
    clients_gone,
    directory,
    negotiated,
    open_fds,
    qemu_process,
    refault,
)

pytestmark = pytest.mark.qemu


@contextmanager
def temporary(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield fd
    finally:
        os.close(fd)


def execute(name: str, spelling: object, **arguments: object) -> bytes:
    return json.dumps({"execute": name, "arguments": arguments, "id": spelling}).encode()


def held_by(pid: int) -> dict[int, str]:
    """A process's descriptors and what they are; some may come and go meanwhile."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


async def test_pipelined_by_ten_clients_with_the_same_names() -> None:
    names = ["a", "b", "migration"]
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off") as qemu:
        fds = len(open_fds())
        async with refault(path / "qemu", path / "front") as monitor, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(negotiated(path / "front")) for _ in range(10)]
            busy = await stack.enter_async_context(negotiated(path / "front"))

            async def load() -> None:
                while True:
                    await busy.send(b'{"execute": "query-name", "id": 1}' * 20)
                    for _ in range(20):
                        await busy.receive()

            async def pass_all(number: int, client: Client) -> None:
                for turn in range(3):  # the later ones replace the earlier ones
                    for name in names:
                        with temporary(path / f"{number}-{name}-{turn}") as fd:
                            await client.send_fd(execute("getfd", [name, turn], fdname=name), fd)
                    with temporary(path / f"{number}-set-{turn}") as fd:
                        await client.send_fd(execute("add-fd", ["set", turn], opaque=f"{number}/{turn}"), fd)
                for turn in range(3):
                    for name in names:
                        assert await client.reply([name, turn]) == {"return": {}, "id": [name, turn]}
                    added = (await client.reply(["set", turn]))["return"]
                    assert held_by(qemu.pid)[added["fd"]] == str(path / f"{number}-set-{turn}")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(load)
                async with trio.open_nursery() as passing:
                    for number, client in enumerate(clients):
                        passing.start_soon(pass_all, number, client)
                nursery.cancel_scope.cancel()

            held = sorted(
                target
                for target in held_by(qemu.pid).values()
                if "-set-" not in target and "/refault-" in target
            )
            wanted = sorted(str(path / f"{number}-{name}-2") for number in range(10) for name in names)
            assert [target for target in held if target.endswith("-2")] == wanted
            assert not [target for target in held if target.endswith(("-0", "-1"))]
            for number, client in enumerate(clients):  # each closes its own, and no other's
                await client.command("closefd", {"fdname": "b"})
                assert str(path / f"{number}-b-2") not in held_by(qemu.pid).values()
                await client.send(execute("closefd", "again", fdname="b"))
                assert (await client.reply("again"))["error"]["desc"] == "File descriptor named 'b' not found"
                assert str(path / f"{number}-a-2") in held_by(qemu.pid).values()
            sets = [item["fdset-id"] for item in await clients[0].command("query-fdsets")]
            assert len(sets) == 30
            assert monitor.counters.dropped_replies == 0
        assert len(open_fds()) == fds


async def test_where_a_name_is_used() -> None:
    """Two clients' sockets of the same name end in the chardevs and migrations of each."""
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with (
            refault(path / "qemu", path / "front"),
            negotiated(path / "front") as one,
            negotiated(path / "front") as other,
        ):
            ends = []
            for client in (one, other):
                mine, its = socket.socketpair()
                ends.append(mine)
                with its:
                    await client.send_fd(execute("getfd", "get", fdname="s"), its.fileno())
                assert await client.reply("get") == {"return": {}, "id": "get"}
            for client, name in ((other, "second"), (one, "first")):
                await client.command(
                    "chardev-add",
                    {
                        "id": name,
                        "backend": {
                            "type": "socket",
                            "data": {"addr": {"type": "fd", "data": {"str": "s"}}, "server": False},
                        },
                    },
                )
            for client, name in ((one, "first"), (other, "second")):
                await client.command("chardev-remove", {"id": name})
                end = ends.pop(0)
                assert end.recv(1) == b""  # it was this one's
                end.close()
                for later in ends:
                    later.setblocking(False)
                    with pytest.raises(BlockingIOError):
                        later.recv(1)
                    later.setblocking(True)
            await other.send(execute("migrate", "m", uri="fd:nothing"))
            assert "nothing" in (await other.reply("m"))["error"]["desc"]


@pytest.mark.parametrize("name", ["n", "\u00e9", 'a"b', "a\\b"])
async def test_errors_name_descriptors_as_the_client_does(name: str) -> None:
    """However QEMU spells them."""
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with (
            refault(path / "qemu", path / "front"),
            negotiated(path / "front") as one,
            negotiated(path / "front") as other,
        ):
            for client in (one, other):
                with temporary(path / "file") as fd:
                    await client.send_fd(execute("getfd", "get", fdname=name), fd)
                    assert await client.reply("get") == {"return": {}, "id": "get"}
            await other.command("closefd", {"fdname": name})
            await other.send(execute("closefd", "again", fdname=name))
            assert (await other.reply("again"))["error"][
                "desc"
            ] == f"File descriptor named '{name}' not found"


async def test_a_dump_goes_to_the_descriptor_of_who_asked_for_it() -> None:
    machine = ["-machine", "pc,accel=tcg", "-S", "-m", "16"]
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off", extra=machine):
        async with (
            refault(path / "qemu", path / "front"),
            negotiated(path / "front") as one,
            negotiated(path / "front") as other,
        ):
            for client, name in ((one, "one"), (other, "other")):
                with temporary(path / name) as fd:
                    await client.send_fd(execute("getfd", "get", fdname="dump"), fd)
                    assert await client.reply("get") == {"return": {}, "id": "get"}
            await other.command("dump-guest-memory", {"paging": False, "protocol": "fd:dump"})
            assert (path / "one").stat().st_size == 0
            assert (path / "other").stat().st_size > 16 << 20


async def test_a_descriptor_before_its_command() -> None:
    """As the qemu.qmp library sends it: with a blank, ahead."""
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off") as qemu:
        async with refault(path / "qemu", path / "front"), negotiated(path / "front") as client:
            for turn in range(3):
                with temporary(path / f"file-{turn}") as fd:
                    await client.send_fd(b" ", fd)
                    await client.send(execute("getfd", turn, fdname=f"n{turn}"))
            for turn in range(3):
                assert "return" in await client.reply(turn)
            for turn in range(3):
                assert str(path / f"file-{turn}") in held_by(qemu.pid).values()
            await client.send(execute("getfd", "none", fdname="x"))
            expected = "No file descriptor supplied via SCM_RIGHTS"
            assert (await client.reply("none"))["error"]["desc"] == expected


async def test_a_descriptor_replaces_one_that_no_command_took() -> None:
    """As in QEMU, whose own socket is beside refault's."""
    with directory() as path:
        monitors = [f"unix:{path}/{name},server=on,wait=off" for name in ("qemu", "direct")]
        with qemu_process(*monitors) as qemu:
            async with refault(path / "qemu", path / "front"):
                for name in ("direct", "front"):
                    async with negotiated(path / name) as client:
                        with temporary(path / f"{name}-1") as first, temporary(path / f"{name}-2") as second:
                            await client.send_fd(execute("query-name", 1), first)
                            await client.reply(1)
                            await client.send_fd(execute("getfd", 2, fdname=name), second)
                            assert "return" in await client.reply(2)
                        held = held_by(qemu.pid).values()
                        assert [target for target in held if target.startswith(f"{path}/{name}-")] == [
                            f"{path}/{name}-2"
                        ]


async def test_a_descriptor_with_a_command_that_takes_none_is_not_the_next_clients() -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with (
            refault(path / "qemu", path / "front"),
            negotiated(path / "front") as one,
            negotiated(path / "front") as other,
        ):
            with temporary(path / "file") as fd:
                await one.send_fd(execute("query-name", 1), fd)
                await one.reply(1)
                await one.send_fd(execute("getfd", 2), fd)  # QEMU refuses it before it takes the descriptor
                assert "error" in await one.reply(2)
                await other.send(execute("getfd", 3, fdname="x"))
                reply: Message = await other.reply(3)
            assert reply["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"


@pytest.mark.parametrize(
    "data", [b" ", b'{"execute": "query-name"}', b'{"execute": "getfd", "arguments": {"x": 1}}']
)
async def test_a_hostile_client_leaves_none_behind(data: bytes) -> None:
    count = 10_000
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off") as qemu:
        async with refault(path / "qemu", path / "front") as monitor, negotiated(path / "front") as normal:
            before = open_fds()
            in_qemu = len(held_by(qemu.pid))
            most = 0
            with temporary(path / "file") as fd:
                async with negotiated(path / "front") as client, trio.open_nursery() as nursery:

                    async def read() -> None:
                        while await client.stream.receive_some():
                            pass

                    nursery.start_soon(read)
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little") * 200)
                    for turn in range(count // 200):
                        await client.stream.socket.sendmsg([data], [rights])
                        if turn % 10 == 0:
                            most = max(most, len(open_fds()))
                            assert await normal.command("query-name") == {}
                    nursery.cancel_scope.cancel()
            await clients_gone(monitor, 1)
            await normal.command("query-name")
            assert most <= len(before) + 30
            assert open_fds().keys() == before.keys()
            assert len(held_by(qemu.pid)) <= in_qemu + 1


BINARIES = qemus("qemu-10", "qemu-11")
CLOSES_SETS_ITSELF = (9, 1)
"""Before this QEMU closes what is in its fd sets itself when the last client of its monitors has gone."""


async def add_fd(client: Client, fd: int, **arguments: object) -> int:
    """Adds `fd` to a set, whose number is returned."""
    await client.send_fd(execute("add-fd", "add", **arguments), fd)
    number: int = (await client.reply("add"))["return"]["fdset-id"]
    return number


async def sets(client: Client) -> list[int]:
    return sorted(item["fdset-id"] for item in await client.command("query-fdsets"))


async def sets_become(client: Client, wanted: list[int]) -> None:
    with trio.fail_after(30):
        while await sets(client) != wanted:
            await trio.sleep(0.01)


def version(client: Client) -> tuple[int, int]:
    qemu = client.greeting["QMP"]["version"]["qemu"]
    return qemu["major"], qemu["minor"]


@pytest.mark.parametrize("qemu", BINARIES)
async def test_sets_of_clients_that_left_do_not_pile_up(qemu: str) -> None:
    """QEMU has fewer files than there are clients. Beside it a QEMU on its own."""
    limit = 64
    with (
        directory() as path,
        qemu_process(f"unix:{path}/qemu,server=on,wait=off", qemu=qemu) as process,
        qemu_process(f"unix:{path}/bare,server=on,wait=off", qemu=qemu),
        temporary(path / "file") as fd,
    ):
        async with refault(path / "qemu", path / "front"), negotiated(path / "front") as stays:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
            for turn in range(2 * limit):
                async with negotiated(path / "front") as client:
                    await add_fd(client, fd, **({"fdset-id": 7} if turn % 2 else {"opaque": "x"}))
            await sets_become(stays, [])
            async with negotiated(path / "bare") as client:
                await add_fd(client, fd)
            async with negotiated(path / "bare") as client:
                assert await sets(client) == ([] if version(client) < CLOSES_SETS_ITSELF else [0])


@pytest.mark.parametrize("qemu", BINARIES)
async def test_a_set_that_was_named_is_there_when_it_is_opened_again(qemu: str) -> None:
    """Its client has left, and what uses it needs the set's other descriptor now, to write."""
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off", qemu=qemu):
        (path / "image").write_bytes(bytes(1 << 20))
        async with refault(path / "qemu", path / "front"), negotiated(path / "front") as stays:
            async with negotiated(path / "front") as client:
                number = 5
                for flags in (os.O_RDONLY, os.O_RDWR):
                    fd = os.open(path / "image", flags)
                    await add_fd(client, fd, **{"fdset-id": number})
                    os.close(fd)
                node = {"driver": "file", "node-name": "n", "filename": f"/dev/fdset/{number}"}
                await client.command("blockdev-add", {**node, "read-only": True})
                with temporary(path / "other") as fd:
                    assert await add_fd(client, fd) != number
            await sets_become(stays, [number])
            await stays.command("blockdev-reopen", {"options": [{**node, "read-only": False}]})
            [block] = await stays.command("query-named-block-nodes")
            assert not block["ro"]


@pytest.mark.parametrize("qemu", BINARIES)
@pytest.mark.parametrize("extra", [["-S"], ["-incoming", "defer"]])
async def test_sets_stay_until_the_guest_runs(qemu: str, extra: list[str]) -> None:
    """As at a QEMU on its own, which is beside refault's."""
    with (
        directory() as path,
        qemu_process(f"unix:{path}/qemu,server=on,wait=off", qemu=qemu, extra=extra),
        qemu_process(f"unix:{path}/bare,server=on,wait=off", qemu=qemu, extra=extra),
        temporary(path / "file") as fd,
    ):
        async with refault(path / "qemu", path / "front") as monitor:
            for where in ("front", "bare"):
                async with negotiated(path / where) as client:
                    assert await add_fd(client, fd) == 0
                await clients_gone(monitor)
                async with negotiated(path / where) as client:
                    # By the third answer refault has asked what it asks when a client has left, and acted.
                    assert [await sets(client) for _ in range(3)] == [[0]] * 3
            if "-S" not in extra:
                return
            async with negotiated(path / "front") as client:
                await client.command("cont")
                await sets_become(client, [])
