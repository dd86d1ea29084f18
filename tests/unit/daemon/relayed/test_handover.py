"""What QEMU holds of a channel for the next refault: when it lets go of it, and its end if none comes."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
import trio
from tests.support.exhausted import exhausted
from tests.support.hidden import hidden
from tests.unit.channel.test_handed import cut_off, session
from tests.unit.channel.test_session import until
from tests.unit.daemon.record.test_session_file import ABOUT
from tests.unit.daemon.relayed.test_closing import channels_of, course

from refault.channel.relay import LegState, Relay, SessionState
from refault.daemon.host.errors import OperatorError
from refault.daemon.kernel.process import process_started
from refault.daemon.known.course import Course
from refault.daemon.near.handed_leg import identity_of, take
from refault.daemon.near.kept_ends import KeptEnds
from refault.daemon.near.local import LocalLeg
from refault.daemon.record.session_file import NO_LEG
from refault.daemon.record.state_file import MigrationRecord, StateFile
from refault.daemon.relayed import channels as channels_module
from refault.daemon.relayed import losses
from refault.daemon.relayed.channels import Channels
from refault.daemon.relayed.closing import Closing
from refault.daemon.relayed.guard import Guard
from refault.daemon.relayed.handover import HandOver, release
from refault.migration.legs import ENDED_WITHOUT, SENT_ALL
from refault.migration.messages import message
from refault.migration.phase import Passed, Phase, Role
from refault.migration.recovery import State
from refault.migration.relayable import NO_LANES


@dataclass
class Left:
    """A leg that a process holds, this one, and what is on record of it."""

    directory: Path
    qemu: socket.socket
    held: socket.socket

    def write(self, *, may_end: bool) -> Path:
        state = StateFile(self.directory, "vm")
        leg = identity_of(self.held)
        state.save(
            MigrationRecord(
                role=Role.SOURCE,
                uri="tcp:127.0.0.1:1",
                relayed=True,
                qemu_pid=os.getpid(),
                qemu_started=process_started(os.getpid()),
                generation="one",
                leg=leg,
                handed="first",
            )
        )
        about = msgspec.structs.replace(ABOUT, leg=leg[1], runs_told=False, status="active", may_end=may_end)
        with state.session.reserved(4096) as write:
            write(about, b"channel")
        return state.session.path

    @property
    def lives(self) -> bool:
        try:
            return self.qemu.recv(1, socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True


def meets_a_leg(known: Course, *, postcopy: bool) -> None:
    """What an earlier refault wrote, of whose channel QEMU holds the leg."""
    known.meets(
        postcopy=postcopy,
        awaited=False,
        stopped_by_switchover=False,
        kept=("kept",),
        further=(),
        session=None,
        leg=(1, b""),
    )


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Left]:
    qemu, held = socket.socketpair()
    with qemu, held:
        yield Left(tmp_path, qemu, held)


def test_one_that_may_end_is_ended_and_forgotten(left: Left) -> None:
    left.write(may_end=True)
    assert release(left.directory, "vm")
    assert not left.lives
    assert list(left.directory.iterdir()) == []
    assert not release(left.directory, "vm")


def test_it_is_ended_before_it_is_forgotten(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a kill between would leave QEMU with a leg of which nobody knows."""
    left.write(may_end=True)
    lives: list[bool] = []
    monkeypatch.setattr(StateFile, "remove", lambda _: lives.append(left.lives))
    assert release(left.directory, "vm")
    assert lives == [False]


def test_one_whose_end_might_cost_a_guest_stays(left: Left) -> None:
    written = left.write(may_end=False)
    with pytest.raises(OperatorError, match="start refault once"):
        release(left.directory, "vm")
    assert left.lives
    assert written.exists()


def test_where_it_is_not_known_it_stays(left: Left) -> None:
    left.write(may_end=True).write_bytes(b"torn")
    with pytest.raises(OperatorError, match="start refault once"):
        release(left.directory, "vm")
    assert left.lives


@pytest.mark.parametrize("prevents", [hidden, exhausted])
def test_where_qemu_cannot_be_looked_at_it_is_not_said_that_there_is_none(
    left: Left, prevents: Callable[[], AbstractContextManager[None]]
) -> None:
    record = left.write(may_end=True)
    with prevents():
        leg = identity_of(left.held)
        with pytest.raises(OSError, match=r"CAP_SYS_PTRACE|Too many open files"):
            take(os.getpid(), process_started(os.getpid()), leg)
    with hidden(), pytest.raises(OperatorError, match="CAP_SYS_PTRACE"):
        release(left.directory, "vm")
    assert left.lives
    assert record.exists()


def test_one_of_a_qemu_of_which_it_was_not_told_since_when_it_runs_is_found(left: Left) -> None:
    taken = take(os.getpid(), None, identity_of(left.held))
    assert taken is not None
    taken.close()


def test_one_that_nobody_holds_any_more_is_none(left: Left) -> None:
    left.write(may_end=True)
    left.held.close()
    assert not release(left.directory, "vm")


def test_a_record_without_one_is_none(tmp_path: Path) -> None:
    assert not release(tmp_path, "vm")
    record = MigrationRecord(role=Role.SOURCE, uri="", relayed=True, qemu_pid=os.getpid(), qemu_started=None)
    (tmp_path / "vm.migration.json").write_bytes(msgspec.json.encode(record))
    assert not release(tmp_path, "vm")


async def test_qemu_lets_go_of_the_leg_once_a_source_in_postcopy_is_known_not_to_be_at_its_end(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Did a kill end it there, 10.0 and 11.1 would run the guest again."""
    monkeypatch.setattr(channels_module, "ASKED_EVERY", 0.01)
    closed: list[str] = []

    async def execute(command: str, arguments: dict[str, str], **_: object) -> object:
        closed.append(arguments["fdname"])
        return {}

    async def says(*_: str) -> tuple[dict[str, object], dict[str, str]]:
        return {"status": "postcopy-active", "ram": {"remaining": 1 << 40}}, {}

    monitor = SimpleNamespace(name="vm", execute=execute)
    vm = SimpleNamespace(
        monitor=monitor, version=(10, 0, 0), encrypted=False, start_soon=nursery.start_soon, query_both=says
    )
    with session() as world:
        pump = world.of(Role.SOURCE).hand_over()
        assert pump is not None
        about = msgspec.structs.replace(ABOUT, laid=("laid",))
        known = course(vm, Role.SOURCE, "postcopy-active")
        meets_a_leg(known, postcopy=True)
        channels = channels_of(known, Relay(Role.SOURCE))
        leg = LocalLeg("", world.held[Role.SOURCE].dup(), 0)
        assert channels.go_on(leg, (about, pump))
        await trio.sleep(0.05)
        assert closed == []
        await channels.word.ask()
        with trio.fail_after(9):
            while known.leg_before is not None:
                await trio.sleep(0.001)
        assert closed == ["kept", "laid"]
        assert known.kept_before == ()
        channels.close()


Says = Callable[[str], object]


@asynccontextmanager
async def torn(
    nursery: trio.Nursery, says: Says, *, status: str = "device"
) -> AsyncIterator[tuple[Channels, socket.socket]]:
    """A source in precopy of whose channel the refault before has left the leg alone; QEMU's end of that."""

    async def query(command: str) -> object:
        return says(command)

    async def query_both(first: str, second: str) -> tuple[object, object]:
        return says(first), says(second)

    async def execute(*_: object, **__: object) -> object:
        return {}

    vm = SimpleNamespace(
        monitor=SimpleNamespace(name="vm", execute=execute),
        version=(10, 0, 0),
        start_soon=nursery.start_soon,
        query=query,
        query_both=query_both,
    )
    known = course(vm, Role.SOURCE, status, postcopy_began=False)
    known.policy.state = State.RUNNING
    meets_a_leg(known, postcopy=False)
    channels = channels_of(known, Relay(Role.SOURCE))
    ours, qemu = socket.socketpair()
    with qemu:
        channels.go_on(LocalLeg("", ours, 0), None)
        nursery.start_soon(channels.watch)
        try:
            yield channels, qemu
        finally:
            channels.close()


@pytest.mark.parametrize("status", ["active", "device"])
async def test_a_source_that_has_sent_all_in_precopy_is_held_though_nothing_of_its_channel_is_left(
    status: str, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Did its leg end, it would run its guest again, and the destination may run it. Not in the hands of the
    next refault either, and not for longer than it is so."""
    monkeypatch.setattr(losses, "ASKED_EVERY", 0.01)
    running = False

    def says(command: str) -> object:
        if command == "query-status":
            return {"running": running}
        return {"status": status, "ram": {"remaining": 0}}

    async with torn(nursery, says, status=status) as (channels, _):
        with trio.fail_after(5):
            while channels.held is None:
                await trio.sleep(0.001)
        assert channels.phase is Phase.COMPLETING
        assert channels.cost_of_stopping() == (False, SENT_ALL.effect)
        assert channels.relay.look().local is LegState.OPEN
        running = True
        with trio.fail_after(5):
            while channels.relay.look().local is LegState.OPEN:
                await trio.sleep(0.001)


def sent_all(command: str) -> object:
    """What such a source says."""
    if command == "query-status":
        return {"running": False}
    return {"status": "device", "ram": {"remaining": 0}}


async def test_qemu_holds_the_leg_of_one_that_has_sent_all_so_that_no_kill_of_refault_ends_it(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "ASKED_EVERY", 0.01)
    async with torn(nursery, sent_all) as (channels, _):
        with trio.fail_after(5):
            while not channels.kept.by_qemu:
                await trio.sleep(0.001)
        assert channels.held is not None


async def test_qemu_does_not_let_go_of_the_leg_before_it_is_known_whether_a_source_in_precopy_has_sent_all(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels_module, "ASKED_EVERY", 0.01)
    remaining = 0
    closed: list[str] = []

    async def execute(command: str, arguments: dict[str, str], **_: object) -> object:
        if command == "closefd":
            closed.append(arguments["fdname"])
        return {}

    async def query(_: str) -> object:
        return {"running": False}

    async def says(*_: str) -> tuple[dict[str, object], dict[str, str]]:
        return {"status": "device", "ram": {"remaining": remaining}}, {}

    vm = SimpleNamespace(
        monitor=SimpleNamespace(name="vm", execute=execute),
        version=(10, 0, 0),
        start_soon=nursery.start_soon,
        query_both=says,
        query=query,
    )
    with session() as world:
        world.both.from_qemu.sendall(b"this is no migration")
        until(lambda: world.of(Role.SOURCE).opaque_reason() is not None, "it is read")
        pump = world.of(Role.SOURCE).hand_over()
        assert pump is not None
        known = course(vm, Role.SOURCE, "device", postcopy_began=False)
        meets_a_leg(known, postcopy=False)
        channels = channels_of(known, Relay(Role.SOURCE))
        leg = LocalLeg("", world.held[Role.SOURCE].dup(), 0)
        about = msgspec.structs.replace(ABOUT, runs_told=False, status="device")
        assert channels.go_on(leg, (about, pump))
        await trio.sleep(0.05)
        assert closed == []
        await channels.word.ask()
        await trio.sleep(0.05)
        assert closed == []
        channels.look()  # nor does a kill end the leg by which the next channel goes on
        with trio.fail_after(5):
            while not channels.kept.by_qemu:
                await trio.sleep(0.001)
        remaining = 1 << 40
        await channels.word.ask()
        with trio.fail_after(9):
            while known.leg_before is not None:
                await trio.sleep(0.001)
        assert closed == ["kept"]
        channels.close()


async def test_the_leg_of_one_that_has_sent_all_is_closed_once_its_destination_has_ended_without_the_guest(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "ASKED_EVERY", 0.01)
    async with torn(nursery, sent_all) as (channels, _):
        with trio.fail_after(5):
            while channels.held is None:
                await trio.sleep(0.001)
        for channel in (2, 1):  # the one of another channel says nothing of this one
            view = SimpleNamespace(broke_there=True, channel=channel, rings=0, lost_for=None)
            monkeypatch.setattr(channels.relay, "session", lambda view=view: view)
            assert channels.cost_of_stopping() == (
                (True, ENDED_WITHOUT.effect) if channel == 1 else (False, SENT_ALL.effect)
            )
        with trio.fail_after(5):
            while channels.relay.look().local is LegState.OPEN:
                await trio.sleep(0.001)
        assert channels.held is None


@pytest.mark.parametrize("writes", [False, True])
async def test_one_that_answers_nobody_is_held_unless_it_has_more_to_send(
    writes: bool, nursery: trio.Nursery
) -> None:
    """It may be slow. While it writes what nobody reads the destination cannot have all."""

    def says(command: str) -> object:
        raise trio.TooSlowError

    async with torn(nursery, says) as (channels, qemu):
        if writes:
            qemu.send(b"more")
        with trio.fail_after(5):
            while channels.held is None and channels.relay.look().local is not LegState.CLOSED:
                await trio.sleep(0.001)
        assert (channels.held is None) is writes


async def test_a_channel_in_the_recovery_handshake_is_not_given_to_qemu(tmp_path: Path) -> None:
    """Were refault killed then, the next one would take it for one in postcopy; 7.2 does not survive that."""
    ours, qemu = socket.socketpair()
    carried = SimpleNamespace(state=SessionState.CARRIED, has_leg=True)
    vm = SimpleNamespace(encrypted=False, qemu_pid=os.getpid(), state_file=StateFile(tmp_path, "vm"))
    given: list[bool] = []

    async def give() -> None:
        given.append(True)

    for acknowledged in (False, True):
        passed = Passed(resumed=True, resume_acknowledged=acknowledged)
        handover = HandOver(
            cast(
                Course,
                SimpleNamespace(
                    name="vm",
                    vm=vm,
                    role=Role.SOURCE,
                    status="postcopy-recover",
                    lanes=SimpleNamespace(count=0),
                    remember=lambda: None,
                ),
            ),
            cast(
                Relay, SimpleNamespace(closed=False, session=lambda: carried, passed=lambda now=passed: now)
            ),
            cast(KeptEnds, SimpleNamespace(main=ours, by_qemu=False)),
            cast(Guard, SimpleNamespace(give=give)),
            cast(Closing, None),
        )
        await handover.prepare()
        assert given == ([True] if acknowledged else [])
    ours.close()
    qemu.close()


def prepared(known: Course, relay: Relay, held: socket.socket) -> HandOver:
    """A hand-over whose leg QEMU holds, which is on record."""
    handover = HandOver(
        known,
        relay,
        cast(KeptEnds, SimpleNamespace(main=held, by_qemu=True)),
        cast(Guard, None),
        cast(Closing, SimpleNamespace(peer_inode=0)),
    )
    handover.leg = identity_of(held)
    known.vm.state_file.save(
        MigrationRecord(
            role=known.role,
            uri="",
            relayed=True,
            qemu_pid=None,
            qemu_started=None,
            leg=handover.leg,
            handed=handover.handed,
        )
    )
    return handover


async def test_the_next_refault_is_told_what_lies_with_qemu_unused(tmp_path: Path) -> None:
    state = StateFile(tmp_path, "vm")
    with session() as world:
        held = world.held[Role.SOURCE]
        leg = identity_of(held)
        known = course(SimpleNamespace(state_file=state), Role.SOURCE, "active")
        handover = prepared(known, world.of(Role.SOURCE), held)
        handover.hand_over("one", delivers=False, may_close=True, laid=("laid",))
    about = state.session.look("one", leg[1], handover.handed)
    assert about is not None
    assert about.laid == ("laid",)


async def test_what_a_destination_says_last_is_handed_over_though_it_ends_its_leg_just_then(
    tmp_path: Path,
) -> None:
    """By the leg that is on record, for nobody looks for anything else."""
    state = StateFile(tmp_path, "vm")
    shut = message(1, bytes(4))
    with session() as world:
        relay, held = world.of(Role.DESTINATION), world.held[Role.DESTINATION]
        cut_off(world)
        known = course(SimpleNamespace(state_file=state, qemu_pid=None), Role.DESTINATION, "active")
        known.has(NO_LANES)
        handover = prepared(known, relay, held)
        delivers = handover.delivers
        known.is_found("completed")
        world.both.to_qemu.sendall(shut)
        world.both.to_qemu.close()
        until(lambda: relay.look().local is not LegState.OPEN, "it has not ended")
        handover.hand_over("one", delivers=delivers, may_close=False, laid=())
        assert handover.done
        relay.close()
        left = state.session.take("one", identity_of(held)[1], handover.handed)
        assert left is not None
        world.both.destination = Relay(Role.DESTINATION)
        assert world.both.destination.go_on(held.dup().detach(), left[1], recovered=False)
        assert world.both.join()
        assert world.both.from_qemu.recv(len(shut)) == shut


async def test_what_lies_unused_with_a_qemu_that_has_completed_is_told_too(tmp_path: Path) -> None:
    state = StateFile(tmp_path, "vm")
    with session() as world:
        relay = world.of(Role.DESTINATION)
        cut_off(world)
        known = course(SimpleNamespace(state_file=state), Role.DESTINATION, "completed")
        handover = prepared(known, relay, world.held[Role.DESTINATION])
        world.both.to_qemu.close()
        until(lambda: relay.look().local is not LegState.OPEN, "it has not ended")
        handover.hand_over("one", delivers=True, may_close=False, laid=("laid",))
    about = state.session.look("one", NO_LEG, handover.handed)
    assert about is not None
    assert about.laid == ("laid",)


@pytest.mark.parametrize(
    ("role", "unread", "runs", "may_end"),
    [
        (Role.SOURCE, False, False, True),
        (Role.SOURCE, True, False, False),  # its STOP may have come while no refault was there
        (Role.DESTINATION, False, False, True),
        (Role.DESTINATION, True, False, False),  # it may be in the switchover by now
        (Role.DESTINATION, True, True, True),
    ],
)
async def test_a_leg_may_be_ended_by_hand_only_where_no_old_word_of_qemu_says_so(
    role: Role, unread: bool, runs: bool, may_end: bool, tmp_path: Path
) -> None:
    state = StateFile(tmp_path, "vm")
    with session() as world:
        relay, held = world.of(role), world.held[role]
        if unread:
            world.both.from_qemu.sendall(b"this is no migration")
            until(lambda: relay.opaque_reason() is not None, "it is read")
        if runs:
            relay.guest_runs()
        known = course(SimpleNamespace(state_file=state), role, "active", postcopy_began=False)
        leg = identity_of(held)
        handover = prepared(known, relay, held)
        handover.hand_over("one", delivers=False, may_close=True, laid=())
    about = state.session.look("one", leg[1], handover.handed)
    assert about is not None
    assert about.may_end is may_end
