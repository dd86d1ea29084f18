"""The address in `migrate`, `migrate-incoming` and `migrate-recover`, and the same command with another
address.

QEMU: qapi/migration.json (`uri`, and `channels` since 8.2); util/qemu-sockets.c, inet_parse, for tcp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from refault.migration.versions import Version


@dataclass(frozen=True)
class Inet:
    """`tcp:HOST:PORT`; an empty host (or `0`) is every address of this machine."""

    host: str
    port: int

    @property
    def uri(self) -> str:
        """The address as QEMU's `uri` spells it."""
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


@dataclass(frozen=True)
class Other:
    """An address that the relay does not carry: `unix:`, `fd:`, `exec:`, `rdma:`, `file:`, or tcp with
    options."""

    text: str

    @property
    def uri(self) -> str:
        """The address as the client wrote it."""
        return self.text


Endpoint = Inet | Other

_INET_OPTIONS = ("ipv4", "ipv6", "keep-alive", "mptcp")
_PORT = re.compile(r"[0-9]{1,5}")
_TCP = re.compile(r"tcp:(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:,\[\]]*)):(?P<port>[0-9]{1,5})\Z")


def parse_uri(uri: str) -> Endpoint:
    """The endpoint that a migration `uri` names."""
    match = _TCP.match(uri)
    if match is None or int(match["port"]) > 65535 or not _may_be_a_host(match["v6"] or match["host"]):
        return Other(uri)
    return Inet(match["v6"] or match["host"], int(match["port"]))


def _may_be_a_host(text: str) -> bool:
    """What is said in every line of the log is one line; and QEMU takes no longer one (inet_parse)."""
    return len(text) <= 64 and text.isprintable()


def socket_address(ipv6: bool, host: str, port: int) -> dict[str, object]:
    """An address of a socket as QEMU's SocketAddress, for `query-migrate`'s `socket-address`
    (util/qemu-sockets.c, socket_sockaddr_to_address_inet)."""
    return {"type": "inet", "host": host, "port": str(port), "ipv6" if ipv6 else "ipv4": True}


def endpoint_of(arguments: Mapping[str, object]) -> Endpoint | None:
    """The endpoint in a command's arguments (`uri`, or the one main channel of `channels`); None where there
    is none."""
    uri = arguments.get("uri")
    if "uri" in arguments:
        return parse_uri(uri) if isinstance(uri, str) else None
    channels = arguments.get("channels")
    match channels:
        case None:
            return None
        case [{"channel-type": "main", "addr": {"transport": str()} as addr}]:
            return _inet(addr) or Other(_spelt(addr) or str(channels))
    return Other(str(channels))


def _inet(addr: Mapping[str, object]) -> Inet | None:
    """A MigrationAddress that is plain TCP; None for others."""
    match addr:
        case {"transport": "socket", "type": "inet", "host": str(host), "port": str(port)}:
            plain = set(addr) == {"transport", "type", "host", "port"}
            if plain and _may_be_a_host(host) and _PORT.fullmatch(port) and int(port) <= 65535:
                return Inet(host, int(port))
    return None


def _spelt(addr: Mapping[str, object]) -> str | None:
    """A MigrationAddress as a `uri`, which is all that a recovery takes (migration/migration.c,
    migrate_uri_parse); None where none says the same."""
    kind = addr.get("type") if addr["transport"] == "socket" else addr["transport"]
    match kind, {key: value for key, value in addr.items() if key not in ("transport", "type")}:
        case "inet" | "rdma", {"host": str(host), "port": str(port), **options}:
            if all(key in _INET_OPTIONS and isinstance(value, bool) for key, value in options.items()):
                bracketed = f"[{host}]" if ":" in host else host
                said = "".join(f",{key}={'on' if value else 'off'}" for key, value in options.items())
                return f"{'tcp' if kind == 'inet' else kind}:{bracketed}:{port}{said}"
        case "unix", {"path": str(path), **options} if not options:
            return f"unix:{path}"
        case "vsock", {"cid": str(cid), "port": str(port), **options} if not options:
            return f"vsock:{cid}:{port}"
        case "fd", {"str": str(name), **options} if not options:
            return f"fd:{name}"
        case "exec", {"args": ["/bin/sh", "-c", str(command)]}:
            return f"exec:{command}"
        case "file", {"filename": str(name), "offset": int(offset)}:
            return f"file:{name},offset={offset}"
    return None


_MIGRATE: dict[str, tuple[type, Version | None, Version | None]] = {
    "uri": (str, None, None),
    "channels": (list, (8, 2, 0), None),
    "blk": (bool, None, (9, 1, 0)),
    "inc": (bool, None, (9, 1, 0)),
    "detach": (bool, None, None),
    "resume": (bool, None, None),
}
"""What `migrate` takes (qapi/migration.json): its type, since when, and until when."""


def is_refused(arguments: Mapping[str, object], version: Version) -> bool:
    """Whether QEMU refuses a `migrate` for its arguments, whatever it is at."""
    if ("uri" in arguments) == ("channels" in arguments):
        return True
    for name, value in arguments.items():
        kind, since, until = _MIGRATE.get(name, (None, None, None))
        if kind is None or not isinstance(value, kind):
            return True
        if (since is not None and version < since) or (until is not None and version >= until):
            return True
    return False


def with_uri(arguments: Mapping[str, object], uri: str) -> dict[str, object]:
    """The same arguments with another address where theirs stands, `unix:`, `fd:` or plain `tcp:`; whatever
    else is wrong with them QEMU is to see."""
    channels = arguments.get("channels")
    if "uri" in arguments or not isinstance(channels, list):
        return {**arguments, "uri": uri}
    return {**arguments, "channels": [{**channel, "addr": _addr(uri)} for channel in channels]}


def _addr(uri: str) -> dict[str, object]:
    """An address as a MigrationAddress."""
    kind, _, rest = uri.partition(":")
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        return {"transport": "socket", "type": "inet", "host": host.strip("[]"), "port": port}
    return {"transport": "socket", "type": kind, {"unix": "path", "fd": "str"}[kind]: rest}


_NOWHERE = "refault:nowhere"
_NO_SUCH_ADDRESS = re.compile(rf"{_NOWHERE}|Channel list must have only one entry", re.IGNORECASE)


def with_no_address(arguments: Mapping[str, object]) -> dict[str, object]:
    """A `migrate-incoming` that QEMU refuses for its address alone, which it looks at last and touches
    nothing for (migration/migration.c, qemu_start_incoming_migration); one that lies in a network would leave
    QEMU 10.0 refusing all others."""
    channels = arguments.get("channels")
    if "uri" in arguments or not isinstance(channels, list):
        return {**arguments, "uri": _NOWHERE}
    return {**arguments, "channels": channels * 2}


def is_of_no_address(desc: str) -> bool:
    """Whether that is all that QEMU has against it."""
    return _NO_SUCH_ADDRESS.search(desc) is not None
