"""What may wait in the kernels, as the pump sets it (cext/queues.h)."""

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from refault.channel.relay import Lane
from refault.migration.phase import Role

from . import streams as s
from .test_ends import BEGINNING, DEVICE_STATE, until, until_passed
from .test_relay import DEADLINE, Ends, read_exactly, relaying, tcp_pair

KIB = 1024
TCP_NOTSENT_LOWAT = 25
NO_LIMIT = 0xFFFF_FFFF
CHUNKS = 100 * 16 * KIB


@contextmanager
def joined(ends: Ends, *, recovered: bool = False) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A channel; duplicates of the pump's own ends, the local one and the far one."""
    ends.qemu.close()
    ends.host.close()
    local, qemu = socket.socketpair()
    far, host = tcp_pair()
    with local.dup() as our_local, far.dup() as our_far:
        ends.qemu, ends.host = qemu, host
        for end in (qemu, host):
            end.settimeout(DEADLINE)
        ends.relay.attach(local.detach(), far.detach(), recovered=recovered, may_replay=True)
        ends.until(lambda view: view.channel == 1)
        yield our_local, our_far


def unsent(far: socket.socket) -> int:
    return far.getsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT) & NO_LIMIT


def pages(count: int) -> bytes:
    return s.part() + s.page(0, b"pc.ram") * count


def test_a_sources_queue_is_deep_in_precopy_short_in_postcopy_and_follows_the_link() -> None:
    with relaying(Role.SOURCE) as ends, joined(ends) as (_, far):
        assert unsent(far) == 8 * KIB  # until the destination's QEMU has taken the beginning
        for piece in (BEGINNING, *[pages(15) + s.EOS + s.footer()] * 20):
            ends.qemu.sendall(piece)
            read_exactly(ends.host, len(piece))
        assert unsent(far) == NO_LIMIT
        ends.qemu.sendall(DEVICE_STATE)
        read_exactly(ends.host, len(DEVICE_STATE))
        data = pages(CHUNKS // 4096)
        sent = 0
        while sent < len(data):  # whoever reads at the end of the link is faster than the source
            piece = data[sent : sent + 16 * KIB]
            ends.qemu.sendall(piece)
            read_exactly(ends.host, len(piece))
            sent += len(piece)
        assert unsent(far) == 32 * KIB
        ends.qemu.settimeout(0.2)
        with contextlib.suppress(TimeoutError):  # and now it is not
            while True:
                ends.qemu.sendall(data)
        # What is read bit by bit makes room now and then, never for long enough.
        until(lambda: bool(ends.host.recv(4 * KIB)) and unsent(far) == 8 * KIB, "the link is full")


def test_a_recovered_channel_begins_with_short_queues() -> None:
    with relaying(Role.SOURCE) as ends, joined(ends, recovered=True) as (_, far):
        assert unsent(far) == 8 * KIB


def test_a_destinations_kernel_holds_little_of_what_it_has_not_read() -> None:
    with relaying(Role.DESTINATION) as ends, joined(ends) as (local, far):
        assert local.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 208 * KIB
        assert far.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 208 * KIB
        ends.host.sendall(BEGINNING + DEVICE_STATE + s.part())
        until_passed(ends, len(BEGINNING + DEVICE_STATE + s.part()))
        ends.host.sendall(s.page(0, b"pc.ram"))
        until(
            lambda: local.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 128 * KIB, "it is postcopy"
        )


def test_a_preempt_lane_is_as_short_as_postcopy_and_multifds_are_as_deep_as_precopy() -> None:
    with relaying(Role.DESTINATION) as ends:
        ends.channel(lanes=2)
        for kind, unread_at_qemus, unread in (
            (Lane.PREEMPT, 128 * KIB, True),
            (Lane.MULTIFD, 208 * KIB, False),
        ):
            local, qemu = socket.socketpair()
            far, host = tcp_pair()
            bounded = far.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            with qemu, host, local.dup() as our_local, far.dup() as our_far:
                before = ends.relay.look().lanes
                ends.relay.add_lane(1, kind, local.detach(), far.detach())
                ends.until(lambda view, before=before: view.lanes == before + 1)  # type: ignore[misc]
                assert our_local.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * unread_at_qemus
                now = our_far.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
                assert now == (2 * 208 * KIB if unread else bounded)
