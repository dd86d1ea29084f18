"""How long a VM's migration is given for what."""

from __future__ import annotations

from dataclasses import dataclass

from refault.channel.relay import DEAD_AFTER_SECONDS
from refault.migration.recovery import Pace


@dataclass(frozen=True)
class Patience:
    """How long what is waited for, in seconds."""

    dead_after: int = DEAD_AFTER_SECONDS
    """A relay's: the other host's silence in postcopy, though asked, before the channel counts as lost."""
    stall_after: float = 15.0
    """Without a relay: no progress in postcopy before it is paused."""
    client_wait: float = Pace.client
    """After a client's migrate-pause, or its command to recover, before refault does it."""
    give_up_after: float = Pace.give_up
    """From a loss until no further attempt is made for it; infinite: there is no giving up."""
    session_patience: float | None = None
    """A session without a connection, whatever the phase; None: by phase (migration/session_patience.py)."""
