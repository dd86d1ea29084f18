"""What `refault tunnel` was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from refault.daemon.monitor.address import Address
from refault.session.handshake import Keys

SESSION_PATIENCE = 30.0


@dataclass(frozen=True)
class TunnelOptions:
    """One end of a tunnel."""

    listen: Address
    to: Address
    answers: bool
    """The session's side is where we listen; else it is where we dial."""
    keys: Keys = field(default_factory=Keys)
    patience: float = SESSION_PATIENCE
    """Seconds without a connection to the other refault, after which both plain ends are reset."""
