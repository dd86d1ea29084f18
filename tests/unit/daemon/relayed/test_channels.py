"""What is counted of a lost channel."""

from __future__ import annotations

import dataclasses
import socket
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from refault.channel.relay import LegState, Relay, RelayView
from refault.daemon.known.counters import Counters
from refault.daemon.known.course import Course
from refault.daemon.known.patience import Patience
from refault.daemon.near.local import LocalLeg
from refault.daemon.relayed.channels import Channels
from refault.migration.legs import UNTIL_LOADED
from refault.migration.phase import Passed, Phase, Role


class Pump:
    """A relay of which only the picture counts."""

    closed = False

    def __init__(self) -> None:
        zeros = dict.fromkeys((field.name for field in dataclasses.fields(RelayView)), cast(Any, 0))
        self.view = RelayView(**zeros | {"local": LegState.CLOSED, "far": LegState.CLOSED})
        self.may_replay: list[bool] = []

    def look(self) -> RelayView:
        return self.view

    def attach(self, local: int, far: int, *, may_replay: bool, **_: object) -> None:
        self.may_replay.append(may_replay)
        for fd in (local, far):
            socket.socket(fileno=fd).close()

    def replays(self) -> None:
        self.view = dataclasses.replace(
            self.view, replayed=self.view.replayed + 1, last_replay_ns=time.monotonic_ns()
        )


def course() -> Course:
    vm = SimpleNamespace(name="vm", monitor=None, patience=Patience(), alternatives=(), counters=Counters())
    return Course(cast(Any, vm), Role.SOURCE, None)


def recover(channels: Channels) -> None:
    local, far = socket.socketpair()
    channels.join(LocalLeg("end", local, 0), trio.socket.from_stdlib_socket(far), recovered=True)


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
    with trio.fail_after(5):
        while looks == 0:
            await trio.sleep(0.01)
        channels.lose(1, OSError("gone"))
        await channels.changed.wait()
    assert "internal error in what the channel tells" in caplog.text
    nursery.cancel_scope.cancel()
    relay.close()
    channels.kept.drop()


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
