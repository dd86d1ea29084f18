"""The pump, between sockets that this test holds the other ends of."""

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from refault.channel._channel import lib
from tests.support.until import descriptors_and_threads, until_nothing_is_left

from refault.channel.relay import DEAD_AFTER_SECONDS, Lane, LegState, Relay, RelayView
from refault.migration.phase import Role

from . import streams

BLOCK = b"pc.ram"
PAGE = 4096
DEADLINE = 20.0


@dataclass
class Ends:
    """The other ends of a relay's legs: what QEMU and the other host would hold."""

    relay: Relay
    qemu: socket.socket
    host: socket.socket
    others: list[socket.socket] = field(default_factory=list)

    def channel(
        self,
        *,
        recovered: bool = False,
        may_replay: bool = True,
        kind: int = socket.SOCK_STREAM,
        lanes: int = 0,
    ) -> None:
        self.qemu.close()
        self.host.close()
        ours_local, self.qemu = socket.socketpair(socket.AF_UNIX, kind)
        ours_far, self.host = tcp_pair()
        for end in (self.qemu, self.host):
            end.settimeout(DEADLINE)
        before = self.relay.look().channel
        self.relay.attach(
            ours_local.detach(), ours_far.detach(), recovered=recovered, may_replay=may_replay, lanes=lanes
        )
        self.until(lambda view: view.channel == before + 1)

    def lane(self, kind: Lane = Lane.PREEMPT) -> tuple[socket.socket, socket.socket]:
        """Adds a lane; QEMU's end and the other host's."""
        local, qemu = socket.socketpair()
        far, host = tcp_pair()
        for end in (qemu, host):
            end.settimeout(DEADLINE)
            self.others.append(end)
        before = self.relay.look()
        self.relay.add_lane(before.channel, kind, local.detach(), far.detach())
        self.until(lambda view: view.lanes == before.lanes + 1)
        return qemu, host

    def until(self, holds: Callable[[RelayView], bool]) -> RelayView:
        deadline = time.monotonic() + DEADLINE
        while not holds(view := self.relay.look()):
            assert time.monotonic() < deadline, view
            time.sleep(0.001)
        return view


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return near, far


@contextmanager
def relaying(role: Role, *, dead_after: int = DEAD_AFTER_SECONDS) -> Iterator[Ends]:
    relay = Relay(role, dead_after=dead_after)
    ends = Ends(relay, *socket.socketpair())
    try:
        yield ends
    finally:
        relay.close()
        for end in (ends.qemu, ends.host, *ends.others):
            end.close()


def read_exactly(end: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = end.recv(count - len(data))
        assert chunk, f"ended after {len(data)} of {count} bytes"
        data += chunk
    return bytes(data)


def bytes_pass_both_ways(qemu: socket.socket, host: socket.socket) -> None:
    for one, other in ((qemu, host), (host, qemu)):
        data = os.urandom(300_000)
        received = bytearray()
        sent = 0
        while len(received) < len(data):
            if sent < len(data):
                sent += one.send(data[sent : sent + 4096])
            received += other.recv(1 << 20)
        assert received == data


def nothing_comes(end: socket.socket, seconds: float = 0.1) -> bool:
    end.settimeout(seconds)
    try:
        return end.recv(1, socket.MSG_PEEK) == b"never"
    except TimeoutError:
        return True
    finally:
        end.settimeout(DEADLINE)


def request(start: int, block: bytes | None = BLOCK, length: int = PAGE) -> bytes:
    body = struct.pack(">QI", start, length)
    if block is None:
        return struct.pack(">HH", 4, len(body)) + body
    body += bytes([len(block)]) + block
    return struct.pack(">HH", 3, len(body)) + body


def received_bitmap(pages: set[int], total: int, block: bytes = BLOCK) -> bytes:
    bits = sum(1 << page for page in pages)
    size = (total + 63) // 64 * 8
    name = bytes([len(block)]) + block
    return (
        struct.pack(">HH", 5, len(name)) + name + struct.pack(">Q", size)
        + bits.to_bytes(size, "little") + struct.pack(">Q", 0x0123456789ABCDEF)
    )  # fmt: skip


RESUME_ACK = struct.pack(">HHI", 6, 4, 1)
PONG = struct.pack(">HHI", 2, 4, 7)


@pytest.mark.parametrize("role", list(Role))
def test_bytes_pass_both_ways_as_they_came(role: Role) -> None:
    with relaying(role) as ends:
        ends.channel()
        bytes_pass_both_ways(ends.qemu, ends.host)


def test_a_source_does_not_get_rid_of_a_whole_guest_before_its_destination_reads() -> None:
    """Else it has completed, without a return path, and a destination that refuses the stream is late."""
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        ends.qemu.settimeout(0.2)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 16 << 20:
                sent += ends.qemu.send(bytes(1 << 14))
        assert sent < 1 << 20


def test_what_qemu_did_not_take_of_a_channel_never_begins_the_next() -> None:
    """QEMU would take it for the recovered one's first section: a zero byte is the end of the migration."""
    with relaying(Role.DESTINATION) as ends:
        ends.channel()
        ends.host.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while ends.host.send(bytes(1 << 16)):
                time.sleep(0.001)
        ends.qemu.close()
        ends.host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ends.host.close()
        ends.until(lambda view: view.local.lost and view.far.lost)
        ends.channel(recovered=True)
        assert nothing_comes(ends.qemu)
        ends.host.sendall(streams.recv_bitmap(BLOCK))
        assert read_exactly(ends.qemu, len(streams.recv_bitmap(BLOCK))) == streams.recv_bitmap(BLOCK)


def test_a_full_return_path_does_not_stop_the_forward_stream() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        ends.host.setblocking(False)
        try:
            for _ in range(100_000):
                ends.host.send(b"x" * 4096)  # QEMU does not read it
        except BlockingIOError:
            pass
        ends.host.settimeout(DEADLINE)
        ends.qemu.sendall(b"page" * 1000)
        assert read_exactly(ends.host, 4000) == b"page" * 1000


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("reset", [False, True])
def test_a_lost_far_leg_leaves_qemus_leg_open_until_told(role: Role, reset: bool) -> None:
    with relaying(role) as ends:
        ends.channel()
        if reset:
            ends.host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ends.host.close()
        view = ends.until(lambda view: view.far.lost)
        assert view.far is (LegState.FAILED if reset else LegState.ENDED)
        assert view.local is LegState.OPEN
        assert nothing_comes(ends.qemu)
        ends.relay.close_channel(1)
        assert ends.qemu.recv(1) == b""
        assert ends.until(lambda view: view.local is LegState.CLOSED).lost_ns > 0


def test_a_command_for_an_earlier_channel_closes_nothing() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        ends.channel(recovered=True)
        ends.relay.close_channel(1)
        assert nothing_comes(ends.qemu)


def test_when_qemu_ends_the_channel_all_it_wrote_arrives_first() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        ends.qemu.sendall(b"last" * 1000)
        ends.qemu.close()
        assert read_exactly(ends.host, 4000) == b"last" * 1000
        assert ends.host.recv(1) == b""
        assert ends.until(lambda view: view.local.lost).local is LegState.ENDED


def test_what_the_destination_says_is_read_while_its_leg_is_held() -> None:
    with relaying(Role.DESTINATION) as ends:
        ends.channel()
        ends.host.close()
        ends.until(lambda view: view.far.lost)
        ends.qemu.sendall(struct.pack(">HHI", 2, 4, 3) + struct.pack(">HHI", 2, 4, 4))
        deadline = time.monotonic() + DEADLINE
        while not ends.relay.passed().running:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.parametrize("role", list(Role))
def test_pongs_alone_do_not_say_that_the_destination_runs(
    role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refault.channel.relay.RUN_SECONDS", 3600.0)
    with relaying(role) as ends:
        ends.channel()
        pongs = struct.pack(">HHI", 2, 4, 4) + struct.pack(">HHI", 2, 4, 3)
        answers, asks = (ends.qemu, ends.host) if role is Role.DESTINATION else (ends.host, ends.qemu)
        answers.sendall(pongs)
        read_exactly(asks, len(pongs))
        # A source has no RUN to carry out; a destination may not have read it yet.
        assert ends.relay.passed().running is (role is Role.SOURCE)
        ends.relay.guest_runs()
        assert ends.relay.passed().running


def lose_with(ends: Ends, *requests: bytes) -> None:
    """A first channel in which these requests pass, and its loss."""
    ends.channel()
    lose(ends, *requests)


def lose(ends: Ends, *requests: bytes) -> None:
    """These requests pass, and the channel is lost."""
    ends.host.sendall(b"".join(requests))
    read_exactly(ends.qemu, sum(map(len, requests)))
    ends.host.close()
    ends.until(lambda view: view.far.lost)
    ends.relay.close_channel(1)
    ends.until(lambda view: view.local is LegState.CLOSED)


def test_outstanding_requests_are_replayed_after_resume_ack_oldest_first() -> None:
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, request(9 * PAGE), request(3 * PAGE, None), request(5 * PAGE))
        ends.channel(recovered=True)
        handshake = received_bitmap({5, 6}, 64)
        ends.host.sendall(handshake)
        assert read_exactly(ends.qemu, len(handshake)) == handshake
        assert nothing_comes(ends.qemu)
        ends.host.sendall(RESUME_ACK)
        expected = RESUME_ACK + request(9 * PAGE) + request(3 * PAGE)  # page 5 was received
        assert read_exactly(ends.qemu, len(expected)) == expected
        assert ends.until(lambda view: view.replayed == 2).last_replay_ns > 0
        assert nothing_comes(ends.qemu)


def test_the_replay_is_in_one_write_with_resume_ack() -> None:
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, request(9 * PAGE), request(3 * PAGE))
        ends.channel(recovered=True, kind=socket.SOCK_SEQPACKET)  # where one recv takes one write
        handshake = received_bitmap(set(), 64)
        ends.host.sendall(handshake)
        assert ends.qemu.recv(4096) == handshake
        ends.host.sendall(RESUME_ACK)
        assert ends.qemu.recv(4096) == RESUME_ACK + request(9 * PAGE) + request(3 * PAGE)


def test_a_source_that_does_not_read_what_is_said_in_the_midst_of_a_replay_costs_nothing() -> None:
    many, large = 48, 256 << 20  # what is large takes long to look at
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, *(request(number * large, length=large) for number in range(many)))
        ends.qemu.close()
        local, ends.qemu = socket.socketpair()
        far, ends.host = tcp_pair()
        local.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)  # as little as there is
        ends.qemu.settimeout(DEADLINE)
        # With a preempt lane huge pages are not waited for.
        ends.relay.attach(local.detach(), far.detach(), recovered=True, may_replay=True, lanes=1)
        bitmap = streams.received(BLOCK, bytes(many * large // PAGE // 8))
        talk = threading.Thread(target=ends.host.sendall, args=(bitmap,))
        talk.start()
        read_exactly(ends.qemu, len(bitmap))
        talk.join()
        pages = lib.rf_tracker_pagemap(lib.rf_relay_tracker(ends.relay._relay))
        # Beside the pump, which is at rest: all but the last have passed again.
        assert lib.rf_pagemap_arrived(pages, 0, 0, (many - 1) * large, 1) == 0
        ends.host.sendall(RESUME_ACK)
        assert read_exactly(ends.qemu, len(RESUME_ACK)) == RESUME_ACK
        for _ in range(16):  # while the last is looked for behind the others
            ends.relay.say(2, PONG * 8)
        ends.until(lambda _: not lib.rf_pagemap_is_sweeping(pages))
        time.sleep(0.1)
        spent = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - spent < 0.03
        asked = request((many - 1) * large, length=large)
        heard = b""
        while asked not in heard:
            heard += ends.qemu.recv(4096)
        assert heard.replace(asked, b"").replace(PONG, b"") == b""


def test_the_destinations_side_replays_what_was_lost_between_the_relays() -> None:
    with relaying(Role.DESTINATION) as ends:
        ends.channel()
        lost = request(9 * PAGE, b"vga.vram") + request(3 * PAGE)
        ends.qemu.sendall(lost)
        assert read_exactly(ends.host, len(lost)) == lost
        ends.host.close()
        ends.until(lambda view: view.far.lost)
        ends.relay.close_channel(1)
        ends.until(lambda view: view.local is LegState.CLOSED)

        ends.channel(recovered=True)
        handshake = received_bitmap(set(), 64) + received_bitmap(set(), 64, b"vga.vram") + RESUME_ACK
        ends.qemu.sendall(handshake + request(3 * PAGE))  # this one it asks for again by itself
        expected = handshake + request(3 * PAGE) + request(9 * PAGE, b"vga.vram")
        assert read_exactly(ends.host, len(expected)) == expected
        ends.qemu.sendall(request(5 * PAGE, None))
        expected = request(5 * PAGE)  # of pc.ram, as the destination means it
        assert read_exactly(ends.host, len(expected)) == expected


def test_a_bitmap_with_pages_that_were_never_sent_never_reaches_the_source_whole() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        stream = streams.postcopy_stream()[:-1]
        ends.qemu.sendall(stream)
        read_exactly(ends.host, len(stream))
        lose(ends, request(9 * PAGE))
        foreign = received_bitmap({5, 9}, 64)
        ends.channel(recovered=True)
        ends.host.sendall(foreign + RESUME_ACK)
        ends.until(lambda view: view.far is LegState.REFUSED)
        assert read_exactly(ends.qemu, len(foreign) - 8) == foreign[:-8]
        assert nothing_comes(ends.qemu)
        ends.relay.close_channel(2)
        ends.until(lambda view: view.local is LegState.CLOSED)
        ends.channel(recovered=True)
        handshake = received_bitmap(set(), 64) + RESUME_ACK
        ends.host.sendall(handshake)
        expected = handshake + request(9 * PAGE)
        assert read_exactly(ends.qemu, len(expected)) == expected


def test_a_forbidden_replay_is_not_made() -> None:
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, request(9 * PAGE))
        ends.channel(recovered=True, may_replay=False)
        handshake = received_bitmap(set(), 64) + RESUME_ACK
        ends.host.sendall(handshake)
        assert read_exactly(ends.qemu, len(handshake)) == handshake
        assert nothing_comes(ends.qemu)


def test_the_destinations_requests_wait_for_resume_ack_too() -> None:
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, request(9 * PAGE))
        ends.channel(recovered=True)
        bitmap = received_bitmap(set(), 64)
        ends.host.sendall(request(9 * PAGE) + PONG + bitmap)
        assert read_exactly(ends.qemu, len(PONG + bitmap)) == PONG + bitmap
        assert nothing_comes(ends.qemu)
        ends.host.sendall(RESUME_ACK)
        expected = RESUME_ACK + request(9 * PAGE)
        assert read_exactly(ends.qemu, len(expected)) == expected
        assert ends.relay.look().held == 1
        assert nothing_comes(ends.qemu)  # it asked itself: no replay beside it


def test_requests_for_which_there_is_no_room_while_they_are_held_back_are_replayed() -> None:
    pages = 1 << 15
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, request(0))
        ends.channel(recovered=True)
        bitmap = received_bitmap(set(), pages)
        ends.host.sendall(request(0) + bitmap)
        assert read_exactly(ends.qemu, len(bitmap)) == bitmap
        ends.host.sendall(b"".join(request(number * PAGE, None) for number in range(1, pages)) + RESUME_ACK)
        assert read_exactly(ends.qemu, len(RESUME_ACK)) == RESUME_ACK
        asked: set[int] = set()
        while len(asked) < pages:
            kind, length = struct.unpack(">HH", read_exactly(ends.qemu, 4))
            start, _ = struct.unpack(">QI", read_exactly(ends.qemu, length)[:12])
            assert kind in (3, 4)
            asked.add(start)


@pytest.mark.parametrize("role", list(Role))
def test_a_request_that_counts_on_a_name_of_the_channel_before_does_not_pass(role: Role) -> None:
    """QEMU may have lost that name, and remembers that of a replay; the destination asks again at RESUME."""
    with relaying(role) as ends:
        ends.channel()
        says, hears = (ends.host, ends.qemu) if role is Role.SOURCE else (ends.qemu, ends.host)
        says.sendall(request(9 * PAGE))
        read_exactly(hears, len(request(9 * PAGE)))
        ends.relay.close_channel(1)
        ends.until(lambda view: view.local is LegState.CLOSED)
        ends.channel(recovered=True, may_replay=False)
        says, hears = (ends.host, ends.qemu) if role is Role.SOURCE else (ends.qemu, ends.host)
        bitmap = received_bitmap(set(), 64)
        own = request(PAGE) + request(2 * PAGE, None)
        says.sendall(request(5 * PAGE, None) + bitmap + RESUME_ACK + own)
        expected = bitmap + RESUME_ACK + own
        assert read_exactly(hears, len(expected)) == expected


UNREADABLE = {
    "a message of no known type": streams.message(99, bytes(1000)),
    "a known one that is too long": streams.message(2, bytes(5)),
    "a received bitmap of another size": received_bitmap(set(), 128),
    "a received bitmap of an unknown RAM block": received_bitmap(set(), 64, b"other"),
}


@pytest.mark.parametrize("unreadable", UNREADABLE)
def test_requests_wait_for_resume_ack_whatever_else_the_destination_says(unreadable: str) -> None:
    """A source of 10.0 with postcopy-preempt aborts on one that comes before."""
    said = UNREADABLE[unreadable]
    stream = streams.postcopy_stream()[:-1]
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        ends.qemu.sendall(stream)
        read_exactly(ends.host, len(stream))
        lose(ends, request(9 * PAGE), request(8 * PAGE))
        ends.channel(recovered=True)
        ends.host.sendall(request(9 * PAGE) + said + request(7 * PAGE) + PONG)
        assert read_exactly(ends.qemu, len(said + PONG)) == said + PONG
        assert nothing_comes(ends.qemu)
        assert ends.relay.opaque_reason() is not None
        ends.host.sendall(request(6 * PAGE) + RESUME_ACK + request(5 * PAGE))
        expected = RESUME_ACK + b"".join(request(page * PAGE) for page in (9, 7, 6, 5))
        assert read_exactly(ends.qemu, len(expected)) == expected
        assert nothing_comes(ends.qemu)  # and nothing is replayed


def test_requests_that_wait_are_dropped_where_no_resume_ack_can_be_seen_any_more() -> None:
    """The source reads no further than a wrong end mark, and nothing before that may be a request."""
    bad = received_bitmap(set(), 64)[:-1] + b"x"
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, request(9 * PAGE))
        ends.channel(recovered=True)
        ends.host.sendall(request(9 * PAGE) + bad + PONG)
        assert read_exactly(ends.qemu, len(bad + PONG)) == bad + PONG
        assert nothing_comes(ends.qemu)
        ends.channel(recovered=True)
        handshake = received_bitmap(set(), 64) + RESUME_ACK
        ends.host.sendall(handshake)
        expected = handshake + request(9 * PAGE)
        assert read_exactly(ends.qemu, len(expected)) == expected


@pytest.mark.parametrize("recovered", [False, True])
def test_what_cannot_be_read_is_never_held_back(recovered: bool) -> None:
    server_hello = b"\x16\x03\x03\x00\x7a" + bytes(122)
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, request(9 * PAGE))
        ends.channel(recovered=recovered)
        for said in (server_hello[:5], server_hello[5:], b"\x17\x03\x03\x00\x05later", RESUME_ACK):
            ends.host.sendall(said)
            assert read_exactly(ends.qemu, len(said)) == said
        assert ends.relay.opaque_reason() == "it is encrypted (TLS)"


def test_a_request_without_a_name_after_a_replay_is_given_the_one_it_means() -> None:
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, request(9 * PAGE, b"vga.vram"))
        ends.channel(recovered=True)
        handshake = received_bitmap(set(), 64) + received_bitmap(set(), 64, b"vga.vram") + RESUME_ACK
        ends.host.sendall(handshake)
        expected = handshake + request(9 * PAGE, b"vga.vram")
        assert read_exactly(ends.qemu, len(expected)) == expected
        ends.host.sendall(request(PAGE) + request(2 * PAGE, None))
        expected = request(PAGE) + request(2 * PAGE, None)
        assert read_exactly(ends.qemu, len(expected)) == expected


@pytest.mark.parametrize("cut", [1, 3, 4, 9, 15, 20])
def test_a_replay_never_goes_into_a_half_written_message(cut: int) -> None:
    with relaying(Role.SOURCE) as ends:
        lose_with(ends, request(9 * PAGE, b"vga.vram"))
        ends.channel(recovered=True)
        handshake = received_bitmap(set(), 64, b"vga.vram") + RESUME_ACK
        own = request(PAGE)
        ends.host.sendall(handshake + own[:cut])
        time.sleep(0.05)
        ends.host.sendall(own[cut:])
        replayed = request(9 * PAGE, b"vga.vram")
        got = read_exactly(ends.qemu, len(handshake + own + replayed))
        assert got in (handshake + replayed + own, handshake + own + replayed)


def test_nothing_is_left_behind() -> None:
    before = descriptors_and_threads()
    for _ in range(5):
        with relaying(Role.SOURCE) as ends:
            ends.channel()
            ends.channel(recovered=True)
            ends.qemu.sendall(b"x" * 1000)
    until_nothing_is_left(before)


def test_a_silence_before_it_counts_is_no_loss() -> None:
    with relaying(Role.DESTINATION, dead_after=1) as ends:
        ends.channel()
        ends.qemu.sendall(PONG)
        read_exactly(ends.host, len(PONG))
        time.sleep(1.5)  # the destination loads its device state
        ends.host.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)  # as late as over a long way
        loaded = struct.pack(">HHI", 2, 4, 3)
        ends.qemu.sendall(loaded)
        read_exactly(ends.host, len(loaded))
        time.sleep(0.3)
        assert not ends.relay.look().far.lost


def test_an_idle_pump_costs_nothing() -> None:
    with relaying(Role.DESTINATION) as ends:
        ends.channel()
        ends.host.close()
        ends.until(lambda view: view.far.lost)
        spent = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - spent < 0.05


def changed(relay: Relay) -> None:
    assert select.select([relay.notify_fd], [], [], DEADLINE)[0]
    os.eventfd_read(relay.notify_fd)


def test_the_first_look_shows_what_is_there() -> None:
    relay = Relay(Role.SOURCE)
    local, qemu = socket.socketpair()
    far, host = tcp_pair()
    with contextlib.closing(relay), qemu:
        leg = far.fileno()
        relay.attach(local.detach(), far.detach(), recovered=False, may_replay=True)
        changed(relay)
        host.close()
        deadline = time.monotonic() + DEADLINE
        while Path(f"/proc/self/fd/{leg}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        changed(relay)
        view = relay.look()
        assert view.channel == 1
        assert view.far.lost


@pytest.mark.parametrize(
    "use",
    [
        Relay.look,
        Relay.passed,
        Relay.opaque_reason,
        Relay.pages,
        Relay.blocks,
        Relay.latency,
        Relay.complete,
        lambda relay: relay.close_channel(1),
    ],
)
def test_a_closed_relay_is_an_error_not_a_crash(use: Callable[[Relay], object]) -> None:
    relay = Relay(Role.SOURCE)
    relay.close()
    relay.close()
    assert relay.closed
    with pytest.raises(ValueError, match="closed"):
        use(relay)


@pytest.mark.parametrize("kept", [True, False])
def test_a_duplicated_leg_ends_with_the_relay_unless_it_is_kept(kept: bool) -> None:
    relay = Relay(Role.DESTINATION)
    local, qemu = socket.socketpair()
    far, host = tcp_pair()
    with contextlib.closing(relay), qemu, host, local.dup():
        relay.attach(local.detach(), far.detach(), recovered=False, may_replay=True)
        relay.close(keep_local=kept)
        assert nothing_comes(qemu) is kept


def test_what_qemu_has_asked_for_is_on_record_when_its_leg_is_closed() -> None:
    with relaying(Role.DESTINATION) as ends:
        ends.channel()
        sent = 0
        while ends.relay.look().return_bytes == sent:  # until the network takes no more
            ends.qemu.sendall(PONG * 512)
            sent += len(PONG) * 512
            time.sleep(0.01)
        ends.qemu.sendall(b"".join(request(page * PAGE) for page in range(4000)))
        ends.relay.close_channel(1)
        ends.until(lambda view: view.local is LegState.CLOSED)
        assert ends.relay.pages().recorded == 4000
