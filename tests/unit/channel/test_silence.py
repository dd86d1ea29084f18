"""A peer that falls silent, and that no kernel stands behind: this test makes its segments itself."""

import ctypes
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from refault.channel.relay import LegState, SessionEnd, SessionState
from refault.migration.phase import Role

from .test_relay import DEADLINE, relaying
from .test_session import ID, PONG

CLONE_NEWNET = 0x40000000  # sched.h
ETH_P_IP = 0x0800  # linux/if_ether.h
SYN, PUSH, ACK = 0x02, 0x08, 0x10
HERE, PEER = "10.9.9.1", "10.9.9.2"
MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
LINK = (
    f"link add here address {MACS[0]} type veth peer name there address {MACS[1]}",
    f"address add {HERE}/24 dev here",
    "link set here up",
    "link set there up",
    f"neighbour add {PEER} lladdr {MACS[1]} dev here",
)


def checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)


def packet(ports: tuple[int, int], sequence: int, acknowledged: int, flags: int, window: int) -> bytes:
    ends = socket.inet_aton(PEER) + socket.inet_aton(HERE)
    tcp = struct.pack(">HHIIBBHHH", *ports, sequence, acknowledged, 5 << 4, flags, window, 0, 0)
    tcp = tcp[:16] + checksum(ends + struct.pack(">HH", socket.IPPROTO_TCP, len(tcp)) + tcp) + tcp[18:]
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, socket.IPPROTO_TCP, 0) + ends
    return ip[:10] + checksum(ip) + ip[12:] + tcp


def answer(wire: socket.socket) -> None:
    """Takes the first segment, takes back the whole window at the second, and says nothing more."""
    here = ("there", ETH_P_IP, 0, 0, bytes.fromhex(MACS[0].replace(":", "")))
    segments = 0
    while segments < 2:
        data = wire.recv(2048)
        if data[9] != socket.IPPROTO_TCP:
            continue
        tcp = data[(data[0] & 15) * 4 :]
        source, destination, sequence, _, offset, flags = struct.unpack(">HHIIBB", tcp[:14])
        ports, length = (destination, source), len(tcp) - (offset >> 4) * 4
        if flags & SYN:
            wire.sendto(packet(ports, 1, sequence + 1, SYN | ACK, 20_000), here)
        elif length > 0 and segments == 0:
            segments = 1
            wire.sendto(packet(ports, 2, sequence + length, ACK, 20_000), here)
        elif length > 0:
            segments = 2
            wire.sendto(packet(ports, 2, sequence, ACK, 0), here)


@contextmanager
def connected() -> Iterator[socket.socket]:
    """A connection to the peer, in a network namespace that goes with it."""
    sock = socket.socket()
    failures: list[BaseException] = []
    wires: list[socket.socket] = []

    def connect() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) < 0:
                raise OSError(ctypes.get_errno(), "no namespace")
            for command in LINK:
                subprocess.run(["ip", *command.split()], check=True)
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
            wires.append(wire)
            wire.bind(("there", ETH_P_IP))
            threading.Thread(target=answer, args=(wire,), daemon=True).start()
            inside = socket.create_connection((PEER, 4444), timeout=DEADLINE)
            os.dup2(inside.detach(), sock.fileno())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    thread.join()
    try:
        if failures:
            raise failures[0]
        yield sock
    finally:
        sock.close()
        for wire in wires:
            wire.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces")
def test_silence_behind_a_window_that_closed_over_what_was_sent_is_noticed() -> None:
    """A destination short of memory drops what it is sent and takes its window back. That what is sent again
    then is not among the retransmissions that the kernel counts."""
    with relaying(Role.SOURCE, dead_after=1) as ends, connected() as far:
        ends.qemu.close()
        local, ends.qemu = socket.socketpair()
        ends.relay.attach(local.detach(), os.dup(far.fileno()), recovered=False, may_replay=True)
        ends.relay.in_postcopy()
        for data in (b"taken", b"not taken"):
            ends.qemu.sendall(data)
            time.sleep(0.3)
        view = ends.until(lambda view: view.far.lost)
        assert view.far is LegState.FAILED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces")
def test_a_connection_that_is_silent_while_a_session_is_offered_is_resumed() -> None:
    with relaying(Role.DESTINATION, dead_after=1) as ends, connected() as far:
        ends.qemu.close()
        local, ends.qemu = socket.socketpair()
        ends.relay.attach(
            local.detach(), os.dup(far.fileno()), recovered=False, may_replay=True,
            session=SessionEnd.ANSWERS, session_id=ID,
        )  # fmt: skip
        ends.relay.in_postcopy()
        for _ in range(2):
            ends.qemu.sendall(PONG)
            time.sleep(0.3)
        ends.until(lambda view: view.far.lost or ends.relay.session().state is SessionState.BETWEEN)  # type: ignore[union-attr]
        assert not ends.relay.look().far.lost
