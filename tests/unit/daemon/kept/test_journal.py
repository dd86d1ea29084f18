"""The journal as it is written and as it is read, and whatever a kill or a fault makes of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refault.daemon.kept.journal import Journal, left
from refault.qmp.journal import HEADER, Kind, TornError, read

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def written(path: Path, pair: Pair) -> Journal:
    ours, theirs = pair
    journal = Journal(path)
    journal.begin(b"before")
    theirs.send(b"from a client")
    assert journal.receive(ours, 7, 100, takes=True) == (b"from a client", -1)
    assert journal.send(ours, 7, memoryview(b"to a client"), -1) == 11
    journal.append(Kind.LEFT, 7)
    socket.send_fds(theirs, [b"with"], [theirs.fileno()])
    data, fd = journal.receive(ours, 8, 100, takes=True)
    assert data == b"with"
    assert fd >= 0
    socket.socket(fileno=fd).close()
    journal.consume(ours, 8, 4)
    with pytest.raises(BlockingIOError):
        ours.recv(1, socket.MSG_DONTWAIT)
    return journal


def told(data: bytes) -> list[tuple[Kind, int, int, bytes]]:
    return [(each.kind, each.who, each.count, bytes(each.data)) for each in read(data).records]


WHOLE = [
    (Kind.RECEIVED, 7, 13, b"from a client"),
    (Kind.SENT, 7, 11, b""),
    (Kind.LEFT, 7, 0, b""),
    (Kind.PEEKED, 8, 4, b"with"),
    (Kind.CONSUMED, 8, 4, b"with"),
]


def test_what_is_written_is_read(tmp_path: Path, pair: Pair) -> None:
    journal = written(tmp_path / "j", pair)
    data = left(tmp_path / "j")
    assert data is not None
    assert bytes(read(data).before) == b"before"
    assert told(data) == WHOLE
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o600
    journal.begin(b"anew")
    assert b"from a client" not in (tmp_path / "j").read_bytes()
    journal.end()
    assert left(tmp_path / "j") is None


def test_a_call_that_the_kernel_has_done_counts_though_nothing_was_stored_behind_it(
    tmp_path: Path, pair: Pair
) -> None:
    """As a kill in that moment leaves it: the tail has not moved."""
    journal = written(tmp_path / "j", pair)
    before = bytearray(left(tmp_path / "j") or b"")
    tail = int.from_bytes(before[24:32], "little")
    ours, theirs = pair
    theirs.send(b"12345")
    journal.receive(ours, 9, 100, takes=False)
    after = bytearray(left(tmp_path / "j") or b"")
    after[24:32] = tail.to_bytes(8, "little")
    assert told(bytes(after)) == [*WHOLE, (Kind.RECEIVED, 9, 5, b"12345")]
    journal.end()


def test_it_grows_where_it_must(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.begin(b"")
    for _ in range(20):
        journal.append(Kind.CHANGED, 0, bytes(100_000))
    assert len(told(left(tmp_path / "j") or b"")) == 20
    assert journal.full
    journal.end()


@given(st.integers(0, HEADER + 200), st.binary(min_size=1, max_size=16))
def test_a_journal_that_is_torn_is_told_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, at: int, torn: bytes
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        journal = written(path, (ours, theirs))
    whole = left(path) or b""
    journal.end()
    for data in (whole[:at], whole[:at] + torn + whole[at + len(torn) :]):
        try:
            records = read(data).records
        except TornError:
            continue
        assert all(each.count >= len(each.data) for each in records)
