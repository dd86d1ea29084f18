"""Status pictures for tests."""

from __future__ import annotations

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
    Status,
    VmStatus,
)

BUSY = VmStatus(
    name="vm1",
    qemu=QemuStatus(connected=True, address="unix:/run/vm1.qmp", pid=4242, version="7.2.0"),
    listeners=(
        ListenerStatus(address="unix:/run/front", listening=True),
        ListenerStatus(address="unix:/run/vm/front", trouble="its directory does not exist"),
    ),
    clients=ClientsStatus(
        connected=2, total=7, commands=31, events=12, slow_disconnected=1, undecided=3, kept=True
    ),
    migration=MigrationStatus(
        role="destination",
        status="postcopy-paused",
        relay="opaque",
        relay_reason="the channel is encrypted",
        phase="postcopy-active",
        held="the recovery handshake is under way",
        pause_hidden_since=1.7e9,
    ),
    pages=PagesStatus(
        requested=120,
        repeated=5,
        arrived=110,
        replayed=3,
        outstanding=10,
        recorded=14,
        kernel_pending=1,
        kernel_waiting=8,
        blocks=(
            BlockStatus(
                name="pc.ram",
                size_bytes=1 << 30,
                page_size_bytes=4096,
                requested=119,
                arrived=110,
                replayed=3,
                outstanding=9,
            ),
            BlockStatus(
                name="/rom@etc/acpi",
                size_bytes=2 << 20,
                page_size_bytes=4096,
                requested=1,
                arrived=0,
                replayed=0,
                outstanding=1,
            ),
        ),
    ),
    pages_total=PagesTotalStatus(requested=1120, repeated=15, arrived=1110, replayed=13),
    latency_seconds=LatencyStatus(
        p50=0.002, p99=0.031, max=1.25, count=110, sum=0.75, buckets=((0.001, 20), (0.01, 100), (1.0, 109))
    ),
    recovery=RecoveryStatus(
        losses=4,
        attempts=6,
        recoveries=3,
        last_seconds=0.012,
        last_error="QEMU said no",
        given_up=True,
        durations=DurationsStatus(count=3, sum=0.5, buckets=((0.025, 2), (1.0, 3))),
        recent=(
            LossStatus(
                id="aa",
                number=3,
                role="destination",
                lost_at=1000.0,
                attempts=2,
                error="no route",
                over_at=1000.25,
                seconds=0.25,
            ),
            LossStatus(
                id="bb",
                number=4,
                role="destination",
                lost_at=2000.5,
                attempts=3,
                error="QEMU said no",
                given_up_at=2010.0,
            ),
        ),
    ),
    channel=ChannelStatus(bytes_forward=987654321, bytes_return=4321),
)
IDLE = VmStatus(name="vm2", qemu=QemuStatus(connected=False, address="tcp:127.0.0.1:4444"))
PICTURE = Status(version="1.2.3", vms=(BUSY, IDLE))
