"""When the local leg of a lost channel is closed."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from tests.unit.channel import streams

from refault.channel.relay import LegState, Relay
from refault.daemon.known.counters import Counters
from refault.daemon.known.course import Course
from refault.daemon.known.patience import Patience
from refault.daemon.near.kept_ends import KeptEnds
from refault.daemon.near.local import Executes, LocalLeg
from refault.daemon.relayed import losses
from refault.daemon.relayed.channels import Channels
from refault.daemon.relayed.closing import PREEMPT_WAKES_WITHIN, Closing
from refault.daemon.relayed.losses import Losses
from refault.migration.legs import UNTIL_LOADED, WAITS_FOR_PONG
from refault.migration.messages import RESUME_ACK
from refault.migration.phase import Phase, Role
from refault.migration.recovery import State
from refault.migration.relayable import Lanes


def course(vm: Any, role: Role, status: str = "postcopy-recover", *, postcopy_began: bool = True) -> Course:
    """In a recovery handshake, of a migration with a preempt lane."""
    vm.name, vm.patience, vm.alternatives, vm.counters = "vm", Patience(), (), Counters()
    vm.session_allowed, vm.encrypted = False, getattr(vm, "encrypted", False)
    made = Course(vm, role, None, Lanes(preempt=True))
    made.policy.state = State.HANDSHAKE
    made.is_found(status)
    if postcopy_began:
        made.postcopy_begins()
    return made


def channels_of(course: Course, relay: Relay) -> Channels:
    channels = Channels(course, relay)
    Losses(course, channels)
    return channels


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay(Role.DESTINATION)
    yield relay
    if not relay.closed:
        relay.close()


@contextmanager
def joined(channels: Channels, *, recovered: bool) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A channel; QEMU's end of it and the other host's."""
    ours, qemu = socket.socketpair()
    host, far = socket.socketpair()
    with qemu, host:
        channels.join(LocalLeg("end", ours, 0), trio.socket.from_stdlib_socket(far), recovered=recovered)
        yield qemu, host


async def test_a_resume_ack_that_comes_behind_the_loss_is_noticed(
    nursery: trio.Nursery, relay: Relay
) -> None:
    vm = SimpleNamespace(monitor=None, version=(10, 0, 0), start_soon=nursery.start_soon)
    channels = channels_of(course(vm, Role.DESTINATION), relay)
    nursery.start_soon(channels.watch)
    with joined(channels, recovered=True) as (qemu, host):
        channels.closing.gives_preempt(channels.channel)
        host.close()
        with trio.fail_after(9):
            while not relay.look().far.lost:
                await trio.sleep(0.01)
            channels.look()
            await trio.sleep(0.05)
            qemu.sendall(RESUME_ACK)
        began = trio.current_time()
        with trio.fail_after(PREEMPT_WAKES_WITHIN + 20):
            while relay.look().local is LegState.OPEN:
                await trio.sleep(0.01)
        assert trio.current_time() - began > PREEMPT_WAKES_WITHIN * 0.9
        channels.close()


async def test_the_end_of_refault_waits_no_longer_for_a_source_that_ends_its_channel_itself(
    nursery: trio.Nursery,
) -> None:
    relay = Relay(Role.SOURCE)

    async def says(*_: str) -> tuple[dict[str, str], dict[str, str]]:
        return {"status": WAITS_FOR_PONG}, {}

    vm = SimpleNamespace(
        monitor=None,
        version=(11, 1, 0),
        encrypted=False,
        start_soon=nursery.start_soon,
        query_both=says,
    )
    channels = channels_of(course(vm, Role.SOURCE), relay)
    nursery.start_soon(channels.watch)
    with joined(channels, recovered=False) as (qemu, _):
        qemu.sendall(streams.HEADER + streams.configuration() + streams.packaged(streams.command(5)))
        with trio.fail_after(9):
            while channels.phase is not Phase.SWITCHOVER:
                await trio.sleep(0.01)
            async with trio.open_nursery() as ending:
                ending.start_soon(channels.prepare_to_stop)
                while not relay.look().far.lost:
                    await trio.sleep(0.01)
                await trio.sleep(0.1)
                assert relay.look().local is LegState.OPEN
                qemu.close()
        channels.close()


async def test_a_source_that_cannot_be_read_is_let_write_on_until_it_takes_note_of_what_it_heard(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "SIPS", 1000)  # a busy machine's takes less of each
    relay = Relay(Role.SOURCE)
    status = WAITS_FOR_PONG

    async def says(*_: str) -> tuple[dict[str, object], dict[str, str]]:
        return {"status": status, "ram": {"remaining": 1 << 30}}, {}

    async def writes(qemu: trio.SocketStream) -> None:
        nonlocal status
        await qemu.send_all(b"\x16\x03\x01" + bytes(32 << 20))
        status = "postcopy-active"
        await trio.sleep_forever()

    vm = SimpleNamespace(
        monitor=None, version=(11, 1, 0), encrypted=False, start_soon=nursery.start_soon, query_both=says
    )
    channels = channels_of(course(vm, Role.SOURCE), relay)
    nursery.start_soon(channels.watch)
    with joined(channels, recovered=False) as (qemu, host), trio.fail_after(30):
        async with trio.SocketStream(trio.socket.from_stdlib_socket(qemu.dup())) as stream:
            nursery.start_soon(writes, stream)
            received = bytearray(1 << 20)
            for _ in range(30):
                await trio.to_thread.run_sync(host.recv_into, received, len(received), socket.MSG_WAITALL)
            await trio.sleep(0.1)
            assert status == WAITS_FOR_PONG  # it stands in its write
            host.close()
            while relay.look().local is LegState.OPEN:
                await trio.sleep(0.01)
        assert channels.held is None
        channels.close()


async def test_a_destination_that_has_all_ends_its_channel_and_that_is_no_loss_though_it_cannot_be_read(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    relay = Relay(Role.SOURCE)
    asked, status = 0, "postcopy-active"

    async def says(*_: str) -> tuple[dict[str, object], dict[str, str]]:
        nonlocal asked
        asked += 1
        return {"status": status, "ram": {"remaining": 0}}, {}

    vm = SimpleNamespace(
        monitor=None, version=(11, 1, 0), encrypted=True, start_soon=nursery.start_soon, query_both=says
    )
    channels = channels_of(course(vm, Role.SOURCE), relay)
    nursery.start_soon(channels.watch)
    with joined(channels, recovered=False) as (qemu, host), trio.fail_after(10):
        channels.answered()
        qemu.sendall(b"\x16\x03\x01" + bytes(4096))
        while not channels.unread:
            await trio.sleep(0.01)
        host.close()
        while asked < 2:
            await trio.sleep(0.01)
        status = "completed"  # it has read why
        while relay.look().local is LegState.OPEN:
            await trio.sleep(0.01)
        assert "ALERT" not in caplog.text
        channels.close()


@pytest.mark.parametrize("status", ["device", "postcopy-device", "postcopy-active"])
async def test_a_source_whose_status_is_beyond_the_tls_handshake_is_not_taken_to_be_in_it(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """Its answer was to tell that, and the channel was lost before it was handed on."""
    relay = Relay(Role.SOURCE)

    async def says(*_: str) -> tuple[dict[str, object], dict[str, object]]:
        return {"status": WAITS_FOR_PONG, "ram": {"remaining": 1 << 30}}, {}

    vm = SimpleNamespace(
        monitor=None, version=(11, 1, 0), encrypted=True, start_soon=nursery.start_soon, query_both=says
    )
    source = course(vm, Role.SOURCE, "setup", postcopy_began=False)
    channels = channels_of(source, relay)
    monkeypatch.setattr(channels.guard, "start", lambda **_: None)
    nursery.start_soon(channels.watch)
    with joined(channels, recovered=False) as (qemu, host), trio.fail_after(30):
        qemu.sendall(b"\x16\x03\x01" + bytes(4096))
        while not channels.unread:
            await trio.sleep(0.01)
        host.close()
        while not relay.look().far.lost:
            await trio.sleep(0.01)
        source.on_event(status)
        while not channels.held:
            assert relay.look().local is LegState.OPEN
            await trio.sleep(0.01)
        assert channels.held.endswith(UNTIL_LOADED.effect)
        channels.close()


@pytest.mark.timeout(10)
async def test_a_leg_that_qemu_has_made_blocking_is_read_without_waiting_for_it(
    nursery: trio.Nursery, relay: Relay
) -> None:
    """It is passed our end (kept_ends.py), and the flag is the open file's, which is ours too."""
    ours, qemu = socket.socketpair()
    kept = KeptEnds(cast(Executes, None))
    kept.begin(ours)
    with ours, qemu:
        nursery.start_soon(Closing(cast(Course, None), relay, kept).swallow)
        await trio.testing.wait_all_tasks_blocked()
        ours.setblocking(True)
        qemu.send(b"all that there is")
        with trio.fail_after(9):
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    kept.drop()


class Holder:
    """A QEMU that holds what it is given."""

    name = "vm1"

    def __init__(self) -> None:
        self.held: list[str] = []

    async def execute(self, command: str, arguments: dict[str, str], **_: object) -> object:
        {"getfd": self.held.append, "closefd": self.held.remove}[command](arguments["fdname"])
        return {}


@pytest.mark.parametrize("requests", [0, 5])
async def test_the_end_of_refault_waits_for_a_source_that_cannot_be_read_and_is_soon_to_hear(
    nursery: trio.Nursery, requests: int
) -> None:
    relay = Relay(Role.SOURCE)
    status, remaining = WAITS_FOR_PONG, 200 << 20

    async def says(*_: str) -> tuple[dict[str, object], dict[str, object]]:
        ram = {"remaining": remaining, "mbps": 8000.0, "postcopy-requests": requests}
        return {"status": status, "ram": ram}, {"downtime-limit": 300}

    vm = SimpleNamespace(
        monitor=Holder(), version=(11, 1, 0), encrypted=False, start_soon=nursery.start_soon, query_both=says
    )
    channels = channels_of(course(vm, Role.SOURCE, status=WAITS_FOR_PONG), relay)
    nursery.start_soon(channels.watch)
    with joined(channels, recovered=False) as (qemu, host), trio.fail_after(9):
        qemu.sendall(b"\x16\x03\x01" + bytes(4096))
        while not channels.unread:
            await trio.sleep(0.01)
        assert not await channels.prepare_to_stop()
        assert len(vm.monitor.held) == 1  # should we be killed while we wait
        status, remaining = "postcopy-active", 100 << 30
        assert await channels.prepare_to_stop()
        assert vm.monitor.held == []  # its leg may end now, and it is to see that
        host.close()
        channels.close()


@pytest.mark.parametrize("role", list(Role))
async def test_the_end_of_refault_waits_until_the_end_of_a_precopy_has_been_passed_on(
    nursery: trio.Nursery, role: Role
) -> None:
    """Its source has completed, and nobody sends it again."""

    async def says(*_: str) -> tuple[dict[str, str], dict[str, str]]:
        return {"status": "completed"}, {}

    relay = Relay(role)
    vm = SimpleNamespace(
        monitor=None, version=(10, 0, 0), encrypted=False, start_soon=lambda *_: None, query_both=says
    )
    channels = channels_of(course(vm, role, status="completed", postcopy_began=False), relay)
    nursery.start_soon(channels.watch)
    with joined(channels, recovered=False) as ends, trio.fail_after(9):
        begins, reads = ends if role is Role.SOURCE else ends[::-1]
        begins.setblocking(False)
        sent = begins.send(streams.HEADER + streams.configuration())
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += begins.send(bytes(1 << 16))
                await trio.sleep(0.005)
        begins.close()
        assert not await channels.prepare_to_stop()
        channels.hold(Phase.POSTCOPY, UNTIL_LOADED)
        assert not channels.delivers  # it may be no precopy, and QEMU is to keep our end
        channels.hold_no_more()
        received = 0
        while chunk := await trio.to_thread.run_sync(reads.recv, 1 << 20):
            received += len(chunk)
            if received == sent:
                reads.shutdown(socket.SHUT_RDWR)
        assert received == sent
        while not await channels.prepare_to_stop():
            await trio.sleep(0.01)
    channels.close()
