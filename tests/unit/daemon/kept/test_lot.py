from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

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
        waiting.settimeout(5)
        end_for_all(listening)
        assert waiting.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            late.connect(listening.getsockname())
