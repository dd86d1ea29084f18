"""What the daemon was asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from refault.channel.relay import DEAD_AFTER_SECONDS
from refault.daemon.address import Address
from refault.migration.endpoint import Inet
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


@dataclass(frozen=True, kw_only=True)
class VmOptions:
    """One QEMU and how it is fronted."""

    name: str
    """The VM's name, in messages, metrics, and the names of files."""
    qemu: Address
    """QEMU's monitor."""
    listen: tuple[Address, ...]
    """Where clients come; at least one."""
    relay: Literal["auto", "off"] = "auto"
    recover_uris: tuple[str, ...] = ()
    """Other addresses of the destination: it listens there, the source dials them, in this order."""
    incoming: tuple[Inet, str] | None = None
    """Where a destination is to be found by others, and the path at which its QEMU listens by its command
    line."""
    state_dir: Path
    patience: Patience = Patience()


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """What is one for all VMs."""

    metrics: Address | None = None
    """Where the metrics are served."""
    control: Address
    """The socket file that tells the status."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(VmOptions, HostOptions):
    """One VM, and a daemon for it alone."""
