"""The journal as it is written and as it is read, and whatever a kill or a fault makes of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.fuzz_journal import go_on
from tests.unit.qmp.course import Course

from refault.daemon.kept.journal import Journal, left
from refault.daemon.kept.left import FORMAT, Left, decode, encode
from refault.daemon.kept.sockets import Identity
from refault.qmp.journal import HEADER, Kind, TornError, before, read

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
    received = journal.receive(ours, 8, 100, takes=True)
    assert received is not None
    data, fd = received
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
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        assert journal.receive(ours, 7, 100, takes=True) is None  # it is to be begun anew
        assert journal.receive(ours, 7, 100, takes=False) is None
        journal.begin(b"")
        assert journal.receive(ours, 7, 100, takes=True) == (b"x", -1)
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


def test_a_journal_is_read_or_refused_at_whatever_byte_it_is_torn() -> None:
    """As the next refault would: and who goes on with what is left of it comes to an end."""
    course = Course(24)
    for _ in range(10):
        course.step()
    course.first.flush()
    course.first.save()
    for _ in range(5):
        course.step()
    whole = course.first.file()
    assert go_on(whole)
    begins = HEADER + len(read(whole).before) + 4
    for at in range(len(whole)):
        assert not go_on(whole[:at])  # the file's size stands in its header
        other = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        gone_on = go_on(other)
        assert not (gone_on and HEADER <= at < begins)


def test_what_was_said_is_not_in_a_journal_that_was_given_up(tmp_path: Path, pair: Pair) -> None:
    ours, theirs = pair
    path = tmp_path / "j"
    socks = [Identity(1, b"8 octets", "name")] * 2
    secret = b"hush-hush"
    about = Left(FORMAT, "0", "unix:/q", 5, 6, socks[0], socks, [], {}, secret)
    for ends in ("here", "before"):
        journal = Journal(path)
        journal.begin(encode(about))
        theirs.send(secret)
        assert journal.receive(ours, 7, 100, takes=True) == (secret, -1)
        assert (left(path) or b"").count(secret) == 2
        if ends == "here":
            journal.give_up()
        else:
            journal.leave()
            journal.give_up_left()
        data = left(path) or b""
        assert secret not in data
        assert decode(before(data), records=False).upstream == socks[0]
        with pytest.raises(TornError, match="given up"):
            read(data)


def test_what_a_kill_left_of_a_new_one_goes_with_the_old_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.begin(b"")
    (tmp_path / "j.new").write_bytes(b"hush-hush")
    journal.end()
    assert list(tmp_path.iterdir()) == []
