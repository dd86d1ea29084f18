"""Which of its addresses a session is dialled at next, and whether one of them may yet know it."""

from __future__ import annotations

from collections.abc import Sequence

from refault.migration.endpoint import Inet

TRIES = 3
"""Connections at one address that come to nothing in a row before the next address is dialled."""


class Whereto:
    """A session stays at the address that it has. It goes on to the next one where nobody is reached, where
    it is not known, and where connections come to nothing again and again."""

    def __init__(self) -> None:
        self._at: Inet | None = None
        self._stays = False
        self._tries = 0
        self._unknown: set[Inet] = set()

    def next(self, addresses: Sequence[Inet]) -> Inet:
        """Of these, which are not none; from here on it counts as not reached."""
        at = self._at
        if at is None or at not in addresses:
            at = addresses[0]
        elif not self._stays:
            at = addresses[(addresses.index(at) + 1) % len(addresses)]
        if not self._stays or at != self._at:
            self._tries = 0
        self._stays = False
        self._at = at
        return at

    def connected(self) -> None:
        """Somebody has accepted there."""
        self._tries += 1
        self._stays = self._tries < TRIES

    def silent(self) -> None:
        """Who has accepted says nothing."""
        self._stays = False

    def unknown(self, addresses: Sequence[Inet]) -> bool:
        """The session is not known there; whether it is not at any of these: another host may have taken an
        address."""
        if self._at is not None:
            self._unknown.add(self._at)
        self._stays = False
        return self._unknown.issuperset(addresses)

    def carried(self) -> None:
        """The session has a connection there."""
        self._unknown.clear()

    def of_use(self) -> None:
        """It was more than just made."""
        self._tries = 0
        self._stays = True
