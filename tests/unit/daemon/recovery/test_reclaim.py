"""What a source that is to fail is told."""

import socket
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from tests.support.returnpath import Kind, ReturnPathDecoder
from tests.unit.channel import streams

from refault.daemon.monitor.monitor import QmpError
from refault.daemon.recovery.doubt import decide
from refault.daemon.recovery.failing_destination import fail_as_destination
from refault.daemon.recovery.reclaim import go_on, reclaim
from refault.migration.legs import WAITS_FOR_PONG
from refault.migration.phase import Passed, Role
from refault.migration.recovery import AttemptFailed, Event, State

SIZES = {b"pc.ram": 100 * 4096, b"pc.bios": 4096}
RESUME = struct.pack(">BHH", 8, 9, 0)
ENDS = streams.part(kind=3) + streams.EOS + streams.footer() + streams.EOF


async def answered(sent: bytes, answer: int) -> bytes:
    """What comes back before, in all, so many bytes have come; what is left is read when it has ended."""
    near, far = socket.socketpair()
    with trio.fail_after(10):
        async with (
            trio.SocketStream(trio.socket.from_stdlib_socket(near)) as source,
            trio.SocketStream(trio.socket.from_stdlib_socket(far)) as stream,
        ):
            got = b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail_as_destination, stream, SIZES)
                await source.send_all(sent)
                while len(got) < answer:
                    got += await source.receive_some(answer - len(got))
                await source.send_eof()
    return got


async def test_a_source_is_told_that_all_was_received_and_then_of_an_error() -> None:
    asks = streams.recv_bitmap(b"pc.ram") + streams.recv_bitmap(b"pc.bios") + RESUME
    size = sum(4 + 1 + len(name) + 8 + 8 for name in SIZES) + 16 + 8 + 8 + 8
    received = await answered(asks + ENDS, size)
    events = list(ReturnPathDecoder().feed(received))
    bitmaps = [(event.name, int.from_bytes(event.data, "little").bit_count())
               for event in events if event.kind is Kind.BITMAP_DATA]  # fmt: skip
    assert bitmaps == [(b"pc.ram", 100), (b"pc.bios", 1)]
    assert [(event.kind, event.value) for event in events[-2:]] == [(Kind.RESUME_ACK, 1), (Kind.SHUT, 1)]


async def test_the_error_waits_for_the_end_of_the_stream() -> None:
    """QEMU that hears of it sooner pauses again (10.0)."""
    asks = streams.recv_bitmap(b"pc.bios") + RESUME
    part = streams.part() + streams.EOS + streams.footer()
    with pytest.raises(ExceptionGroup) as failed:
        await answered(asks + part, 4 + 8 + 8 + 8 + 8 + 8)
    assert failed.group_contains(AttemptFailed, match="ended its recovery")


async def test_what_is_no_recovery_is_not_answered() -> None:
    for sent in (streams.ping(1), streams.recv_bitmap(b"other"), streams.part()):
        with pytest.raises(ExceptionGroup) as failed:
            await answered(sent, 0)
        assert failed.group_contains(AttemptFailed)


async def test_cont_is_repeated_until_the_migration_thread_has_ended() -> None:
    answers = ["Migration is not finalized yet", "Migration is not finalized yet", ""]
    asked: list[str] = []

    class Monitor:
        name = "vm1"

        async def execute(self, command: str, *_: Any, **__: Any) -> None:
            asked.append(command)
            if desc := answers[len(asked) - 1]:
                raise QmpError("GenericError", desc)

    with trio.fail_after(10):
        await go_on(Monitor())
    assert asked == ["cont"] * 3


async def no_more(*_: object) -> None:
    """An attempt is over, or nothing is left to be swallowed."""


def lost(version: tuple[int, int, int], status: str, events: list[Event], **channels: Any) -> Any:
    """A source's migration whose channel is lost; `channels`: what else its channels have."""
    defaults: dict[str, Any] = {
        "relay": SimpleNamespace(blocks=list, closed=False, passed=Passed),
        "held": None,
        "held_until_loaded": False,
        "closing": SimpleNamespace(swallow=no_more),
        "look": lambda: None,
    }
    return SimpleNamespace(
        name="vm",
        role=Role.SOURCE,
        channels=SimpleNamespace(**defaults | channels),
        status=status,
        under_way=True,
        stopped_by_switchover=False,
        vm=SimpleNamespace(version=version),
        look_soon=lambda: None,
        feed=events.append,
    )


@pytest.mark.parametrize(
    ("answers", "cost", "ended"),
    [("before", (True, "it pauses"), []), ("never", (False, "it dies"), []), ("late", (True, ""), [2])],
)
async def test_the_guest_is_not_taken_back_from_a_destination_that_the_last_attempt_has_reached(
    answers: str, cost: tuple[bool, str], ended: list[int]
) -> None:
    events: list[Event] = []
    closed: list[int] = []

    async def end(channel: int) -> None:
        closed.append(channel)
        migration.channels.has_arrived = answers == "late"

    migration = lost(
        (7, 2, 0),
        "postcopy-paused",
        events,
        channel=2,
        has_arrived=answers == "before",
        cost_of_stopping=lambda: cost,
        end=end,
    )
    await reclaim(migration, lambda: migration.channels, no_more)
    assert (events, closed) == ([Event.ATTEMPT_FAILED], ended)


async def test_a_source_that_waits_to_hear_fails_by_itself_where_its_guest_cannot_have_left() -> None:
    """As 11.1, whose status says so before the first byte of the package has left."""
    events: list[Event] = []

    async def ask() -> Any:
        return SimpleNamespace(status=WAITS_FOR_PONG)

    async def end(_: int) -> None:
        migration.status = "failed"

    migration = lost(
        (11, 1, 3),
        WAITS_FOR_PONG,
        events,
        channel=1,
        has_arrived=False,
        relay=SimpleNamespace(blocks=list, closed=False, passed=lambda: Passed(packaged_begun=True)),
        cost_of_stopping=lambda: (False, "it runs the guest again"),
        word=SimpleNamespace(ask=ask),
        end=end,
    )
    await reclaim(migration, lambda: migration.channels, no_more)
    assert (migration.status, events) == ("failed", [])


@pytest.mark.parametrize(("until_loaded", "fed"), [(True, 1), (False, 0)])
def test_of_legs_that_are_held_only_that_is_let_go_whose_end_gives_the_guest_back(
    until_loaded: bool, fed: int
) -> None:
    events: list[Event] = []
    policy = SimpleNamespace(state=State.HELD)

    def feed(event: Event) -> None:
        events.append(event)
        policy.state = State.RECLAIMING

    course = SimpleNamespace(vm=SimpleNamespace(version=(11, 1, 3)), policy=policy, feed=feed)
    channels = SimpleNamespace(in_doubt=True, held_until_loaded=until_loaded)
    why_not = decide(cast(Any, course), cast(Any, channels))
    assert events == [Event.TOLD_TO_TAKE_BACK] * fed
    assert ("held open" in (why_not or "")) is not bool(fed)
