"""How the ends of legs and lanes pass through the pump: what the kernel holds when an end comes is read,
passed on and put on record, as beside a plain socket (cext/ends.h)."""

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from refault.channel._channel import lib
from tests.support import until as support
from tests.support.tracker import Tracker
from tests.support.until import descriptors_and_threads, until_nothing_is_left

from refault.channel.relay import Lane, LegState, Relay
from refault.channel.tracker import Fact
from refault.migration.phase import Role
from refault.session.wire import Positions

from . import streams as s
from .test_relay import (
    BLOCK,
    DEADLINE,
    PAGE,
    PONG,
    RESUME_ACK,
    Ends,
    nothing_comes,
    read_exactly,
    received_bitmap,
    relaying,
    request,
    tcp_pair,
)

PAGES = 4096
BEGINNING = (
    s.HEADER + s.configuration() + s.command(1) + s.advise()
    + s.start(b"ram") + s.block_list([(BLOCK, PAGES * PAGE, b"")]) + s.EOS + s.footer()
)  # fmt: skip
DEVICE_STATE = s.packaged(s.command(4) + s.tail())
LAST_PAGES = b"".join(s.page(number * PAGE, BLOCK) for number in range(200))
END = s.part(kind=3) + LAST_PAGES + s.EOS + s.footer() + s.EOF
PONG_3 = s.message(2, struct.pack(">I", 3))
SHUT = s.message(1, struct.pack(">I", 0))
RESET = struct.pack("ii", 1, 0)
MUCH = 4 << 20


def resets(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def to_its_end(end: socket.socket) -> bytes:
    """All that can be read, until it ends or nothing more comes."""
    got = bytearray()
    end.settimeout(0.5)
    try:
        while data := end.recv(1 << 16):
            got += data
    except OSError:
        pass
    return bytes(got)


def unacknowledged(end: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(end, termios.TIOCOUTQ, count)
    return count[0]


def slow_qemu() -> tuple[socket.socket, socket.socket]:
    """A leg that takes little; the pump's end and QEMU's."""
    local, qemu = socket.socketpair()
    local.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    qemu.settimeout(DEADLINE)
    return local, qemu


def roomy_network() -> tuple[socket.socket, socket.socket]:
    """A connection whose kernel takes much for a pump that does not read; the pump's end and the host's."""
    far, host = tcp_pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MUCH)
    host.settimeout(DEADLINE)
    return far, host


def attach(ends: Ends, *, lanes: int = 0, recovered: bool = False) -> None:
    ends.qemu.close()
    ends.host.close()
    local, ends.qemu = slow_qemu()
    far, ends.host = roomy_network()
    before = ends.relay.look().channel
    ends.relay.attach(local.detach(), far.detach(), recovered=recovered, may_replay=True, lanes=lanes)
    ends.until(lambda view: view.channel == before + 1)


def add_lane(ends: Ends, kind: Lane) -> tuple[socket.socket, socket.socket]:
    local, qemu = slow_qemu()
    far, host = roomy_network()
    ends.others += [qemu, host]
    before = ends.relay.look()
    ends.relay.add_lane(before.channel, kind, local.detach(), far.detach())
    ends.until(lambda view: view.lanes == before.lanes + 1)
    return qemu, host


def pass_forward(ends: Ends, data: bytes) -> None:
    ends.host.sendall(data)
    assert read_exactly(ends.qemu, len(data)) == data


def until(holds: Callable[[], object], what: str) -> None:
    support.until(holds, lambda: what, seconds=DEADLINE)


def is_recorded(ends: Ends, count: int) -> bool:
    return ends.relay.pages().recorded == count


def until_passed(ends: Ends, count: int) -> None:
    ends.until(lambda view: view.forward_bytes == count)


@contextmanager
def swallowing(end: socket.socket) -> Iterator[None]:
    """Somebody reads what comes there, into nothing."""

    def swallow() -> None:
        try:
            while end.recv(1 << 16):
                pass
        except OSError:
            pass

    thread = threading.Thread(target=swallow)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("asks", [0, 1, 3])
def test_a_destination_gets_all_that_had_arrived_whatever_it_says_meanwhile(reset: bool, asks: int) -> None:
    with relaying(Role.DESTINATION) as ends:
        attach(ends)
        pass_forward(ends, BEGINNING + DEVICE_STATE)
        ends.qemu.sendall(PONG_3)
        read_exactly(ends.host, len(PONG_3))
        ends.host.sendall(END)
        if reset:
            resets(ends.host)
        ends.host.close()
        for number in range(asks):  # which no host takes any more
            ends.qemu.sendall(request(number * PAGE))
            time.sleep(0.02)
        assert read_exactly(ends.qemu, len(END)) == END
        ends.until(lambda view: view.far.lost)
        assert ends.relay.passed().ended
        assert nothing_comes(ends.qemu)
        until(lambda: ends.relay.pages().recorded == asks, "a request is not on record")


@pytest.mark.parametrize("reset", [False, True])
def test_a_preempt_lane_is_read_to_its_end_when_the_source_has_gone(reset: bool) -> None:
    with relaying(Role.DESTINATION) as ends:
        attach(ends, lanes=1)
        pass_forward(ends, BEGINNING)
        qemu, host = add_lane(ends, Lane.PREEMPT)
        pass_forward(ends, DEVICE_STATE)
        host.sendall(LAST_PAGES)
        end = s.part(kind=3) + s.EOS + s.footer() + s.EOF
        pass_forward(ends, end)
        for connection in (host, ends.host):
            if reset:
                resets(connection)
            connection.close()
        time.sleep(0.05)
        assert read_exactly(qemu, len(LAST_PAGES)) == LAST_PAGES
        ends.until(lambda view: view.far.lost)


def test_a_lane_without_an_end_does_not_keep_the_end_of_a_lost_channel_untold() -> None:
    with relaying(Role.DESTINATION) as ends:
        attach(ends, lanes=1)
        pass_forward(ends, BEGINNING)
        add_lane(ends, Lane.PREEMPT)
        pass_forward(ends, DEVICE_STATE + END)
        ends.host.close()
        spent = time.process_time()
        ends.until(lambda view: view.far.lost)
        assert time.process_time() - spent < 0.5


def test_a_lost_lane_loses_nothing_that_had_arrived_on_the_others() -> None:
    with relaying(Role.DESTINATION) as ends:
        attach(ends, lanes=2)
        lanes = [add_lane(ends, Lane.MULTIFD) for _ in range(2)]
        ends.host.sendall(BEGINNING)
        data = os.urandom(300_000)
        lanes[0][1].sendall(data)
        until(lambda: unacknowledged(lanes[0][1]) == 0, "not all has arrived")
        resets(lanes[1][1])
        lanes[1][1].close()
        time.sleep(0.05)
        assert not ends.relay.look().far.lost
        assert read_exactly(ends.qemu, len(BEGINNING)) == BEGINNING
        assert read_exactly(lanes[0][0], len(data)) == data
        view = ends.until(lambda view: view.far.lost)
        assert (view.far, view.far_error) == (LegState.FAILED, errno.ECONNRESET)
        for _, host in lanes[:1]:
            assert host.recv(1) == b""


def test_a_source_gets_all_that_had_arrived_though_its_writes_fail() -> None:
    for _ in range(10):
        with relaying(Role.SOURCE) as ends:
            ends.channel()
            ends.qemu.sendall(BEGINNING + DEVICE_STATE)
            read_exactly(ends.host, len(BEGINNING + DEVICE_STATE))
            page = s.part() + s.page(0, BLOCK) + s.EOS + s.footer()
            stop = threading.Event()

            def write(ends: Ends = ends, stop: threading.Event = stop, page: bytes = page) -> None:
                try:
                    while not stop.is_set():
                        ends.qemu.sendall(page)
                except OSError:
                    pass

            writer = threading.Thread(target=write)
            writer.start()
            read_exactly(ends.host, 1 << 20)
            ends.host.sendall(PONG_3)
            ends.host.close()  # with unread pages: a reset goes out behind the PONG
            ends.until(lambda view: view.far.lost)
            assert Fact.PONG_3 in Fact(lib.rf_tracker_facts(ends.relay._tracker))
            assert read_exactly(ends.qemu, len(PONG_3)) == PONG_3
            stop.set()
            ends.qemu.shutdown(socket.SHUT_RDWR)
            writer.join()


def ask(host: socket.socket, most: int) -> int:
    """Asks for pages of a source that reads nothing, until no more is taken, or for so many; how many."""
    host.setblocking(False)
    asked = 0
    with contextlib.suppress(BlockingIOError):
        while asked < most:
            message = request(asked % PAGES * PAGE)
            sent = host.send(message)
            if sent < len(message):
                return asked
            asked += 1
    return asked


@pytest.mark.parametrize("how", ["in order", "reset", "behind what is unsent"])
def test_a_far_end_is_noticed_at_once_though_qemu_does_not_read_the_return_path(how: str) -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        ends.qemu.sendall(BEGINNING)
        read_exactly(ends.host, len(BEGINNING))
        asked = ask(ends.host, 2600 if how == "in order" else 1 << 20)
        if how == "reset":
            resets(ends.host)
        ends.host.close()
        if how == "behind what is unsent":  # the host's kernel tells of it when something comes
            ends.qemu.sendall(s.EOF)
        ends.until(lambda view: view.far.lost)
        spent = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - spent < 0.1
        assert ends.relay.look().local is LegState.OPEN
        # What QEMU does not take is on record when its leg is closed.
        before = ends.relay.pages().recorded
        ends.relay.close_channel(1)
        ends.until(lambda view: view.local is LegState.CLOSED)
        recorded = ends.relay.pages().recorded
        assert before < recorded
        assert recorded == asked or how != "in order"


def test_what_qemu_asked_for_right_before_it_closed_is_on_record() -> None:
    with relaying(Role.DESTINATION) as ends:
        for number in range(20):
            ends.channel()
            host = ends.host
            host.sendall(BEGINNING + DEVICE_STATE)
            read_exactly(ends.qemu, len(BEGINNING + DEVICE_STATE))
            page = s.part() + s.page(0, BLOCK) + s.EOS + s.footer()

            def pages(host: socket.socket = host, page: bytes = page) -> None:
                try:
                    while True:
                        host.sendall(page)
                except OSError:
                    pass

            writer = threading.Thread(target=pages)
            writer.start()
            qemu = ends.qemu.dup()
            with swallowing(qemu):
                ends.qemu.sendall(request(number * PAGE))
                ends.qemu.shutdown(socket.SHUT_RDWR)
            ends.until(lambda view: view.local.lost)
            until(partial(is_recorded, ends, number + 1), "a request is not on record")
            qemu.close()
            ends.relay.close_channel(number + 1)
            writer.join()


@pytest.mark.parametrize("ended", [False, True])
def test_a_held_destination_is_heard_though_a_replay_waits_for_the_lost_far_leg(ended: bool) -> None:
    with relaying(Role.DESTINATION) as ends:
        ends.channel()
        ends.host.sendall(BEGINNING + DEVICE_STATE)
        read_exactly(ends.qemu, len(BEGINNING + DEVICE_STATE))
        with swallowing(ends.host):
            for number in range(3000):
                ends.qemu.sendall(request(number * PAGE))
            until(lambda: ends.relay.pages().recorded == 3000, "not all are on record")
            ends.host.shutdown(socket.SHUT_RDWR)
        ends.until(lambda view: view.far.lost)
        ends.relay.close_channel(1)
        ends.qemu.close()
        ends.host.close()
        local, ends.qemu = socket.socketpair()
        far, ends.host = tcp_pair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        ends.host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        ends.qemu.settimeout(DEADLINE)
        ends.relay.attach(local.detach(), far.detach(), recovered=True, may_replay=True)
        ends.until(lambda view: view.channel == 2)
        ends.host.sendall(s.recv_bitmap(BLOCK) + s.command(9) + (END if ended else b""))
        ends.qemu.sendall(received_bitmap(set(), PAGES) + RESUME_ACK)
        read_exactly(ends.host, len(received_bitmap(set(), PAGES)))
        with ends.qemu.dup() as qemu, swallowing(qemu):
            ends.until(lambda view: 0 < view.replayed < 3000)
            ends.host.shutdown(socket.SHUT_WR)
            ends.until(lambda view: view.far.lost)
            ends.qemu.sendall(SHUT)
            until(lambda: ends.relay.passed().shut, "SHUT is not seen")
            ends.qemu.shutdown(socket.SHUT_RDWR)
            ends.until(lambda view: view.local.lost)


@pytest.mark.parametrize("postcopy", [False, True])
def test_a_destination_that_goes_is_told_to_its_source_and_nothing_is_read_away(postcopy: bool) -> None:
    """A source without a return path learns of it by a write that fails, or says `completed`."""
    with relaying(Role.DESTINATION) as ends:
        ends.channel()
        pass_forward(ends, BEGINNING + (DEVICE_STATE if postcopy else b""))
        ends.host.settimeout(DEADLINE)
        sent = 0
        failed: list[OSError] = []

        def write() -> None:
            nonlocal sent
            try:
                while True:
                    ends.host.sendall(bytes(1 << 16))
                    sent += 1 << 16
            except OSError as error:
                failed.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        before = ends.until(lambda view: view.forward_bytes > len(BEGINNING)).forward_bytes
        ends.qemu.close()
        writer.join(0.15 if not postcopy else 2)  # a second later it would have written all
        assert [error.errno for error in failed] in ([errno.EPIPE], [errno.ECONNRESET])
        assert before > 0


def test_what_a_destination_said_last_reaches_its_source_though_pages_lie_unread() -> None:
    with relaying(Role.DESTINATION) as ends:
        attach(ends)
        pass_forward(ends, BEGINNING + DEVICE_STATE)
        ends.host.sendall(bytes(1 << 20))
        said = PONG_3 + request(9 * PAGE) * 1000 + SHUT
        ends.qemu.sendall(said)
        ends.qemu.close()
        assert to_its_end(ends.host) == said


def test_a_source_that_has_completed_is_told_to_have_ended_once_its_lanes_are_sent() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel(lanes=1)
        local, lane = socket.socketpair()
        far, host = tcp_pair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        host.settimeout(DEADLINE)
        ends.others += [lane, host]
        ends.relay.add_lane(1, Lane.MULTIFD, local.detach(), far.detach())
        data = b"\x11\x22\x33\x44" + os.urandom(200_000)
        lane.sendall(data)
        lane.close()
        ends.qemu.sendall(BEGINNING)
        ends.qemu.close()
        assert read_exactly(ends.host, len(BEGINNING)) == BEGINNING
        time.sleep(0.05)
        assert ends.relay.look().local is LegState.OPEN
        assert read_exactly(host, len(data)) == data
        ends.until(lambda view: view.local is LegState.ENDED)
        assert host.recv(1) == ends.host.recv(1) == b""


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_what_a_source_had_opened_when_it_ended_passes_before_its_end(opened: int) -> None:
    data = b"\x11\x22\x33\x44" + os.urandom(100_000)
    with relaying(Role.SOURCE) as ends:
        ends.channel(lanes=2)
        ends.qemu.sendall(BEGINNING)
        ends.qemu.close()
        assert read_exactly(ends.host, len(BEGINNING)) == BEGINNING
        for _ in range(opened):
            view = ends.until(lambda view: view.last_lanes)
            assert view.local is LegState.OPEN
            assert nothing_comes(ends.host)
            lane, host = ends.lane(Lane.MULTIFD)
            lane.sendall(data)
            lane.close()
            assert read_exactly(host, len(data)) == data
            assert host.recv(1) == b""
        if opened < 2:
            ends.until(lambda view: view.last_lanes)
            ends.relay.no_more_lanes(1)
        ends.until(lambda view: view.local is LegState.ENDED and not view.last_lanes)
        assert ends.host.recv(1) == b""


def test_orders_are_not_refused_for_their_number() -> None:
    """QEMU opens as many as 255 multifd channels, and one for preempt."""
    with relaying(Role.DESTINATION) as ends:
        ends.channel(lanes=256)
        pairs = [(socket.socketpair(), socket.socketpair()) for _ in range(256)]
        for number, (near, away) in enumerate(pairs):
            kind = Lane.PREEMPT if number == 255 else Lane.MULTIFD
            ends.relay.add_lane(1, kind, near[0].detach(), away[0].detach())
        ends.until(lambda view: view.lanes == 256)
        for number, (near, away) in enumerate(pairs):
            away[1].sendall(b"%d" % number)
            near[1].settimeout(DEADLINE)
            assert near[1].recv(8) == b"%d" % number
            for end in (near[1], away[1]):
                end.close()


def test_a_leg_that_qemu_makes_blocking_keeps_nobody_waiting() -> None:
    """It does so with a duplicate that it is passed, and the flag is the open file's."""
    with relaying(Role.DESTINATION) as ends:
        ends.qemu.close()
        ends.host.close()
        local, ends.qemu = slow_qemu()
        far, ends.host = tcp_pair()
        with local.dup() as kept:
            ends.relay.attach(local.detach(), far.detach(), recovered=False, may_replay=True)
            ends.until(lambda view: view.channel == 1)
            kept.setblocking(True)
            ends.host.setblocking(False)
            try:
                while ends.host.send(bytes(1 << 16)):
                    time.sleep(0.001)
            except BlockingIOError:
                pass
            ends.qemu.sendall(PONG)
            ends.host.settimeout(DEADLINE)
            assert read_exactly(ends.host, len(PONG)) == PONG


def test_what_is_said_to_a_source_stands_between_two_messages() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        asked = ask(ends.host, 20_000)
        said = struct.pack(">HHI", 2, 4, 0x42)
        ends.relay.say(1, said)
        ends.host.close()
        got = to_its_end(ends.qemu)
        at = got.index(said)
        requests = got[:at] + got[at + len(said) :]
        assert at % len(request(0)) == 0
        assert requests == b"".join(request(number % PAGES * PAGE) for number in range(asked))


def test_what_is_said_in_the_midst_of_a_bitmap_waits_for_its_end() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        bitmap = received_bitmap(set(), PAGES)
        ends.host.sendall(bitmap[:100])
        read_exactly(ends.qemu, 100)
        ends.relay.say(1, PONG)
        assert nothing_comes(ends.qemu)
        ends.host.sendall(bitmap[100:])
        assert read_exactly(ends.qemu, len(bitmap) - 100 + len(PONG)) == bitmap[100:] + PONG


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("role", list(Role))
def test_what_the_kernel_holds_is_passed_on_before_a_relay_ends(role: Role, kept: bool) -> None:
    relay = Relay(role)
    local, qemu = socket.socketpair()
    far, host = tcp_pair()
    with qemu, host, local.dup():
        qemu.settimeout(DEADLINE)
        host.sendall(PONG * 1000)
        relay.attach(local.detach(), far.detach(), recovered=False, may_replay=True)
        relay.close(keep_local=kept)
        assert read_exactly(qemu, len(PONG) * 1000) == PONG * 1000
        assert nothing_comes(qemu) is kept


@pytest.mark.parametrize("lane", [None, *Lane])
@pytest.mark.parametrize("role", list(Role))
def test_a_channel_that_is_closed_passes_on_what_its_reader_has_room_for(
    role: Role, lane: Lane | None
) -> None:
    """Of which poll(2) does not tell: it says that there is none while there is much."""
    piece, behind = bytes(2000), bytes(30_000)
    sent = 0
    with relaying(role) as ends:
        ends.channel(lanes=lane is not None)
        local, qemu = socket.socketpair()
        far, host = tcp_pair()
        ends.others += [qemu, host]
        into, writer, reader = (local, host, qemu) if role is Role.DESTINATION else (far, qemu, host)
        with into.dup() as taker:
            if lane is None:
                ends.relay.attach(local.detach(), far.detach(), recovered=False, may_replay=True)
                ends.until(lambda view: view.channel == 2)
            else:
                ends.relay.add_lane(1, lane, local.detach(), far.detach())
            while select.select([], [taker], [], 0)[1]:
                writer.sendall(piece)
                sent += len(piece)
                until_passed(ends, sent)
        writer.sendall(behind)
        if writer is host:
            until(lambda: unacknowledged(host) == 0, "it has arrived")
        ends.relay.close_channel(ends.relay.look().channel)
        assert len(to_its_end(reader)) == sent + len(behind)


@pytest.mark.parametrize("preempt", [False, True])
@pytest.mark.parametrize("role", list(Role))
def test_of_a_channel_that_is_closed_only_what_its_reader_gets_is_counted(role: Role, preempt: bool) -> None:
    """Its kernel takes a part of what the writer's holds; what was read beyond that would be lost."""
    before = BEGINNING + DEVICE_STATE if preempt else BEGINNING + s.part()
    pages = b"".join(s.page(number * PAGE, BLOCK) for number in range(PAGES))
    with relaying(role) as ends:
        local, qemu = socket.socketpair()
        far, host = tcp_pair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 60_000)
        qemu.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
        writer, reader = (qemu, host) if role is Role.SOURCE else (host, qemu)
        ends.others += [qemu, host]
        if preempt:
            ends.channel(lanes=1)
            (ends.qemu if role is Role.SOURCE else ends.host).sendall(before)
            ends.relay.add_lane(1, Lane.PREEMPT, local.detach(), far.detach())
        else:
            ends.relay.attach(local.detach(), far.detach(), recovered=False, may_replay=True)
            writer.sendall(before)
            assert read_exactly(reader, len(before)) == before
        writer.setblocking(False)
        sent, since = 0, time.monotonic()
        while time.monotonic() - since < 0.1:
            with contextlib.suppress(BlockingIOError):
                sent, since = sent + writer.send(pages[sent:]), time.monotonic()
            time.sleep(0.001)
        ends.relay.close_channel(1)
        ends.until(lambda view: view.local is LegState.CLOSED)  # what is read meanwhile makes room
        got = to_its_end(reader)
        assert len(got) < sent < len(pages)
        expected = Tracker()
        expected.channel_begin(recovered=False)
        expected.forward(before, 1)
        if preempt:
            expected.preempt_begin()
            expected.preempt_forward(got, 1)
        else:
            expected.forward(got, 1)
        assert ends.relay.pages().forwarded == expected.stats().forwarded


def test_a_closed_relay_says_so_and_takes_no_descriptor() -> None:
    relay = Relay(Role.SOURCE)
    relay.close()
    calls = {
        "attach": lambda: relay.attach(*_two_descriptors(), recovered=False, may_replay=False),
        "add_lane": lambda: relay.add_lane(1, Lane.MULTIFD, *_two_descriptors()),
        "no_more_lanes": lambda: relay.no_more_lanes(1),
        "lose": lambda: relay.lose(1, errno.EIO),
        "say": lambda: relay.say(1, b""),
        "close_channel": lambda: relay.close_channel(1),
        "session_rejoin": lambda: relay.session_rejoin(Positions()),
        "session_adopt": lambda: relay.session_adopt(-1),
        "go_on": lambda: relay.go_on(-1, None, recovered=False),
        "session_give_up": lambda: relay.session_give_up(errno.EIO),
        "session_last_word": lambda: relay.session_last_word(broke=False),
    }
    open_before = len(os.listdir("/proc/self/fd"))
    for name in dir(Relay):
        if name.startswith("_") or name in ("closed", "close", "session", "sessions", "retransmitted"):
            continue
        with pytest.raises(ValueError, match="closed"):
            calls.get(name, lambda name=name: getattr(relay, name)())()
    relay.close()
    assert relay.closed
    assert (relay.session(), relay.sessions(), relay.retransmitted()) == (None, [], 0)
    assert len(os.listdir("/proc/self/fd")) == open_before


def _two_descriptors() -> tuple[int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


def test_a_relay_that_nobody_holds_any_more_leaves_nothing() -> None:
    before = descriptors_and_threads()
    Relay(Role.SOURCE)
    until_nothing_is_left(before)
