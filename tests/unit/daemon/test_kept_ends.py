"""QEMU's share in our ends of a channel's local legs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import cast

import pytest

from refault.daemon.kept_ends import KeptEnds
from refault.daemon.local import Executes

NOT_ASKED = cast(Executes, None)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5.0)
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
