"""What the daemon was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from refault.daemon.known.patience import Patience
from refault.daemon.monitor.address import Address
from refault.migration.endpoint import Inet

LogLevel = Literal["debug", "info", "warning"]


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
    session: Literal["auto", "off"] = "off"
    """Whether a relayed channel becomes a session where the other host has a refault too."""
    recover_uris: tuple[str, ...] = ()
    """Other addresses of the destination: it listens there, the source dials them, in this order."""
    incoming: tuple[Inet, str] | None = None
    """Where a destination is to be found by others, and the path at which its QEMU listens by its command
    line."""
    state_dir: Path
    patience: Patience = field(default_factory=Patience)

    @property
    def handed(self) -> bool:
        """Whether a listener was handed over with it: who comes there takes its end for QEMU's."""
        return any(address.fd is not None for address in self.listen)


def changes_in_place(old: VmOptions, new: VmOptions) -> bool:
    """Whether a VM that is served can go over from one to the other and keep its clients."""

    def fixed(options: VmOptions) -> tuple[object, ...]:
        managers = [address for address in options.listen if not address.server]
        return options.name, options.qemu, managers, options.state_dir

    return fixed(old) == fixed(new)


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """What is one for all VMs."""

    metrics: Address | None = None
    """Where the metrics are served."""
    control: Address
    """The socket file that tells the status."""


class Watch(Protocol):
    """VMs that are found by the paths of their QEMUs' sockets."""

    @property
    def pattern(self) -> str:
        """A whole path, with *, ? and [abc] in any of its parts."""

    def matches(self, path: str) -> bool:
        """Whether the pattern finds this path."""

    def vm(self, path: str) -> VmOptions:
        """The VM whose QEMU's socket is at `path`. Raises ValueError."""


class Handed(Protocol):
    """VMs whose monitors are handed over by libvirt's emulator (wrapper/)."""

    @property
    def address(self) -> Address:
        """Where they are."""

    @property
    def state_dir(self) -> Path:
        """Below which each has a directory of its name."""

    def names(self, name: str, uuid: str) -> list[str]:
        """What a VM can be called that calls itself so, the best first."""

    def vm(self, name: str, monitor: Address) -> VmOptions:
        """The VM of that name, with libvirt's own socket. Raises ValueError."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What the daemon of a host is to do."""

    host: HostOptions
    log_level: LogLevel = "info"
    vms: tuple[VmOptions, ...]
    watches: tuple[Watch, ...] = ()
    handed: Handed | None = None
