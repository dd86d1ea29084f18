"""What QEMU says of how far a migration is, and the phase of a channel whose far side is lost.

A source's danger is the completion: a leg that ends in it makes QEMU 10.0 run the guest a second time and
hangs 7.2. It begins before anything on the wire shows it, and long before QEMU_VM_EOF: as soon as less is
left than can be sent within the downtime limit, in postcopy too (migration/migration.c,
migration_iteration_run and migration_completion; 7.2 and 10.0, tried). In it QEMU sends with its big lock
held, so that it answers no in-band command until all is sent. Therefore a source that answers and has more
left than that is not in the completion, nor is one that has stopped sending before the end and still
answers: it waits for room that nobody makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refault.migration.phase import ENDS_PRECOPY, Passed, Phase, Role, Told, phase_of

LOOK_AGAIN = 0.15
"""Seconds between two answers that are compared: QEMU's rate limit lets something through in each 0.1 s."""
UNSEEN = 8 << 20
"""More bytes of the guest's memory than can still leave a source whose leg is not read: the socket takes less
than 16 KiB (local.py), and a zero page is 9 bytes in it."""


@dataclass(frozen=True)
class Word:
    """An answer of QEMU's."""

    status: str | None
    runs: bool
    """A destination: it has left `inmigrate`."""
    remaining: int
    """Bytes of RAM that a source has not sent."""
    threshold: float
    """With fewer bytes than this left the source turns to the completion."""
    rate: float
    """Bytes in a second."""
    requests: int
    """Pages that the destination has asked a source for, in postcopy."""
    stands: bool = False
    """A source: its guest does not run. Not asked for where nothing depends on it."""

    @property
    def nothing_left(self) -> bool:
        """Whether a source that has not switched to postcopy has no RAM left to send."""
        return self.remaining == 0 and self.status in ENDS_PRECOPY

    @property
    def sent_all(self) -> bool:
        """The same of one whose guest stands: it has sent all there is, for while it does it answers nobody,
        and waits for its destination to say so (migration/migration.c, await_return_path_close_on_source)."""
        return self.nothing_left and self.stands

    def far_from_completion(self, seconds: float = 0.0, *, rings: int = 0) -> bool:
        """Whether a source that sends as it did will not be in the completion `seconds` after this answer.
        `rings`: bytes that its session keeps, at the most."""
        return self.remaining > self.threshold + self.rate * seconds + UNSEEN + rings


def word_of(migrate: Mapping[str, object], parameters: Mapping[str, object], *, runs: bool) -> Word:
    """The answers of query-migrate and query-migrate-parameters, as far as they tell something."""
    status = migrate.get("status")
    ram = migrate.get("ram")
    rate = _number(ram, "mbps") * 1e6 / 8
    limit = _number(parameters, "downtime-limit") / 1e3
    return Word(
        status=status if isinstance(status, str) else None,
        runs=runs,
        remaining=int(_number(ram, "remaining")),
        threshold=max(rate, _number(parameters, "avail-switchover-bandwidth")) * limit,
        rate=rate,
        requests=int(_number(ram, "postcopy-requests")),
    )


def _number(mapping: object, key: str) -> float:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    return float(value) if isinstance(value, int | float) else 0.0


def phase_after_loss(
    passed: Passed, role: Role, before: Word | None, now: Word, *, never_postcopy: bool = False
) -> Phase | None:
    """The phase of a channel whose far side is lost, from answers `LOOK_AGAIN` apart; None: ask again."""
    read = phase_of(passed, role, Told(now.status, now.runs, never_postcopy, sent_all=now.sent_all))
    if read is Phase.DONE and never_postcopy:
        return read
    again = before is not None and before.status == now.status
    if role is Role.SOURCE and now.status == "postcopy-active":
        if read is Phase.DONE:
            return read
        if now.remaining == 0 or passed.completing or passed.ended:
            return Phase.COMPLETING
        stands = again and before is not None and before.remaining == now.remaining
        return Phase.POSTCOPY if now.far_from_completion() or stands else None
    if not passed.opaque:
        return read
    if now.status == "postcopy-paused" and again:
        return Phase.POSTCOPY  # of a recovery: it has not come through the TLS handshake
    return read if again else None
