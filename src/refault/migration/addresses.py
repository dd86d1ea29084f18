"""Where a recovery is tried: the address of the lost channel, the alternatives in order, and again."""

from __future__ import annotations

from collections.abc import Iterable

from refault.migration.endpoint import Endpoint, Inet
from refault.migration.recovery import AttemptFailed

GOOD_FOR_ONE = ("fd:", "[")
"""How addresses begin at which no other channel can be made: a descriptor, `channels` that no URI says."""


class Addresses:
    """The addresses of one migration. `first` is the one that its command named; None where none is known."""

    def __init__(self, first: Endpoint | None, alternatives: Iterable[Endpoint]) -> None:
        self.first = first
        self._alternatives = tuple(alternatives)
        self.added: tuple[Endpoint, ...] = ()
        """Those of the alternatives that clients named."""
        self._last: Endpoint | None = first
        self._next = 0

    @property
    def alternatives(self) -> list[Endpoint]:
        """Those that are not the first."""
        return [endpoint for endpoint in dict.fromkeys(self._alternatives) if endpoint != self.first]

    def add(self, endpoint: Endpoint) -> None:
        """One more, that a client named."""
        if endpoint not in (self.first, *self._alternatives):
            self._alternatives += (endpoint,)
            self.added += (endpoint,)

    @property
    def last(self) -> Endpoint | None:
        """The one tried last, or the first."""
        return self._last

    def order(self) -> list[Endpoint]:
        """All of them, the next to be tried before the others."""
        choices = ([self.first] if self.first is not None else []) + self.alternatives
        at = self._next % len(choices) if choices else 0
        return choices[at:] + choices[:at]

    @property
    def known(self) -> bool:
        """Whether there is one at which another channel can be made."""
        return any(not endpoint.uri.startswith(GOOD_FOR_ONE) for endpoint in self.order())

    def tried(self, endpoint: Endpoint) -> None:
        """One was tried: the one after it comes next."""
        order = self.order()
        self._last = endpoint
        self._next += order.index(endpoint) + 1 if endpoint in order else 0

    def recovered(self) -> None:
        """The one tried last carries the channel: the next recovery begins with it."""
        order = self.order()
        self._next += order.index(self._last) if self._last in order else 0

    def moved(self, endpoint: Endpoint) -> None:
        """The channel is at another address, by a client's command."""
        self.first = self._last = endpoint
        self._next = 0


def inet_of(endpoint: Endpoint | None) -> Inet:
    """The endpoint as one that can be dialled. Raises AttemptFailed where refault cannot."""
    if not isinstance(endpoint, Inet):
        raise AttemptFailed(f"the relay cannot dial {endpoint.uri if endpoint else 'no address'}")
    return endpoint
