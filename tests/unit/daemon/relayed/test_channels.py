"""What is counted of a lost channel."""

from __future__ import annotations

import dataclasses
import math
import socket
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from refault.channel.relay import LegState, Relay, RelayView, SessionEnd, SessionState, SessionView
from refault.daemon.kernel.process import process_started
from refault.daemon.known.counters import Counters
from refault.daemon.known.course import Course
from refault.daemon.known.patience import Patience
from refault.daemon.monitor.monitor import MonitorLost
from refault.daemon.near.local import LocalLeg
from refault.daemon.relayed.channels import Channels
from refault.daemon.relayed.session_waits import SessionWaits
from refault.migration.legs import UNTIL_LOADED
from refault.migration.phase import Passed, Phase, Role
from refault.migration.relayable import Lanes


class Pump:
    """A relay of which only the picture counts."""

    closed = False

    def __init__(self) -> None:
        zeros = dict.fromkeys((field.name for field in dataclasses.fields(RelayView)), cast(Any, 0))
        self.view = RelayView(**zeros | {"local": LegState.CLOSED, "far": LegState.CLOSED})
        self.may_replay: list[bool] = []

    def look(self) -> RelayView:
        return self.view

    def sessions(self) -> list[SessionView]:
        return []

    def session(self) -> SessionView | None:
        return None

    def attach(self, local: int, far: int, *, may_replay: bool, **_: object) -> None:
        self.may_replay.append(may_replay)
        for fd in (local, far):
            socket.socket(fileno=fd).close()

    def replays(self) -> None:
        self.view = dataclasses.replace(
            self.view, replayed=self.view.replayed + 1, last_replay_ns=time.monotonic_ns()
        )


def course(role: Role = Role.SOURCE, *, session_allowed: bool = False) -> Course:
    vm = SimpleNamespace(name="vm", monitor=None, patience=Patience(), alternatives=(), counters=Counters())
    vm.encrypted, vm.session_allowed = False, session_allowed
    return Course(cast(Any, vm), role, None)


def recover(channels: Channels, *, recovered: bool = True) -> None:
    local, far = socket.socketpair()
    channels.join(LocalLeg("end", local, 0), trio.socket.from_stdlib_socket(far), recovered=recovered)


async def test_the_replay_is_doubted_when_two_channels_are_lost_right_after_theirs() -> None:
    pump = Pump()
    channels = Channels(course(), cast(Relay, pump))
    recover(channels)
    pump.replays()
    channels.count_loss()
    recover(channels)
    channels.count_loss()  # without one on this channel: a huge page was cut (replay.h), say
    recover(channels)
    assert pump.may_replay == [True, True, True]
    pump.replays()
    channels.count_loss()
    recover(channels)
    assert pump.may_replay.pop() is False
    channels.kept.drop()


async def test_that_an_arrival_is_awaited_is_written_down_as_the_channel_is_made() -> None:
    """For QEMU 10.0 says nothing that is written down before all device state has left it."""
    written: list[bool] = []
    migration = course()
    channels = Channels(migration, Relay(Role.SOURCE))
    migration.remember = lambda: written.append(channels.awaits_arrival)
    recover(channels, recovered=False)
    assert written == [True]
    channels.kept.drop()
    channels.relay.close()


async def test_an_error_in_one_look_does_not_end_the_watch(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    relay = Relay(Role.SOURCE)
    channels = Channels(course(), relay)
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise KeyError("of ours")
        channels.changed.set()

    monkeypatch.setattr(channels, "look", look)
    nursery.start_soon(channels.watch)
    recover(channels)
    with trio.fail_after(9):
        while looks == 0:
            await trio.sleep(0.01)
        channels.lose(1, OSError("gone"))
        await channels.changed.wait()
    assert "internal error in what the channel tells" in caplog.text
    nursery.cancel_scope.cancel()
    relay.close()
    channels.kept.drop()


@pytest.mark.parametrize(
    ("role", "had", "end"),
    [
        (Role.SOURCE, None, SessionEnd.DIALS),  # where it is offered: its refault may have been killed since
        (Role.DESTINATION, None, SessionEnd.NO),  # who comes may be a bare QEMU
        (Role.DESTINATION, b"an id", SessionEnd.ANSWERS),
    ],
)
def test_a_channel_that_recovers_is_offered_as_a_session_where_there_has_been_one(
    role: Role, had: bytes | None, end: SessionEnd
) -> None:
    of = course(role, session_allowed=True)
    of.session = had
    channels = Channels(of, cast(Relay, Pump()))
    recover(channels)
    assert channels.session is end
    channels.kept.drop()


@pytest.mark.parametrize(
    ("role", "return_path", "lanes", "end"),
    [
        (Role.SOURCE, True, 0, SessionEnd.DIALS),
        (Role.SOURCE, False, 0, SessionEnd.NO),
        (Role.DESTINATION, True, 0, SessionEnd.ANSWERS),
        (
            Role.DESTINATION,
            False,
            0,
            SessionEnd.NO,
        ),  # unlike without TLS it cannot wait for QEMU's first word
        (Role.SOURCE, True, 2, SessionEnd.NO),
        (Role.DESTINATION, True, 2, SessionEnd.NO),
    ],
)
def test_an_encrypted_channel_may_be_a_session_where_it_is_alone_and_has_a_return_path(
    role: Role, return_path: bool, lanes: int, end: SessionEnd
) -> None:
    of = course(role, session_allowed=True)
    of.vm.encrypted, of.return_path, of.lanes = True, return_path, Lanes(multifd=lanes)
    channels = Channels(of, cast(Relay, Pump()))
    recover(channels, recovered=False)
    assert channels.session is end
    channels.kept.drop()


class Between(Pump):
    """The relay of a session in postcopy whose connection is lost, as its waits look at it."""

    def passed(self) -> Passed:
        return dataclasses.replace(BEGUN, running=True)

    runs_told = False


@pytest.mark.parametrize(("role", "seconds"), [(Role.SOURCE, 0.0), (Role.DESTINATION, math.inf)])
async def test_a_source_that_has_paused_dials_for_no_session(role: Role, seconds: float) -> None:
    of = course(role)
    waits = SessionWaits(of, Channels(of, cast(Relay, Between())))
    assert waits.delivers_for() == seconds
    assert waits.seconds() == 30.0
    of.on_status("postcopy-paused")  # not all that QEMU wrote before may be taken from it yet
    assert waits.seconds() == (0.0 if role is Role.SOURCE else 30.0)


class Unread(Pump):
    """The relay of a source in postcopy that speaks TLS."""

    runs_told = False

    def passed(self) -> Passed:
        return Passed(opaque=True)


@pytest.mark.parametrize(
    ("remaining", "waits_on"),
    [
        ([20 << 20], [False]),
        ([0, 0], [True, True]),
        ([1 << 20, 1 << 20], [True, False]),  # it may be at its end, but has stopped before that and answers
        ([2 << 20, 1 << 20, 0], [True, True, True]),
        ([1 << 20, None], [True, True]),  # it answers nobody while it sends the last of it
        ([MonitorLost("it is lost with the network"), 20 << 20], [True, False]),
    ],
)
async def test_a_source_that_cannot_be_read_says_whether_it_is_at_its_end(
    remaining: list[int | MonitorLost | None], waits_on: list[bool], autojump_clock: trio.testing.MockClock
) -> None:
    left = iter(remaining)

    async def query_both(*_: str) -> tuple[object, object]:
        if (now := next(left)) is None:
            await trio.sleep_forever()
        if isinstance(now, MonitorLost):
            raise now
        return {"status": "postcopy-active", "ram": {"remaining": now}}, {}

    of = course()
    vars(of.vm)["query_both"] = query_both
    of.postcopy_begins()
    of.on_status("postcopy-active")
    waits = SessionWaits(of, Channels(of, cast(Relay, Unread())))
    assert waits.seconds() == 30.0
    assert [await waits.has_sent_all() for _ in remaining] == waits_on


class Package(Unread):
    """The same of a source in the midst of its package, which is larger than the rings have room for."""

    def session(self) -> SessionView | None:
        return cast(SessionView, SimpleNamespace(channel=1, lost_for=40.0, rings=32 << 20))


@pytest.mark.parametrize(
    ("remaining", "attached", "waits_on"),
    [
        (1 << 30, 1, False),
        (190 << 20, 1, True),  # it may have sent all of it before the loss, and since then into the rings
        (1 << 30, 2, True),  # the session was of a channel before, and this one is none
    ],
)
async def test_a_source_that_stands_in_its_package_is_given_up_when_patience_is_over(
    remaining: int, attached: int, waits_on: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """It answers nobody, and sends nothing while there is no connection, however old its last word is."""
    ram = {"remaining": remaining, "mbps": 419.4304}  # 50 MiB in a second
    silent = False

    async def query_both(*_: str) -> tuple[object, object]:
        if silent:
            await trio.sleep_forever()
        return {"status": "postcopy-active", "ram": ram}, {"downtime-limit": 0}

    of = course()
    vars(of.vm)["query_both"] = query_both
    of.postcopy_begins()
    of.on_status("postcopy-active")
    relay = Package()
    vars(relay)["attached"] = attached
    channels = Channels(of, cast(Relay, relay))
    await channels.word.ask()
    silent = True
    await trio.sleep(42)
    assert await SessionWaits(of, channels).has_sent_all() is waits_on


@pytest.mark.parametrize(("remaining", "waits_on"), [(0, True), (1 << 20, False), (None, True)])
async def test_a_source_whose_stop_nobody_heard_waits_on_once_it_has_sent_all(
    remaining: int | None, waits_on: bool
) -> None:
    """It came while refault was restarted, at the end of precopy. Where the monitor is lost, that may be."""

    async def query(_: str) -> object:
        if remaining is None:
            raise MonitorLost("it is lost with the network")
        return {"status": "device", "ram": {"remaining": remaining}}

    of = course()
    vars(of.vm)["query"] = query
    assert await SessionWaits(of, Channels(of, cast(Relay, Unread()))).has_sent_all() is waits_on


class Ended(Pump):
    """The relay of a destination whose QEMU has ended its side without a word."""

    runs_told = False

    def session(self) -> SessionView | None:
        return cast(SessionView, SimpleNamespace(word_due=True, state=SessionState.CARRIED))


@pytest.mark.parametrize(
    ("why", "without_guest"),
    [
        ("it has ended", True),
        ("it has failed, and ended", True),
        ("it had the guest for a moment", False),
        ("it was in postcopy", False),
        ("it runs yet", False),
        ("it says nothing, and runs yet", False),
        ("it has completed", False),
        ("nobody knows its process", False),
    ],
)
async def test_whether_a_destination_has_ended_without_the_guest(
    why: str, without_guest: bool, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    process = await trio.lowlevel.open_process(["sleep", "1000"])
    try:
        of = course(Role.DESTINATION)
        vm = vars(of.vm)
        vm["qemu_pid"], vm["qemu_started"] = process.pid, process_started(process.pid)
        relay = Ended()
        waits = SessionWaits(of, Channels(of, cast(Relay, relay)))
        told: list[bool] = []

        async def ask() -> None:
            told.append(await waits.ended_without_guest())

        if why == "nobody knows its process":
            vm["qemu_pid"] = None
        if why == "it was in postcopy":
            of.postcopy_begins()
        nursery.start_soon(ask)
        await trio.sleep(1)
        if why == "it has completed":
            of.on_status("completed")
        elif "runs yet" not in why:
            if why == "it has failed, and ended":
                of.on_status("failed")
                await trio.sleep(1)
            process.kill()
            await process.wait()
            assert told in ([], [False])  # its monitor may have told of the guest, and that is not read yet
        if why == "it had the guest for a moment":
            vars(relay)["runs_told"] = True
        if why != "it says nothing, and runs yet":
            of.gone = True
        await trio.sleep(100)
        assert told == [without_guest]
    finally:
        process.kill()
        await process.wait()


BEGUN = Passed(packaged_begun=True)


@pytest.mark.parametrize(
    ("passed", "held", "arrived", "doubt"),
    [
        (Passed(), False, False, False),
        (BEGUN, False, False, True),
        (Passed(discarding=True), False, False, True),
        (BEGUN, False, True, False),
        (dataclasses.replace(BEGUN, opaque=True), False, False, False),
        (dataclasses.replace(BEGUN, opaque=True), True, False, True),
        (BEGUN, True, True, False),
    ],
)
async def test_when_it_is_in_doubt_whether_the_guest_has_arrived(
    passed: Passed, *, held: bool, arrived: bool, doubt: bool
) -> None:
    pump = Pump()
    vars(pump)["passed"] = lambda: passed
    channels = Channels(course(), cast(Relay, pump))
    channels.knows_first = True
    channels.has_arrived = arrived
    if held:
        assert channels.hold(Phase.SWITCHOVER, UNTIL_LOADED)
        assert not channels.hold(Phase.SWITCHOVER, UNTIL_LOADED)
    assert channels.in_doubt is doubt
