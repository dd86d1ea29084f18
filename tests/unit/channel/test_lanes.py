"""Channels with lanes (postcopy-preempt, multifd) in the pump, between sockets that this test holds the other
ends of."""

import errno
import os
import socket
import struct
import time
from pathlib import Path

import pytest

from refault.channel.relay import Lane, LegState
from refault.migration.phase import Role

from . import streams as s
from .test_relay import (
    BLOCK,
    DEADLINE,
    PAGE,
    RESUME_ACK,
    Ends,
    bytes_pass_both_ways,
    nothing_comes,
    read_exactly,
    received_bitmap,
    relaying,
    request,
    tcp_pair,
)

BEGINNING = (
    s.HEADER + s.configuration() + s.command(1) + s.advise()
    + s.start(b"ram") + s.block_list([(BLOCK, 64 * PAGE, b"")]) + s.EOS + s.footer()
)  # fmt: skip
DEVICE_STATE = s.packaged(s.command(4) + s.tail())
RESUME = s.command(9)
RESET = struct.pack("ii", 1, 0)


def forward(ends: Ends, role: Role, data: bytes) -> bytes:
    """Sends on the main connection, as the source does; what the destination gets of it at once."""
    one, other = (ends.qemu, ends.host) if role is Role.SOURCE else (ends.host, ends.qemu)
    one.sendall(data)
    return b"" if nothing_comes(other) else read_exactly(other, len(data))


def costs_nothing_for(seconds: float) -> None:
    spent = time.process_time()
    time.sleep(seconds)
    assert time.process_time() - spent < 0.05


def shut_passes(ends: Ends) -> None:
    shut = s.message(1, struct.pack(">I", 0))
    ends.host.sendall(shut)
    assert read_exactly(ends.qemu, len(shut)) == shut


def lose(end: socket.socket, *, reset: bool) -> None:
    if reset:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    end.close()


@pytest.mark.parametrize("kind", list(Lane))
@pytest.mark.parametrize("role", list(Role))
def test_the_bytes_of_lanes_pass_as_they_came_each_on_its_own(role: Role, kind: Lane) -> None:
    with relaying(role) as ends:
        ends.channel(lanes=3)
        lanes = [ends.lane(kind) for _ in range(3)]
        for qemu, host in lanes:
            bytes_pass_both_ways(qemu, host)
        assert nothing_comes(ends.qemu)
        assert nothing_comes(ends.host)


@pytest.mark.parametrize("role", list(Role))
def test_device_state_and_resume_wait_for_the_preempt_lane(role: Role) -> None:
    with relaying(role) as ends:
        ends.channel(lanes=1)
        assert forward(ends, role, BEGINNING) == BEGINNING
        assert forward(ends, role, DEVICE_STATE) == b""
        assert ends.until(lambda view: view.waiting)
        ends.lane()
        reader = ends.host if role is Role.SOURCE else ends.qemu
        assert read_exactly(reader, len(DEVICE_STATE)) == DEVICE_STATE
        assert not ends.relay.look().waiting

        ends.channel(recovered=True, lanes=1)
        asks = s.recv_bitmap(BLOCK)
        assert forward(ends, role, asks) == asks  # the source connects its lane only after the bitmaps
        assert forward(ends, role, RESUME) == b""
        ends.lane()
        reader = ends.host if role is Role.SOURCE else ends.qemu
        assert read_exactly(reader, len(RESUME)) == RESUME


@pytest.mark.parametrize("role", list(Role))
def test_what_cannot_be_read_is_not_held_back_and_asks_for_its_lane_at_once(role: Role) -> None:
    with relaying(role) as ends:
        ends.channel(lanes=1)
        assert forward(ends, role, b"no stream of QEMU's") == b"no stream of QEMU's"
        ends.until(lambda view: view.waiting)
        ends.lane()
        assert forward(ends, role, DEVICE_STATE) == DEVICE_STATE
        ends.until(lambda view: not view.waiting)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("source_ends", [True, False])
def test_an_end_is_seen_while_bytes_are_held_back(role: Role, source_ends: bool) -> None:
    with relaying(role) as ends:
        ends.channel(lanes=1)
        forward(ends, role, BEGINNING)
        forward(ends, role, DEVICE_STATE)
        costs_nothing_for(0.3)
        (ends.qemu if source_ends is (role is Role.SOURCE) else ends.host).close()
        if source_ends and role is Role.SOURCE:
            ends.until(lambda view: view.last_lanes)
            ends.relay.no_more_lanes(1)
        ends.until(lambda view: view.local.lost or view.far.lost)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("lost", ["main", "lane"])
def test_one_far_leg_lost_closes_the_others_at_once_and_no_local_leg(
    role: Role, reset: bool, lost: str
) -> None:
    with relaying(role) as ends:
        ends.channel(lanes=1)
        qemu, host = ends.lane()
        gone, other = (ends.host, host) if lost == "main" else (host, ends.host)
        lose(gone, reset=reset)
        view = ends.until(lambda view: view.far.lost)
        assert view.far is (LegState.FAILED if reset else LegState.ENDED)
        assert other.recv(1) == b""
        assert nothing_comes(ends.qemu)
        assert nothing_comes(qemu)
        ends.relay.close_channel(1)
        assert ends.qemu.recv(1) == b""
        assert qemu.recv(1) == b""


UNREAD = s.HEADER + s.configuration() + s.start(b"virtio-mem-early", 0, 1, kind=4) + s.postcopy_stream(BLOCK)


@pytest.mark.parametrize("stream", [s.postcopy_stream(BLOCK), UNREAD], ids=["read", "unread"])
def test_a_lane_that_ends_after_eof_is_no_loss(stream: bytes) -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel(lanes=1)
        _, host = ends.lane()
        ends.qemu.sendall(stream)
        assert read_exactly(ends.host, len(stream)) == stream
        host.close()  # as a destination does before it says SHUT
        time.sleep(0.05)
        shut_passes(ends)
        assert not ends.relay.look().far.lost


def test_a_lane_that_ends_is_a_loss_once_qemu_writes_on_it() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel(lanes=1)
        qemu, host = ends.lane()
        ends.qemu.sendall(UNREAD)
        assert read_exactly(ends.host, len(UNREAD)) == UNREAD
        host.close()
        costs_nothing_for(0.2)
        assert not ends.relay.look().far.lost
        qemu.sendall(s.page(9 * PAGE, BLOCK))
        ends.until(lambda view: view.far.lost)
        assert ends.host.recv(1) == b""
        costs_nothing_for(0.2)


def test_a_last_word_on_a_lane_that_has_ended_keeps_no_shut_from_the_source() -> None:
    """Some write one behind EOF; a source without SHUT would run the guest again."""
    with relaying(Role.SOURCE) as ends:
        ends.channel(lanes=1)
        qemu, host = ends.lane()
        ends.qemu.sendall(UNREAD)
        assert read_exactly(ends.host, len(UNREAD)) == UNREAD
        host.close()
        time.sleep(0.05)
        qemu.sendall(s.EOS)
        time.sleep(0.05)
        shut_passes(ends)
        costs_nothing_for(1.2)
        assert not ends.relay.look().far.lost


def test_when_qemu_ends_a_lane_all_it_wrote_arrives_first() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel(lanes=1)
        qemu, host = ends.lane()
        qemu.sendall(b"last" * 1000)
        qemu.close()
        assert read_exactly(host, 4000) == b"last" * 1000
        assert host.recv(1) == b""
        assert not ends.relay.look().local.lost


def fill(host: socket.socket) -> bytes:
    """Sends on a lane of which QEMU reads nothing until it is full; what was sent."""
    data = os.urandom(4 << 20)
    host.setblocking(False)
    sent = 0
    while sent < len(data):
        try:
            sent += host.send(data[sent:])
        except BlockingIOError:
            break
    return data[:sent]


@pytest.mark.parametrize(
    "last",
    [b"", s.EOF, s.start(b"timer", 0, 2, kind=4) + bytes(40) + s.footer(0) + s.EOF],
    ids=["in precopy", "postcopy", "completed"],
)
def test_what_a_source_sent_before_it_closed_all_reaches_the_destination_whole(last: bytes) -> None:
    """The end of one connection may come before what is under way on another; behind device state the end of
    the stream cannot be read."""
    with relaying(Role.DESTINATION) as ends:
        ends.channel(lanes=1)
        qemu, host = ends.lane(Lane.MULTIFD)
        page = fill(host)
        stream = BEGINNING + last
        ends.host.sendall(stream)
        assert read_exactly(ends.qemu, len(stream)) == stream
        host.close()
        ends.host.close()
        time.sleep(0.1)
        assert not ends.relay.look().far.lost
        assert read_exactly(qemu, len(page)) == page
        assert qemu.recv(1) == b""
        ends.until(lambda view: view.far.lost)


@pytest.mark.parametrize("stream", [b"\x16\x03\x03" + bytes(200), BEGINNING], ids=["unread", "read"])
@pytest.mark.parametrize("completed", [True, False])
def test_a_source_that_may_have_been_cut_off_ends_though_qemu_reads_no_lane(
    stream: bytes, completed: bool
) -> None:
    """QEMU's threads for multifd wait for the main one, which waits for what does not come any more; and a
    busy host may just not let them read. If one of them misses what the source had sent, the main one waits
    for it for ever (7.2, migration/multifd.c, multifd_recv_sync_main)."""
    with relaying(Role.DESTINATION) as ends:
        ends.channel(lanes=1)
        qemu, host = ends.lane(Lane.MULTIFD)
        ends.host.sendall(stream)
        page = fill(host)
        host.close()
        ends.host.close()
        assert read_exactly(ends.qemu, len(stream)) == stream
        assert nothing_comes(ends.qemu)
        spent = time.process_time()
        assert ends.qemu.recv(1) == b""
        assert time.process_time() - spent < 0.1
        assert not ends.relay.look().far.lost
        if completed:
            assert read_exactly(qemu, len(page)) == page
            assert qemu.recv(1) == b""
        else:
            ends.qemu.close()
        ends.until(lambda view: view.far.lost)


def test_what_arrives_on_the_preempt_lane_counts_as_on_the_main_one() -> None:
    with relaying(Role.DESTINATION) as ends:
        ends.channel(lanes=1)
        assert forward(ends, Role.DESTINATION, BEGINNING) == BEGINNING
        qemu, host = ends.lane()
        ends.qemu.sendall(request(9 * PAGE) + request(3 * PAGE, None))
        read_exactly(ends.host, len(request(9 * PAGE) + request(3 * PAGE, None)))
        assert ends.relay.pages().outstanding == 2
        pages = s.page(9 * PAGE, BLOCK) + s.zero(3 * PAGE)
        host.sendall(pages)
        assert read_exactly(qemu, len(pages)) == pages
        assert ends.relay.pages().outstanding == 0
        assert ends.relay.pages().recorded == 2  # both may yet be lost behind the relay


def test_nothing_is_asked_for_between_the_reconnection_and_resume_ack() -> None:
    """10.0 with preempt aborts on it (migration/migration.c, source_return_path_thread)."""
    with relaying(Role.SOURCE) as ends:
        ends.channel(lanes=1)
        ends.lane()
        ends.host.sendall(request(9 * PAGE) + request(5 * PAGE, None))
        read_exactly(ends.qemu, len(request(9 * PAGE) + request(5 * PAGE, None)))
        ends.relay.close_channel(1)
        ends.until(lambda view: view.local is LegState.CLOSED)

        ends.channel(recovered=True, lanes=1)
        bitmap = received_bitmap(set(), 64)
        ends.host.sendall(request(9 * PAGE) + bitmap)
        assert read_exactly(ends.qemu, len(bitmap)) == bitmap
        ends.lane()
        assert nothing_comes(ends.qemu)
        assert forward(ends, Role.SOURCE, RESUME) == RESUME
        assert nothing_comes(ends.qemu)
        ends.host.sendall(RESUME_ACK)
        expected = RESUME_ACK + request(9 * PAGE) + request(5 * PAGE)
        assert read_exactly(ends.qemu, len(expected)) == expected


@pytest.mark.parametrize("when", ["closed", "too many", "of an earlier channel"])
def test_a_lane_that_belongs_to_no_channel_is_closed(when: str) -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel(lanes=1)
        if when == "closed":
            ends.relay.close_channel(1)
            ends.until(lambda view: view.local is LegState.CLOSED)
        elif when == "too many":
            ends.lane()
        else:
            ends.channel(recovered=True, lanes=1)
        local, qemu = socket.socketpair()
        far, host = tcp_pair()
        ends.relay.add_lane(1, Lane.PREEMPT, local.detach(), far.detach())
        with qemu, host:
            for end in (qemu, host):
                end.settimeout(DEADLINE)
                assert end.recv(1) == b""


def test_a_lane_of_a_lost_channel_has_its_far_leg_closed_only() -> None:
    with relaying(Role.SOURCE) as ends:
        ends.channel(lanes=1)
        ends.host.close()
        ends.until(lambda view: view.far.lost)
        qemu, host = ends.lane()
        assert host.recv(1) == b""
        assert nothing_comes(qemu)


@pytest.mark.parametrize("written", [b"", b"a page"])
@pytest.mark.parametrize("role", list(Role))
def test_of_a_lost_channel_a_lane_that_qemu_ends_is_closed(role: Role, written: bytes) -> None:
    descriptors = Path("/proc/self/fd")
    with relaying(role) as ends:
        ends.channel(lanes=1)
        before = len(list(descriptors.iterdir()))
        qemu, host = ends.lane()
        ends.host.close()
        ends.until(lambda view: view.far.lost)
        assert host.recv(1) == b""
        qemu.sendall(written)
        qemu.close()
        host.close()
        deadline = time.monotonic() + DEADLINE
        while len(list(descriptors.iterdir())) > before - 2:  # both far legs of the main connection
            assert time.monotonic() < deadline, "the lane's leg stays open"
            time.sleep(0.01)


@pytest.mark.parametrize("role", list(Role))
def test_a_channel_whose_lane_cannot_be_had_is_lost_and_nothing_of_it_passes(role: Role) -> None:
    with relaying(role) as ends:
        ends.channel(lanes=1)
        forward(ends, role, BEGINNING)
        forward(ends, role, DEVICE_STATE)
        ends.until(lambda view: view.waiting)
        ends.relay.lose(1, errno.ECONNREFUSED)
        view = ends.until(lambda view: view.far.lost)
        assert view.far_loss() == "Connection refused"
        assert ends.host.recv(1) == b""
        assert nothing_comes(ends.qemu)


def test_resume_that_waits_for_its_lane_follows_it_though_the_channel_is_lost_meanwhile() -> None:
    """QEMU counts its lanes by semaphores: one that came without RESUME would pass for the next one's."""
    with relaying(Role.DESTINATION) as ends:
        ends.channel(recovered=True, lanes=1)
        forward(ends, Role.DESTINATION, s.recv_bitmap(BLOCK) + RESUME)
        ends.until(lambda view: view.waiting)
        lose(ends.host, reset=True)
        ends.until(lambda view: view.far.lost)
        qemu, _ = ends.lane()
        held = s.recv_bitmap(BLOCK) + RESUME
        assert read_exactly(ends.qemu, len(held)) == held
        assert nothing_comes(ends.qemu)
        assert nothing_comes(qemu)
