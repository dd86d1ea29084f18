"""Makes the picture of one VM (snapshot.py) out of its monitor and its migration."""

from __future__ import annotations

from dataclasses import asdict

from refault.channel.relay import Relay
from refault.daemon.address import Address
from refault.daemon.migration import Migration
from refault.daemon.monitor import Monitor, QemuInfo
from refault.daemon.snapshot import (
    BlockStatus,
    ChannelStatus,
    ClientsStatus,
    LatencyStatus,
    MigrationStatus,
    PagesStatus,
    QemuStatus,
    RecoveryStatus,
    RelayState,
    VmStatus,
)


def picture(
    name: str, address: Address, info: QemuInfo | None, monitor: Monitor, migration: Migration
) -> VmStatus:
    """The picture, as things stand now. Call it in the trio thread."""
    relay = migration.relay
    counters = migration.counters
    return VmStatus(
        name=name,
        qemu=QemuStatus(
            connected=monitor.qemu is not None,
            address=str(address),
            pid=info.pid if info else None,
            version=info.version if info else None,
        ),
        clients=ClientsStatus(
            connected=monitor.clients,
            total=monitor.clients_total,
            commands=monitor.counters.inband + monitor.counters.oob,
            events=monitor.counters.events,
            slow_disconnected=monitor.counters.slow_clients,
        ),
        migration=_migration(migration, relay),
        pages=_pages(relay),
        latency_seconds=LatencyStatus(**asdict(relay.statistics.latency())) if relay else LatencyStatus(),
        recovery=RecoveryStatus(
            losses=counters.losses,
            attempts=counters.attempts,
            recoveries=counters.recoveries,
            last_seconds=counters.last_seconds,
            last_error=counters.last_error,
        ),
        channel=_channel(relay),
    )


def _migration(migration: Migration, relay: Relay | None) -> MigrationStatus:
    opaque = relay.opaque_reason() if relay else None
    state: RelayState = "off" if relay is None else "opaque" if opaque else "tracking"
    return MigrationStatus(
        role=migration.role.value if migration.role else "none",
        status=migration.status,
        relay=state,
        relay_reason=migration.relay_reason if relay is None else opaque,
        phase=migration.phase.value if migration.procedure else None,
        held=migration.held,
    )


def _pages(relay: Relay | None) -> PagesStatus:
    if relay is None:
        return PagesStatus()
    pages = relay.statistics.pages()
    return PagesStatus(
        requested=pages.requested,
        arrived=pages.arrived,
        replayed=pages.replayed,
        outstanding=pages.outstanding,
        recorded=pages.recorded,
        blocks=tuple(BlockStatus(**asdict(block)) for block in relay.statistics.blocks()),
    )


def _channel(relay: Relay | None) -> ChannelStatus:
    if relay is None:
        return ChannelStatus()
    view = relay.look()
    return ChannelStatus(bytes_forward=view.forward_bytes, bytes_return=view.return_bytes)
