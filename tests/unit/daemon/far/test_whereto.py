"""Which of its addresses a session is dialled at next."""

from __future__ import annotations

from refault.daemon.far.whereto import TRIES, Whereto
from refault.migration.endpoint import Inet

A, B, C = (Inet("192.0.2.1", port) for port in (1, 2, 3))
ALL = [A, B, C]


def test_where_nobody_is_reached_the_next_is_dialled() -> None:
    where = Whereto()
    assert [where.next(ALL) for _ in range(4)] == [A, B, C, A]


def test_where_somebody_accepts_it_stays_but_not_for_ever() -> None:
    where = Whereto()
    went = []
    for _ in range(TRIES + 1):
        went.append(where.next(ALL))
        where.connected()
    assert went == [A] * TRIES + [B]


def test_who_accepts_and_says_nothing_is_left() -> None:
    where = Whereto()
    where.next(ALL)
    where.connected()
    where.silent()
    assert where.next(ALL) == B


def test_it_is_dialled_first_where_it_was_carried() -> None:
    where = Whereto()
    for _ in range(2):
        where.next(ALL)
    for _ in range(2 * TRIES):
        where.connected()
        where.carried()
        where.of_use()
        assert where.next(ALL) == B


def test_it_is_known_nowhere_only_when_all_have_said_so() -> None:
    where = Whereto()
    for _ in range(2):
        where.next(ALL)
        assert not where.unknown(ALL)
    where.next(ALL)
    where.carried()
    assert [where.unknown(ALL) for _ in ALL if where.next(ALL)] == [False, False, True]


def test_an_address_that_is_no_more_is_left() -> None:
    where = Whereto()
    where.next(ALL)
    where.connected()
    assert where.next([C, B]) == C
