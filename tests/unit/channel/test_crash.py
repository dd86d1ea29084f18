"""The mark of a crash in a decoder: what a refault that dies there leaves, and that a kill leaves nothing."""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from refault.channel._channel import ffi, lib
from tests.support.tracker import Tracker

from refault.channel.forward import reason_text
from refault.channel.relay import Relay
from refault.channel.tracker import Fact, Restored, StateFds
from refault.migration.phase import Role

from . import streams as s
from .streams import PAGE
from .test_relay import nothing_comes, read_exactly, tcp_pair

RAM = b"pc.ram"
KEY = b"vm 42 1700 an-id"
PAGES = 1 << 10
BEGINNING = s.postcopy_stream(length=PAGES * PAGE)[:-1]
FULL_FLOW = (
    s.part() + s.zero(0, RAM) + b"".join(s.zero(page % PAGES * PAGE) for page in range(20_000)) + s.EOS
)
RECORDS_AT = 4096 + 4096 * 272
"""Where the record table begins (cext/statefile.c)."""

FAULTS = [signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT]


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = os.memfd_create("state")
    yield descriptor
    os.close(descriptor)


@contextlib.contextmanager
def reopened(old: int) -> Iterator[Tracker]:
    """What the next refault makes of it."""
    yield Tracker(state=StateFds(-1, KEY, old))


def begun(fd: int) -> Tracker:
    tracker = Tracker(state=StateFds(fd, KEY))
    tracker.channel_begin(recovered=False)
    tracker.forward(BEGINNING, 1)
    tracker.backward(s.request(9 * PAGE, PAGE, RAM), 2)
    return tracker


def in_a_child(run: Callable[[], None]) -> int:
    """Its pid, once `run` is about to be called there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            os.write(writing, b"x")
            run()
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    return child


def ended_by(child: int) -> int:
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def decode(tracker: Tracker, *_: object) -> None:
    """At full speed for ever; what else there is besides decoding is nothing beside it."""
    while True:
        tracker.forward(FULL_FLOW, 3)


def bad_pointer(tracker: Tracker, number: int) -> None:
    lib.rf_tracker_forward(tracker._tracker, ffi.cast("uint8_t *", 8), 100, 7)


def file_that_was_cut(tracker: Tracker, number: int) -> None:
    cut = os.memfd_create("cut")
    os.ftruncate(cut, PAGE)
    data = mmap.mmap(cut, PAGE)
    os.ftruncate(cut, 0)
    lib.rf_tracker_forward(tracker._tracker, ffi.from_buffer("uint8_t[]", data), len(data), 7)


def raised(tracker: Tracker, number: int) -> None:
    """As abort(3) does; another thread must, for this one is in the decoder."""
    decoder = threading.get_ident()
    before = tracker.stats().forwarded

    def fault() -> None:
        while tracker.stats().forwarded == before:
            time.sleep(0.001)
        signal.pthread_kill(decoder, number)

    threading.Thread(target=fault, daemon=True).start()
    tracker.forward(FULL_FLOW * 50, 7)


CRASHES = [
    (bad_pointer, signal.SIGSEGV),
    (file_that_was_cut, signal.SIGBUS),
    *((raised, number) for number in FAULTS),
]


@pytest.mark.parametrize("handler", ["none", "before ours", "after ours"])
@pytest.mark.parametrize(("crash", "number"), CRASHES)
def test_a_crash_in_a_decoder_leaves_the_mark_and_dies_as_without_it(
    fd: int, crash: Callable[[Tracker, int], None], number: int, handler: str
) -> None:
    """Whoever else handles these signals, as Python's faulthandler does."""

    def run() -> None:
        with open(os.devnull, "w") as nowhere:
            if handler == "before ours":
                faulthandler.enable(nowhere)
            tracker = begun(fd)
            if handler == "after ours":
                faulthandler.enable(nowhere)
                begun(os.memfd_create("another"))
            crash(tracker, number)

    assert ended_by(in_a_child(run)) == number
    second = os.memfd_create("second")
    Tracker(state=StateFds(second, KEY, fd))
    for old in (fd, second):
        with reopened(old) as after:
            assert after.restored is Restored.CRASHED
            assert [block.name for block in after.blocks()] == [RAM, b"pc.bios"]
            after.channel_lost()
            after.channel_begin(recovered=True)
            after.forward(s.recv_bitmap(RAM), 9)
            after.backward(s.received(RAM, bytes(PAGES // 8)) + s.message(6, b"\0\0\0\1"), 9)
            assert "refault crashed while it read it" in reason_text(after.forward_opaque)
            assert after.return_opaque == after.forward_opaque
            assert after.channel_facts == Fact(0)
            assert list(after.to_replay()) == []
    os.close(second)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, *FAULTS])
def test_a_kill_in_a_decoder_is_no_crash_of_it(number: int) -> None:
    """Of these signals a watchdog sends SIGABRT, and the OOM killer SIGKILL."""
    draw = random.Random(number)
    for _ in range(40 if number == signal.SIGKILL else 4):
        fd = os.memfd_create("state")
        child = in_a_child(partial(decode, begun(fd)))
        time.sleep(draw.uniform(0.001, 0.006))
        os.kill(child, number)
        assert ended_by(child) == number
        with reopened(fd) as after:
            assert after.restored is Restored.WHOLE
            assert [request.start for request in after.records()] == [9 * PAGE]
            assert after.forward_opaque == after.return_opaque == 0
        os.close(fd)


def a_pump(fd: int, go_on: Callable[[socket.socket, socket.socket], None]) -> None:
    """A source's relay, past the switchover; `go_on` is given the other ends of its legs."""
    relay = Relay(Role.SOURCE, state=StateFds(fd, KEY))
    local, qemu = socket.socketpair()
    far, host = tcp_pair()
    relay.attach(local.detach(), far.detach(), recovered=False, may_replay=True)
    threading.Thread(target=_swallow, args=(host,), daemon=True).start()
    qemu.sendall(BEGINNING)
    while relay.look().forward_bytes < len(BEGINNING):
        time.sleep(0.001)
    go_on(qemu, host)


def _swallow(end: socket.socket) -> None:
    while end.recv(1 << 20):
        pass


def test_a_kill_of_a_pump_in_full_flow_is_no_crash_of_its_decoder() -> None:
    draw = random.Random(7)
    for _ in range(25):
        fd = os.memfd_create("state")
        flows, told = os.pipe()

        def flow(qemu: socket.socket, host: socket.socket, told: int = told) -> None:
            host.sendall(s.request(9 * PAGE, PAGE, RAM))
            qemu.recv(1000)
            while True:
                qemu.sendall(FULL_FLOW)
                os.write(told, b"x")

        child = in_a_child(partial(a_pump, fd, flow))
        os.read(flows, 1)
        time.sleep(draw.uniform(0, 0.005))
        os.kill(child, signal.SIGKILL)
        assert ended_by(child) == signal.SIGKILL
        with reopened(fd) as after:
            assert after.restored is Restored.WHOLE
            assert [request.start for request in after.records()] == [9 * PAGE]
        for descriptor in (fd, flows, told):
            os.close(descriptor)


def test_a_crash_in_the_pumps_decoder_leaves_the_mark(fd: int) -> None:
    """Really: the record of a request is written to where the file ends no longer reaches."""

    def cut(qemu: socket.socket, host: socket.socket) -> None:
        os.ftruncate(fd, RECORDS_AT)
        host.sendall(s.request(9 * PAGE, PAGE, RAM))
        signal.pause()

    assert ended_by(in_a_child(partial(a_pump, fd, cut))) == signal.SIGBUS
    os.ftruncate(fd, RECORDS_AT + 1024 * 40)
    with reopened(fd) as after:
        assert after.restored is Restored.CRASHED


def bad_pointer_back(tracker: Tracker, number: int) -> None:
    event = ffi.new("struct rf_returnpath_event *")
    lib.rf_tracker_return_next(tracker._tracker, ffi.cast("uint8_t *", 8), 100, 7, event)


@pytest.mark.parametrize(("crash", "held"), [(bad_pointer, True), (bad_pointer_back, False)])
def test_after_a_crash_requests_wait_for_resume_ack_unless_it_came_of_telling_messages_apart(
    fd: int, crash: Callable[[Tracker, int], None], held: bool
) -> None:
    """A source of 10.0 with postcopy-preempt aborts on a request before it."""
    assert ended_by(in_a_child(lambda: crash(begun(fd), 0))) == signal.SIGSEGV
    relay = Relay(Role.SOURCE, state=StateFds(-1, KEY, fd))
    local, qemu = socket.socketpair()
    far, host = tcp_pair()
    relay.attach(local.detach(), far.detach(), recovered=True, may_replay=True)
    first, bitmap, second = s.request(0, PAGE, RAM), s.received(RAM, bytes(8)), s.request(PAGE, PAGE)
    acknowledged = s.message(6, b"\0\0\0\1")
    before = bitmap if held else first + bitmap + second
    after = acknowledged + first + second if held else acknowledged
    host.sendall(first + bitmap + second)
    assert read_exactly(qemu, len(before)) == before
    assert nothing_comes(qemu)
    host.sendall(acknowledged)
    assert read_exactly(qemu, len(after)) == after
    assert nothing_comes(qemu)
    assert relay.opaque_reason() == "refault crashed while it read it; a new migration is read again"
    relay.close()
    qemu.close()
    host.close()
