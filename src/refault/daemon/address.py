"""Addresses of QMP sockets, with QEMU's own words for who connects to whom."""

from __future__ import annotations

from dataclasses import dataclass

SUN_PATH = 108
"""sizeof(sockaddr_un.sun_path): a path has one byte less (man 7 unix)."""


@dataclass(frozen=True)
class Address:
    """Where a QMP socket is, and whether refault listens there (`server`) or connects.

    `path` is a unix socket's, else None; `host` and `port` are TCP's.
    """

    path: str | None
    host: str = ""
    port: int = 0
    server: bool = False

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


def parse_address(text: str, *, server: bool = False) -> Address:
    """Reads `unix:/path`, a bare `/path` or `tcp:HOST:PORT` (`tcp:[IPV6]:PORT`), with `,server=on` or
    `,server=off` behind.

    `server` is what holds where nothing is said: False for QEMU's address, True for a listener's. Raises
    ValueError, with a text for the operator.
    """
    address, *options = text.split(",")
    for option in options:
        if option in ("server=on", "server"):
            server = True
        elif option == "server=off":
            server = False
        elif option not in ("wait=off", "nowait"):
            raise ValueError(
                f"address {text!r}: {option!r} is not known here; only server=on and server=off are"
            )
    if address.startswith("tcp:"):
        return _tcp(text, address.removeprefix("tcp:"), server)
    path = address.removeprefix("unix:")
    if not path or (path == address and "/" not in path):
        raise ValueError(f"address {text!r}: expected unix:/path, /path or tcp:HOST:PORT")
    if "\0" in path:
        raise ValueError(f"address {text!r}: a path has no zero bytes")
    length = len(path.encode())
    if length >= SUN_PATH:
        raise ValueError(
            f"address {text!r}: a unix socket's path has at most {SUN_PATH - 1} bytes, this has {length}"
        )
    return Address(path, server=server)


def _tcp(text: str, rest: str, server: bool) -> Address:
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"address {text!r}: expected tcp:HOST:PORT with a port up to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"address {text!r}: an IPv6 address stands in brackets, as in tcp:[::1]:4444")
    if not host and not server:
        raise ValueError(f"address {text!r}: no host")
    return Address(None, host, int(port), server)
