"""Whether the relay can carry a migration: what is not on the list of tested combinations passes
unrelayed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from refault.migration.endpoint import Endpoint, Inet
from refault.migration.phase import Role
from refault.migration.versions import Version, abilities


@dataclass(frozen=True)
class Lanes:
    """The connections of a migration's channel beside its main one."""

    preempt: bool = False
    """postcopy-preempt: one, for the pages that were asked for."""
    multifd: int = 0
    """How many multifd channels there are."""

    @property
    def count(self) -> int:
        """How many there are in all."""
        return self.multifd + self.preempt


NO_LANES = Lanes()


def lanes_of(enabled: Iterable[str], parameters: Mapping[str, object]) -> Lanes:
    """What QEMU opens beside the main connection (migration/postcopy-ram.c, multifd.c)."""
    on = set(enabled)
    channels = parameters.get("multifd-channels")
    multifd = channels if "multifd" in on and isinstance(channels, int) else 0
    return Lanes(preempt="postcopy-preempt" in on, multifd=multifd)


def has_return_path(enabled: Iterable[str]) -> bool:
    """Whether a source opens one when a migration begins (migration/migration.c, migration_thread)."""
    return bool(set(enabled) & {"return-path", "postcopy-ram", "dirty-bitmaps"})


# Tried with losses on QEMU 7.2 and 10.0; postcopy-preempt too, multifd in precopy.
TESTED_CAPABILITIES = frozenset(
    {
        "auto-converge",
        "events",
        "late-block-activate",
        "multifd",
        "pause-before-switchover",
        "postcopy-blocktime",
        "postcopy-preempt",
        "postcopy-ram",
        "return-path",
        "switchover-ack",
        "validate-uuid",
        "x-ignore-shared",
        "xbzrle",
        "zero-blocks",
    }
)


def enabled_capabilities(reply: object) -> frozenset[str]:
    """The capabilities that are on, from query-migrate-capabilities' return value."""
    if not isinstance(reply, list):
        return frozenset()
    return frozenset(
        str(item["capability"]) for item in reply if isinstance(item, Mapping) and item.get("state") is True
    )


def why_not(
    endpoint: Endpoint | None,
    enabled: Iterable[str],
    parameters: Mapping[str, object],
    *,
    role: Role,
    version: Version,
    process_is_seen: bool,
    given: bool = False,
) -> str | None:
    """Why the relay cannot carry this migration, for the operator; None where it can. `given`: over a
    connection to `endpoint` that the client has made.
    """
    if not isinstance(endpoint, Inet):
        return f"address {_shown(endpoint.uri) if endpoint else 'missing'} is not plain tcp:HOST:PORT"
    if not process_is_seen:
        return (
            "the process behind QEMU's monitor is not seen: the monitor is on TCP and takes no descriptor, or"
            " QEMU is in another pid namespace"
        )
    untested = sorted(set(enabled) - TESTED_CAPABILITIES)
    if untested:
        return f"capability {', '.join(untested)} is not among those tested with the relay"
    on = set(enabled)
    if "multifd" in on and on & {"postcopy-ram", "postcopy-preempt"}:
        return "multifd with postcopy is not among the combinations tested with the relay"
    if parameters.get("tls-creds") and lanes_of(on, parameters).count:
        return "TLS on more than one connection is not among the combinations tested with the relay"
    if parameters.get("tls-creds") and not abilities(version).survives_failed_resume:
        return "the channel uses TLS, and this QEMU does not survive a TLS handshake that comes to nothing"
    nameless = not parameters.get("tls-hostname") and (given or not endpoint.host)
    if role is Role.SOURCE and nameless and parameters.get("tls-creds"):
        # Without it QEMU takes the name that is in the address (migration/tls.c), and here none is.
        return "the channel uses TLS and tls-hostname is not set, by which QEMU would know the destination"
    return None


def _shown(address: str) -> str:
    """What a client gave as an address, as it may stand in a line of the log."""
    short = address if len(address) <= 200 else f"{address[:200]}..."
    return short if short.isprintable() else repr(short)


def has_virtio_mem(reply: object) -> bool:
    """Whether query-memory-devices' return value names a virtio-mem; True where it cannot be read."""
    if not isinstance(reply, list):
        return True
    return any(not isinstance(device, Mapping) or device.get("type") == "virtio-mem" for device in reply)


def why_not_recoverable(enabled: Iterable[str]) -> str | None:
    """Why QEMU could not recover this migration's postcopy; None where it could."""
    on = set(enabled)
    if "postcopy-ram" not in on:
        if "dirty-bitmaps" in on:
            return "dirty-bitmaps without postcopy-ram cannot be recovered"
        return None
    if "release-ram" in on:
        return "release-ram frees what a recovery would have to send again"
    if "multifd" in on:
        return "multifd with postcopy cannot be recovered by QEMU before 11.1"
    return None
