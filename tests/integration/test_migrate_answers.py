"""`migrate` through refault and at a bare QEMU beside it: the same replies, events and errors, and the other
host sees no connection before QEMU has taken the command."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.integration.qemus import BINARIES

from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.driver import REFAULT
from refault.lab.process import Process, started
from refault.lab.procnet import tcp_sockets
from refault.lab.qmp_client import QmpClient, QmpError, connect

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

MACHINE = ("-M", "pc", "-m", "16", "-nodefaults", "-display", "none", "-accel", "tcg", "-S")
ENDED = ("failed", "cancelled", "completed")
SYN_SENT = 0x02


@dataclass
class End:
    """A QEMU, and a client at it: through refault, or not."""

    process: Process
    qmp: QmpClient
    address: str

    def statuses(self, since: int) -> list[str]:
        """What its MIGRATION events said."""
        events = self.qmp.events[since:]
        return [event.data["status"] for event in events if event.name == "MIGRATION"]


Told = dict[str, Any]
Scenario = Callable[[End], Awaitable[Told]]


@asynccontextmanager
async def both(directory: Path, binary: str, *more: str) -> AsyncIterator[tuple[End, End]]:
    """A bare QEMU and one behind refault."""
    async with at(directory, binary, "bare", *more) as one, at(directory, binary, "vm", *more) as other:
        yield one, other


@asynccontextmanager
async def at(directory: Path, binary: str, name: str, *more: str) -> AsyncIterator[End]:
    monitor, front = directory / f"{name}.qmp", directory / f"{name}.front"
    command = [binary, *MACHINE, "-qmp", f"unix:{monitor},server=on,wait=off", *more]
    with contextlib.ExitStack() as stack:
        qemu = stack.enter_context(started(name, command, directory / f"{name}.log"))
        place = monitor
        if name != "bare":
            refault = [
                *REFAULT,
                "run",
                "--name",
                name,
                "--qemu",
                f"unix:{monitor}",
                "--listen",
                f"unix:{front}",
            ]
            refault += ["--control", str(directory / "control"), "--state-dir", str(directory)]
            stack.enter_context(started("refault", refault, directory / "refault.log"))
            place = front
        with trio.fail_after(30):
            while not place.exists():
                await trio.sleep(0.01)
        async with connect(f"unix:{place}", name=name) as qmp:
            await bare.set_capabilities(qmp, "events")
            yield End(qemu, qmp, f"unix:{place}")


async def told(end: End, arguments: Mapping[str, Any]) -> Told:
    """What `migrate` gives, and what is heard until it has ended."""
    since = len(end.qmp.events)
    reply: Any
    try:
        reply = await end.qmp.execute("migrate", dict(arguments))
    except QmpError as error:
        reply = (error.kind, error.description)
    else:
        with trio.fail_after(40):
            await end.qmp.wait_migration(*ENDED, since=since)
    asked = await end.qmp.execute("query-migrate")
    return {
        "reply": reply,
        "events": end.statuses(since),
        "status": asked.get("status"),
        "error": asked.get("error-desc"),
    }


async def same(ends: tuple[End, End], arguments: Mapping[str, Any]) -> Told:
    """What both give. Asserts that it is the same."""
    bare_one, ours = [await told(end, arguments) for end in ends]
    assert ours == bare_one, arguments
    return ours


class Sink:
    """An address that must see no connection."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.setblocking(False)
        self.port = self._server.getsockname()[1]
        self.uri = f"tcp:127.0.0.1:{self.port}"
        inet = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": str(self.port)}
        self.addr: dict[str, Any] = inet
        self.channel: dict[str, Any] = {"channel-type": "main", "addr": inet}

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def untouched(self) -> bool:
        try:
            self._server.accept()[0].close()
        except BlockingIOError:
            return True
        return False


def refused_arguments(sink: Sink) -> list[dict[str, Any]]:
    uri, channel, addr = sink.uri, sink.channel, sink.addr
    return [
        {},
        {"uri": uri, "bogus": 1},
        {"uri": uri, "resume": "yes"},
        {"uri": uri, "detach": 1},
        {"uri": uri, "resume": None},
        {"uri": uri, "resume": True},
        {"uri": uri, "resume": True, "bogus": 1},
        {"uri": None},
        {"uri": 4},
        {"uri": [uri]},
        {"uri": uri, "channels": [channel]},
        {"uri": None, "channels": [channel]},
        {"uri": uri, "channels": None},
        {"channels": None},
        {"channels": []},
        {"channels": [channel, channel]},
        {"channels": [{**channel, "bogus": 1}]},
        {"channels": [{**channel, "addr": {**addr, "bogus": 1}}]},
        {"channels": [{**channel, "addr": {**addr, "ipv4": "yes"}}]},
        {"channels": [{**channel, "addr": {**addr, "port": sink.port}}]},
        {"channels": [channel], "blk": "yes"},
        {"channels": [channel], "bogus": 1},
        {"uri": "bogus:1"},
    ]


@pytest.mark.parametrize("binary", BINARIES)
async def test_what_qemu_refuses_it_refuses_in_its_own_words_and_nobody_is_dialled(
    tmp_path: Path, binary: str
) -> None:
    async with both(tmp_path, binary) as ends:
        with Sink() as sink:
            for arguments in refused_arguments(sink):
                answer = await same(ends, arguments)
                assert answer["reply"] != {}, arguments
            assert sink.untouched()
            await same(ends, {"uri": f"tcp:127.0.0.1:{free_port()}"})
            for end in ends:  # one that goes on until it is cancelled
                await end.qmp.execute("migrate-set-parameters", {"max-bandwidth": 4096})
                await end.qmp.execute("migrate", {"uri": "exec:cat >/dev/null"})
                await bare.wait_status(end.qmp, "active")
            refused = [await told_at_once(end, sink.uri) for end in ends]
            assert refused[0] == refused[1]
            for end in ends:
                since = len(end.qmp.events)
                await end.qmp.execute("migrate_cancel")
                await end.qmp.wait_migration("cancelled", since=since)
                await end.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
            assert (await same(ends, {"uri": "exec:cat >/dev/null"}))["status"] == "completed"
            assert (await same(ends, {"uri": sink.uri}))["reply"] != {}  # in postmigrate
            assert sink.untouched()


async def told_at_once(end: End, uri: str) -> tuple[str, str]:
    with pytest.raises(QmpError) as refused:
        await end.qmp.execute("migrate", {"uri": uri})
    return refused.value.kind, refused.value.description


@pytest.mark.parametrize(
    "more", [("-incoming", "defer"), ("-device", "nvme,serial=1")], ids=["inmigrate", "blocked"]
)
@pytest.mark.parametrize("binary", BINARIES)
async def test_a_qemu_that_cannot_migrate_says_so_itself(
    tmp_path: Path, binary: str, more: tuple[str, str]
) -> None:
    async with both(tmp_path, binary, *more) as ends:
        with Sink() as sink:
            assert (await same(ends, {"uri": sink.uri}))["reply"] != {}
            assert sink.untouched()


@pytest.mark.parametrize("binary", BINARIES)
async def test_an_address_where_nobody_listens(tmp_path: Path, binary: str) -> None:
    port = free_port()
    addr = {"transport": "socket", "type": "inet", "host": "localhost", "port": str(port)}
    async with both(tmp_path, binary) as ends:
        for arguments in (
            {"uri": f"tcp:127.0.0.1:{port}"},
            {"uri": f"tcp:[::1]:{port}", "detach": True},
            {"uri": f"tcp:localhost:{port}"},
            {"uri": f"tcp:nowhere.invalid:{port}"},
            {"uri": f"tcp::{port}"},
            {"uri": f"tcp:0:{port}"},
            {"uri": "tcp:127.0.0.1:0"},
            {"channels": [{"channel-type": "main", "addr": addr}]},
        ):
            answer = await same(ends, arguments)
            assert answer["status"] in ("failed", None), arguments
        for lanes in ("multifd", "postcopy-preempt"):
            for end in ends:
                if lanes == "postcopy-preempt":
                    await bare.set_capabilities(end.qmp, "postcopy-ram")
                await bare.set_capabilities(end.qmp, lanes)
            answer = await same(ends, {"uri": f"tcp:127.0.0.1:{port}"})
            assert "Connection refused" in answer["error"]
            for end in ends:
                off = {"capability": lanes, "state": False}
                await end.qmp.execute("migrate-set-capabilities", {"capabilities": [off]})


def dials(port: int) -> bool:
    """Whether anybody on this host waits for an answer from that port."""
    return any(row.state == SYN_SENT and row.remote[1] == port for row in tcp_sockets())


@pytest.mark.parametrize("binary", BINARIES)
async def test_an_address_that_does_not_answer_holds_nobody_up(tmp_path: Path, binary: str) -> None:
    """And is dialled no more once the migration is cancelled; then a second one has its own way."""
    with socket.socket() as server, contextlib.ExitStack() as fillers:
        server.bind(("127.0.0.1", 0))
        server.listen(0)  # a full queue: the kernel answers no SYN
        fillers.enter_context(socket.create_connection(server.getsockname()))
        uri = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        async with at(tmp_path, binary, "vm") as end, connect(end.address, name="another") as another:
            since = len(end.qmp.events)
            with trio.fail_after(60):
                assert await end.qmp.execute("migrate", {"uri": uri}) == {}
                assert await bare.migration_status(another) == "setup"
                with pytest.raises(QmpError, match="process in progress"):
                    await another.execute("migrate", {"uri": uri})
                # It is dialled yet: nobody has waited for the end of that.
                assert dials(server.getsockname()[1])
                await another.execute("migrate_cancel")
                await end.qmp.wait_migration("cancelled", since=since)
            assert end.statuses(since) == ["setup", "cancelling", "cancelled"]
            with trio.fail_after(20):
                while dials(server.getsockname()[1]):
                    await trio.sleep(0.01)
            fillers.close()
            server.accept()[0].close()
            server.settimeout(1.5)  # a SYN that was still in the air would be sent again by now
            with pytest.raises(TimeoutError):
                server.accept()
            assert "refused" in (await told(end, {"uri": f"tcp:127.0.0.1:{free_port()}"}))["error"]


@pytest.mark.parametrize("binary", BINARIES)
async def test_of_several_addresses_the_one_that_is_there_is_found(tmp_path: Path, binary: str) -> None:
    """And a peer that takes a connection and closes it fails the migration, as at a bare QEMU."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # localhost is ::1 too
        async with both(tmp_path, binary) as ends, trio.open_nursery() as nursery:

            async def close_all() -> None:
                while True:
                    (await trio.to_thread.run_sync(server.accept, abandon_on_cancel=True))[0].close()

            nursery.start_soon(close_all)
            for end in ends:
                await bare.set_capabilities(end.qmp, "return-path")  # else it is not told of the end
            answers = [await told(end, {"uri": f"tcp:localhost:{server.getsockname()[1]}"}) for end in ends]
            assert answers[0]["reply"] == answers[1]["reply"] == {}
            # How far it comes before it sees the end is a race, at a bare one too.
            words = [[word for word in answer["events"] if word != "device"] for answer in answers]
            assert words[0] == words[1]
            assert answers[0]["status"] == answers[1]["status"]
            nursery.cancel_scope.cancel()
