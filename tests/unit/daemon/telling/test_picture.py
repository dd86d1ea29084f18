"""The VM's picture: what is added up over its migrations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from refault.daemon.known.counters import Counters
from refault.daemon.telling.picture import _pages_total


def test_arrived_pages_do_not_become_fewer_by_a_loss() -> None:
    pages: Any = SimpleNamespace(requested=9, repeated=0, arrived=7, replayed=0, reopened=0)
    relay: Any = SimpleNamespace(pages=lambda: pages)
    counters = Counters()
    before = _pages_total(counters, relay).arrived
    pages.arrived, pages.reopened = 5, 2  # a loss took two of them
    assert _pages_total(counters, relay).arrived == before == 7
    pages.arrived = 7  # they came again
    assert _pages_total(counters, relay).arrived == 9
