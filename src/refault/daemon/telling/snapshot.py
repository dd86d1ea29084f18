"""What refault says about itself: one immutable picture of all VMs, published by the daemon.

`refault status` prints it, the control socket serves it as JSON, the metrics are collected from it. The field
names are an interface: docs/status.md lists them all, and they are not renamed. Everything here is frozen, so
a picture may be read from any thread; nobody who reads it reaches what the pump writes.

A Prometheus scrape runs in a thread of its own: whoever provides a ``Snapshot`` callable returns the last
picture that the daemon published, and builds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from refault import __version__

MigrationRole = Literal["source", "destination", "none"]
RelayState = Literal["tracking", "opaque", "off"]
SessionWord = Literal["none", "plain", "carried", "resuming", "over"]


class QemuStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The QEMU behind its monitor."""

    connected: bool
    address: str
    pid: int | None = None
    """From the peer credentials of the monitor's socket; null over TCP or across pid namespaces."""
    version: str | None = None
    """From the greeting, for example "7.2.0"; null before the first, and when the process has ended."""


class ListenerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An address at which refault listens: for clients, or for QEMU where that connects to it."""

    address: str
    """With the port that TCP really has."""
    listening: bool = False
    """Whether who connects reaches refault; a socket file is there only while a QEMU is."""
    trouble: str | None = None
    """Why it cannot listen, though it should."""
    mode: str | None = None
    """What the socket file is given, octal as in "0660"; null where nothing was said, as of the next two."""
    owner: int | None = None
    group: int | None = None
    allow_users: tuple[int, ...] = ()
    """Who may speak, by peer credentials; where both are empty, whoever the socket lets in."""
    allow_groups: tuple[int, ...] = ()
    read_only: bool = False
    deny: tuple[str, ...] = ()
    audit: bool = False
    hide_pause: float = 0.0
    """Seconds for which a pause that refault recovers is not told there."""


class ClientsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """QMP clients of the listen sockets, since the daemon started."""

    connected: int = 0
    total: int = 0
    commands: int = 0
    """Commands taken from clients, those that refault answers itself or refuses included."""
    events: int = 0
    """Events delivered, each counted once a client."""
    hidden_pauses: int = 0
    """Pauses that were kept from clients, for a time at least."""
    slow_disconnected: int = 0
    """Clients dropped because they did not read."""
    undecided: int = 0
    """What an earlier refault's end left in doubt: lost descriptors, and each time nobody could go on."""
    kept: bool = False
    """Whether QEMU holds their connections, so that they outlive refault."""
    not_kept: str | None = None
    """Why not; null where it does, or is not asked yet."""


class MigrationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The migration this VM takes part in, or the last one."""

    role: MigrationRole = "none"
    status: str | None = None
    """QEMU's word, for example "postcopy-active"."""
    relay: RelayState = "off"
    """Whether the channel passes and is decoded ("tracking"), passes unread ("opaque"), or not ("off")."""
    relay_reason: str | None = None
    """Why the relay does not track."""
    phase: str | None = None
    """The phase that decides whether a local leg may be closed (docs/architecture.md)."""
    held: str | None = None
    """Why a local leg is held open though its other side is lost."""
    pause_hidden_since: float | None = None
    """Unix time since which a pause is kept from clients whose listener asks for that; null where none is."""


class BlockStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Page requests in one RAM block. A page here is a host page of the block: what a fault asks for."""

    name: str
    size_bytes: int
    page_size_bytes: int
    requested: int = 0
    arrived: int = 0
    replayed: int = 0
    outstanding: int = 0
    present_bytes: int = 0
    """What has passed towards the destination and is not to be sent again."""
    outstanding_cells: tuple[int, ...] = ()
    """`outstanding` by the 64th of the block in which a request begins; empty where none is outstanding."""


class PagesStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Page requests of the migration, over all RAM blocks, in host pages."""

    requested: int = 0
    """Pages asked for by the destination; a repeated request is one."""
    repeated: int = 0
    """Requests that the destination QEMU made again by itself, as it does after a recovery since 5.2."""
    arrived: int = 0
    """Requested pages whose last target page has passed the relay."""
    replayed: int = 0
    """Requests that refault wrote to the source after a loss."""
    outstanding: int = 0
    """Requested pages that have not passed the relay."""
    recorded: int = 0
    """Requests that no received bitmap has confirmed; the next replay draws on these."""
    kernel_pending: int | None = None
    """Threads of a destination whose fault QEMU has not read yet; null where the kernel does not tell us."""
    kernel_waiting: int | None = None
    """All its threads that wait for a page."""
    blocks: tuple[BlockStatus, ...] = ()


class PagesTotalStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Page requests of all migrations since the daemon started, as those of `PagesStatus`; `arrived`
    takes nothing back of what a loss took with it."""

    requested: int = 0
    repeated: int = 0
    arrived: int = 0
    replayed: int = 0


class LatencyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Time from a page request passing the relay until its page passed, in seconds; null before the first."""

    p50: float | None = None
    p99: float | None = None
    max: float | None = None
    count: int = 0
    sum: float = 0.0
    buckets: tuple[tuple[float, int], ...] = ()
    """Cumulative: (upper bound in seconds, requests answered within it), bounds ascending and finite."""


class LossStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A lost channel and what became of it. Times are Unix time, in seconds."""

    id: str
    """Unlike any other's; RECOVERY_ID in the journal."""
    number: int
    """Of the daemon's losses of this VM, from 1."""
    role: MigrationRole
    lost_at: float
    attempts: int = 0
    error: str | None = None
    """What the last failed attempt failed with."""
    given_up_at: float | None = None
    over_at: float | None = None
    """When it was recovered, or the migration ended without; null while neither is."""
    seconds: float | None = None
    """From the loss until it was recovered; null where it was not."""


class DurationsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How long recoveries took, in seconds."""

    count: int = 0
    sum: float = 0.0
    buckets: tuple[tuple[float, int], ...] = ()
    """As those of `LatencyStatus`."""


class RecoveryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Lost channels and what became of them, since the daemon started."""

    losses: int = 0
    attempts: int = 0
    recoveries: int = 0
    last_seconds: float | None = None
    """Last recovery: from the loss noticed to QEMU back in postcopy-active."""
    last_error: str | None = None
    """What the last failed attempt failed with; null after a recovery."""
    given_up: bool = False
    """The last loss is older than --give-up-after: no further attempt is made for it."""
    durations: DurationsStatus = DurationsStatus()
    """Of all recoveries."""
    recent: tuple[LossStatus, ...] = ()
    """The last losses, at most 32, the newest at the end."""


class SessionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The migration channel as a session between two refaults, which outlives lost connections. Counts are of
    all migrations since the daemon started."""

    state: SessionWord = "none"
    """"plain" until the other host has shown that it has a refault; "resuming" without a connection."""
    resuming_seconds: float | None = None
    """Since when there is no connection; null where there is one, or no session."""
    sessions: int = 0
    """Channels that became sessions."""
    resumptions: DurationsStatus = DurationsStatus()
    """From the loss of a connection until bytes went on over the next."""
    retransmitted_bytes: int = 0
    """What was sent more than once, for a connection was lost."""
    kept_bytes: int = 0
    """What its rings hold now: not acknowledged, or not taken."""
    ring_bytes: int = 0
    """The memory that its rings have."""


class ChannelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the migration channel that passed the relay, since the daemon started."""

    bytes_forward: int = 0
    """Source to destination: pages."""
    bytes_return: int = 0
    """Destination to source: page requests."""


class StateStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a restarted refault would know of the migration (the files in --state-dir)."""

    error: str | None = None
    """What it would not know now, and why; null where it knows all."""
    errors: int = 0
    """Times that a file could not be written, read or removed, since the daemon started."""
    torn: int = 0
    """Page requests that an earlier refault had on record and that were torn in its file, since then."""


class VmStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One VM."""

    name: str
    qemu: QemuStatus
    listeners: tuple[ListenerStatus, ...] = ()
    clients: ClientsStatus = ClientsStatus()
    migration: MigrationStatus = MigrationStatus()
    pages: PagesStatus = PagesStatus()
    pages_total: PagesTotalStatus = PagesTotalStatus()
    latency_seconds: LatencyStatus = LatencyStatus()
    recovery: RecoveryStatus = RecoveryStatus()
    channel: ChannelStatus = ChannelStatus()
    session: SessionStatus = SessionStatus()
    state: StateStatus = StateStatus()
    leaving: str | None = None
    """Why it is about to be fronted no more, as soon as that harms nothing; null where it stays."""
    internal_errors: int = 0
    """How often its clients were disconnected and served anew for an error of refault's own."""
    internal_error: str | None = None
    """The last of them; null before the first."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One daemon: the root of the JSON document."""

    version: str = __version__
    """refault's."""
    log_lines_dropped: int = 0
    """Lines of the log that nobody will read, since the daemon started."""
    troubles: tuple[str, ...] = ()
    """What refault itself cannot have now and tries again to get, a line for each."""
    vms: tuple[VmStatus, ...] = ()


Snapshot = Callable[[], Status]
DecodeError = msgspec.DecodeError


def part(vm: VmStatus) -> msgspec.Raw:
    """What stands in the document of one VM."""
    return msgspec.Raw(msgspec.json.encode(vm))


def of_parts(status: Status, parts: Iterable[msgspec.Raw]) -> Status:
    """`status`, for `encode` alone, with these in place of its VMs: what takes long is done in them."""
    return msgspec.structs.replace(status, vms=tuple(parts))


def encode(status: Status) -> bytes:
    """The JSON document, one line with its newline."""
    return msgspec.json.encode(status) + b"\n"


def decode(document: bytes) -> Status:
    """Reads a document that :func:`encode` wrote, by this or a newer refault (unknown fields are ignored).

    Raises `DecodeError` for anything else.
    """
    return msgspec.json.decode(document, type=Status)
