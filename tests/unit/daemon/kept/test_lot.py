from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from refault.daemon.kept import lot as lots
from refault.daemon.kept.lot import Lot
from refault.daemon.kept.sockets import cookie_of, end_for_all


@pytest.fixture
def lot() -> Iterator[Lot]:
    lot = Lot()
    yield lot
    lot.close()


def test_what_is_kept_outlives_its_owner_and_is_found_as_often_as_it_is_looked_for(lot: Lot) -> None:
    pairs = [socket.socketpair() for _ in range(600)]  # of more than one message
    cookies = {cookie_of(ours) for ours, _ in pairs}
    lot.put(ours for ours, _ in pairs)
    for ours, _ in pairs:
        ours.close()
    for _ in range(2):
        found = lot.look()
        assert {cookie_of(sock) for sock in found} == cookies
        for sock in found:
            sock.close()
    _, theirs = pairs[7]
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    lot.empty()
    assert lot.look() == []
    assert theirs.recv(1) == b""
    for _, other in pairs:
        other.close()


def test_a_listener_that_ends_for_all_leaves_nobody_waiting(lot: Lot) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("\0refault-test-lot-" + cookie_of(listening).hex())
    listening.listen(5)
    lot.put([listening])
    waiting, late = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with listening, waiting, late:
        waiting.connect(listening.getsockname())
        waiting.settimeout(20)
        end_for_all(listening)
        assert waiting.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            late.connect(listening.getsockname())


@contextmanager
def open_pair() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


def put_there(lot: Lot, *fds: int) -> None:
    """As a guest that has broken out of its QEMU can."""
    socket.send_fds(lot.entry, [b"x" * 100], fds, socket.MSG_DONTWAIT)


def mine() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_a_qemu_puts_there_that_is_no_connection_is_left_out(lot: Lot) -> None:
    with open_pair() as ours, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        put_there(lot, 0, other.fileno())
        lot.put([ours])
        had = mine()
        [found] = lot.look()
        with found:
            assert cookie_of(found) == cookie_of(ours)
        assert mine() == had
        assert lot.end() == 1
        assert mine() == had


@pytest.mark.parametrize("limit", ["_MOST_MESSAGES", "_MOST_SOCKETS"])
def test_a_qemu_that_puts_more_there_than_we_take_holds_nobody_up(
    lot: Lot, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may go on with it for as long as we look."""
    monkeypatch.setattr(lots, limit, 5)
    with open_pair() as ours:
        for _ in range(7):
            put_there(lot, ours.fileno())
        had = mine()
        with pytest.raises(OSError, match="holds more"):
            lot.look()
        assert lot.end() == (5 if limit == "_MOST_MESSAGES" else 7)
        lot.empty()
        assert mine() == had


def test_too_low_a_limit_of_files_is_told_and_nobody_is_left_out(lot: Lot) -> None:
    with open_pair() as ours:
        lot.put([ours] * 100)
        had = mine()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                lot.look()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert mine() == had
        assert lot.end() == 100


def test_descriptors_that_were_passed_to_who_has_ended_are_closed(lot: Lot) -> None:
    """Though the connection itself may be kept for hours yet."""
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with ours, theirs:
        lot.put([ours])
        for _ in range(3):
            socket.send_fds(theirs, [b"one"], [writing])
        os.close(writing)
        end_for_all(ours)
        os.set_blocking(reading, False)
        assert os.read(reading, 1) == b""
        os.close(reading)


def test_what_is_in_flight_is_counted() -> None:
    before = Lot.in_flight
    lot = Lot()
    with open_pair() as ours:
        lot.put([ours] * 300)
        assert Lot.in_flight == before + 300
        lot.empty()
        assert Lot.in_flight == before
        lot.put([ours])
    lot.close()
    assert Lot.in_flight == before


@pytest.mark.timeout(10)
def test_a_lot_that_is_full_is_told_though_qemu_has_made_it_a_blocking_one(lot: Lot) -> None:
    lot.entry.setblocking(True)
    with open_pair() as ours, contextlib.suppress(BlockingIOError):
        for _ in range(10_000):
            lot.put([ours])
        raise AssertionError("it has room for all")
