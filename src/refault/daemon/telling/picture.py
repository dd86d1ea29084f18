"""Makes the picture of one VM (snapshot.py) out of its monitor and its migration."""

from __future__ import annotations

import itertools

import msgspec

from refault.channel.relay import Relay, SessionState
from refault.daemon.kernel.userfaultfd import Waiting, waiting
from refault.daemon.known.counters import RECOVERY_BOUNDS, Counters, Durations
from refault.daemon.migration import NO_MIGRATION, Migration
from refault.daemon.monitor.front import Front
from refault.daemon.monitor.monitor import QemuInfo
from refault.daemon.telling.snapshot import (
    BlockStatus,
    ChannelStatus,
    ClientsStatus,
    DurationsStatus,
    LatencyStatus,
    ListenerStatus,
    LossStatus,
    MigrationStatus,
    PagesStatus,
    PagesTotalStatus,
    QemuStatus,
    RecoveryStatus,
    RelayState,
    SessionStatus,
    SessionWord,
    StateStatus,
    VmStatus,
)
from refault.daemon.vm import Vm
from refault.migration.phase import Role
from refault.migration.recovery import State

LATENCY_BOUNDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
"""Upper bounds of the buckets, in seconds: a page fault takes about 1 ms, a starved one minutes."""


def picture(of: Vm) -> VmStatus:
    """The picture, as things stand now. Call it in the trio thread."""
    info, vm, migration = of.info, of.state, of.migration
    passing = migration.channels.relay if migration is not None and migration.channels is not None else None
    if migration is not None and migration.course.gone:
        migration = None
    relay = passing if migration is not None else None
    monitor = vm.monitor
    counters, troubles = vm.counters, vm.state_file.troubles
    kept, not_kept = monitor.kept
    return VmStatus(
        name=vm.name,
        qemu=QemuStatus(
            connected=monitor.qemu is not None,
            address=str(of.options.qemu),
            pid=info.pid if info else None,
            version=info.version if info else None,
        ),
        listeners=tuple(_listener(front) for front in monitor.fronts),
        clients=ClientsStatus(
            connected=monitor.clients,
            total=monitor.clients_total,
            commands=monitor.counters.commands,
            events=monitor.counters.events,
            hidden_pauses=monitor.counters.hidden_pauses,
            slow_disconnected=monitor.counters.slow_clients,
            undecided=monitor.counters.undecided,
            kept=kept,
            not_kept=not_kept,
        ),
        migration=_migration(migration, relay, monitor.pause_hidden_since),
        pages=_pages(relay, _kernel(info, migration)),
        pages_total=_pages_total(counters, passing),
        latency_seconds=_latency(relay),
        recovery=RecoveryStatus(
            losses=counters.losses,
            attempts=counters.attempts,
            recoveries=counters.recoveries,
            last_seconds=counters.last_seconds,
            last_error=counters.last_error,
            given_up=migration is not None and migration.course.policy.state is State.GIVEN_UP,
            durations=_durations(counters.durations),
            recent=tuple(msgspec.convert(loss, LossStatus, from_attributes=True) for loss in counters.recent),
        ),
        channel=_channel(counters, passing),
        session=_session(counters, passing),
        state=StateStatus(error=troubles.error, errors=troubles.count, torn=troubles.torn),
        leaving=of.leaving,
        internal_errors=of.internal_errors,
        internal_error=of.internal_error,
    )


def _listener(front: Front) -> ListenerStatus:
    address, rule = front.address, front.address.rule
    return ListenerStatus(
        address=str(address),
        listening=front.listening,
        trouble=front.trouble,
        mode=f"{address.mode:04o}" if address.mode is not None else None,
        owner=address.owner,
        group=address.group,
        allow_users=tuple(sorted(address.callers.users)),
        allow_groups=tuple(sorted(address.callers.groups)),
        read_only=rule.read_only,
        deny=tuple(sorted(rule.deny)),
        audit=rule.audit,
        hide_pause=rule.hide_pause or 0.0,
    )


def _migration(
    migration: Migration | None, relay: Relay | None, hidden_since: float | None
) -> MigrationStatus:
    if migration is None:
        return MigrationStatus(relay_reason=NO_MIGRATION, pause_hidden_since=hidden_since)
    opaque = relay.opaque_reason() if relay else None
    state: RelayState = "off" if relay is None else "opaque" if opaque else "tracking"
    return MigrationStatus(
        role=migration.course.role.value,
        status=migration.course.status,
        relay=state,
        relay_reason=migration.relay_reason if relay is None else opaque,
        phase=migration.phase.value,
        held=migration.held,
        pause_hidden_since=hidden_since,
    )


def _kernel(info: QemuInfo | None, migration: Migration | None) -> Waiting | None:
    if migration is None or migration.course.role is not Role.DESTINATION or not migration.course.under_way:
        return None
    return waiting(info.pid) if info is not None and info.pid is not None else None


def _pages(relay: Relay | None, kernel: Waiting | None) -> PagesStatus:
    pending = kernel.pending if kernel else None
    total = kernel.total if kernel else None
    if relay is None:
        return PagesStatus(kernel_pending=pending, kernel_waiting=total)
    pages = relay.pages()
    return PagesStatus(
        requested=pages.requested,
        repeated=pages.repeated,
        arrived=pages.arrived,
        replayed=pages.replayed,
        outstanding=pages.outstanding,
        recorded=pages.recorded,
        kernel_pending=pending,
        kernel_waiting=total,
        blocks=tuple(
            BlockStatus(
                name=block.name.decode(errors="replace"),
                size_bytes=block.used_length,
                page_size_bytes=block.page_size,
                requested=block.requested,
                arrived=block.arrived,
                replayed=block.replayed,
                outstanding=block.outstanding,
                present_bytes=block.present,
                outstanding_cells=block.cells if any(block.cells) else (),
            )
            for block in relay.blocks()
        ),
    )


def _pages_total(counters: Counters, relay: Relay | None) -> PagesTotalStatus:
    ended = counters.pages
    if relay is None:
        return PagesTotalStatus(
            requested=ended.requested,
            repeated=ended.repeated,
            arrived=ended.arrived,
            replayed=ended.replayed,
        )
    now = relay.pages()
    return PagesTotalStatus(
        requested=ended.requested + now.requested,
        repeated=ended.repeated + now.repeated,
        arrived=ended.arrived + now.arrived + now.reopened,
        replayed=ended.replayed + now.replayed,
    )


def _durations(durations: Durations) -> DurationsStatus:
    upto = list(itertools.accumulate(durations.counts))
    buckets = tuple(zip(RECOVERY_BOUNDS, upto[:-1], strict=True))
    return DurationsStatus(count=upto[-1], sum=durations.sum, buckets=buckets)


def _latency(relay: Relay | None) -> LatencyStatus:
    latency = relay.latency() if relay else None
    if latency is None or latency.count == 0:
        return LatencyStatus()
    return LatencyStatus(
        p50=latency.quantile_ns(0.5) / 1e9,
        p99=latency.quantile_ns(0.99) / 1e9,
        max=latency.max_ns / 1e9,
        count=latency.count,
        sum=latency.sum_ns / 1e9,
        buckets=tuple((bound, latency.at_most(int(bound * 1e9))) for bound in LATENCY_BOUNDS),
    )


_SESSION_WORDS: dict[SessionState, SessionWord] = {
    SessionState.NONE: "none",
    SessionState.PLAIN: "plain",
    SessionState.OFFERED: "plain",
    SessionState.CARRIED: "carried",
    SessionState.BETWEEN: "resuming",
    SessionState.OVER: "over",
}


def _session(counters: Counters, relay: Relay | None) -> SessionStatus:
    resumptions = _durations(counters.resumptions)
    again = counters.retransmitted
    if relay is None or relay.closed:
        return SessionStatus(sessions=counters.sessions, resumptions=resumptions, retransmitted_bytes=again)
    views = relay.sessions()
    lost = [view for view in views if view.state is SessionState.BETWEEN]
    return SessionStatus(
        state=_SESSION_WORDS[(lost or views)[0].state] if views else "none",
        resuming_seconds=max((view.lost_for or 0.0 for view in lost), default=None),
        sessions=counters.sessions,
        resumptions=resumptions,
        retransmitted_bytes=again + relay.retransmitted(),
        kept_bytes=sum(view.kept for view in views),
        ring_bytes=sum(view.rings for view in views),
    )


def _channel(counters: Counters, relay: Relay | None) -> ChannelStatus:
    forward, backward = counters.bytes_forward, counters.bytes_return
    if relay is not None:
        view = relay.look()
        forward, backward = forward + view.forward_bytes, backward + view.return_bytes
    return ChannelStatus(bytes_forward=forward, bytes_return=backward)
