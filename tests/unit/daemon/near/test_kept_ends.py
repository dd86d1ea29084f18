"""QEMU's share in our ends of a channel's local legs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import cast

import pytest
import trio

from refault.daemon.near.kept_ends import KeptEnds
from refault.daemon.near.local import Executes

NOT_ASKED = cast(Executes, None)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(20)
        yield ours, theirs


def test_a_lane_that_comes_after_the_end_of_its_channel_is_not_kept(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    one, other = socket.socketpair()
    kept = KeptEnds(NOT_ASKED)
    with one, other:
        kept.begin(one)
    kept.drop()
    kept.add(ours)
    ours.close()
    assert theirs.recv(1) == b""
    assert kept.main is None


def test_a_new_channel_takes_the_place_of_the_one_before(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    one, other = socket.socketpair()
    kept = KeptEnds(NOT_ASKED)
    with one, other:
        kept.begin(ours)
        kept.begin(one)
        ours.close()
        assert theirs.recv(1) == b""
        assert kept.main is not None
        kept.drop()


class Qemu:
    """Says what it was told to of each descriptor that it is given."""

    name = "vm1"

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.commands: list[tuple[str, str]] = []

    async def execute(self, command: str, arguments: dict[str, str], **_: object) -> object:
        self.commands.append((command, arguments["fdname"]))
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        return {}


async def test_what_ends_while_qemu_takes_another_is_not_given_to_it(
    pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    """As at a completion with postcopy-preempt: QEMU is asked for each, and closes its side meanwhile."""
    ours, _ = pair

    class Completing(Qemu):
        async def execute(self, command: str, arguments: dict[str, str], **more: object) -> object:
            kept.drop()
            return await super().execute(command, arguments, **more)

    qemu = Completing()
    kept = KeptEnds(cast(Executes, qemu))
    kept.begin(ours)
    kept.add(ours)
    await kept.give(lambda: None)
    assert [command for command, _ in qemu.commands] == ["getfd"]
    assert not kept.by_qemu
    assert not caplog.records
    await kept.let_go()
    assert [command for command, _ in qemu.commands] == ["getfd", "closefd", "closefd"]


async def test_what_qemu_may_hold_is_known_before_it_is_asked_and_asked_again_by_the_same_name(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, _ = pair
    qemu = Qemu(trio.TooSlowError())
    kept = KeptEnds(cast(Executes, qemu))
    kept.begin(ours)
    remembered: list[tuple[str, ...]] = []

    def remember() -> None:
        assert len(qemu.commands) == 0
        remembered.append(kept.names)

    await kept.give(remember)
    assert not kept.by_qemu  # it has not said so
    [name] = kept.names
    await kept.give(remember)
    assert kept.by_qemu
    assert (remembered, qemu.commands) == ([(name,)], [("getfd", name)] * 2)
    await kept.let_go()
    assert qemu.commands[-1] == ("closefd", name)
    assert (kept.names, kept.by_qemu) == ((), False)
    kept.drop()
