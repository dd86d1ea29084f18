"""Names of passed file descriptors: one name space in QEMU's monitor, one for each client here.

QEMU keeps the names of getfd per monitor, and a name used again replaces its descriptor (monitor/misc.c,
qmp_getfd). A client's name goes to QEMU unchanged as long as no other client that is still there uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

TAKES_FD = frozenset({b"getfd", b"add-fd"})
"""Commands that come with a descriptor."""

USES_NAMES = frozenset(
    {
        b"add_client",
        b"block-export-add",
        b"blockdev-add",
        b"blockdev-create",
        b"blockdev-reopen",
        b"chardev-add",
        b"chardev-change",
        b"closefd",
        b"device_add",
        b"display-update",
        b"dump-guest-memory",
        b"getfd",
        b"migrate",
        b"migrate-incoming",
        b"migrate-recover",
        b"nbd-server-start",
        b"netdev_add",
        b"object-add",
    }
)
"""Commands whose arguments may hold a descriptor's name."""

_SINGLE = frozenset({"fd", "fdname", "vhostfd"})
_LISTS = frozenset({"fds", "sock-fds", "vhostfds"})
_URIS = frozenset({"protocol", "uri"})


class FdNames:
    """Which client calls what by which name, and how QEMU knows it. Clients are numbers."""

    def __init__(self) -> None:
        self.upstream: dict[tuple[int, str], str] = {}
        self._owner: dict[str, int] = {}
        self.prefix = "refault"
        """What names of ours begin with. An earlier refault's descriptors are still there, so it is unlike
        what any other has used with this QEMU."""
        self.serial = 0

    def begin(self, prefix: str) -> None:
        """What names of ours begin with from here on."""
        self.prefix = prefix

    def restore(self, prefix: str, serial: int, upstream: Iterable[tuple[int, str, str]]) -> None:
        """Goes on as those of another core do; of each: client, its name, QEMU's."""
        self.prefix, self.serial = prefix, serial
        self.upstream = {(client, name): known for client, name, known in upstream}
        self._owner = {known: client for (client, _), known in self.upstream.items()}

    def __bool__(self) -> bool:
        return bool(self._owner)

    def clear(self) -> None:
        """QEMU went away, and its descriptors with it."""
        self.upstream.clear()
        self._owner.clear()

    def define(self, client: int, name: str) -> str:
        """QEMU's name for what the client passes as `name`; it replaces what the client passed as `name`
        before.
        """
        if (known := self.upstream.get((client, name))) is not None:
            return known
        upstream = name if name not in self._owner else self._private(name)
        self.upstream[client, name] = upstream
        self._owner[upstream] = client
        return upstream

    def use(self, client: int, name: str) -> str:
        """QEMU's name for the client's `name`. One that it has not, and another client has, QEMU will not
        find.
        """
        if (known := self.upstream.get((client, name))) is not None:
            return known
        return name if name not in self._owner else self._private(name)

    def has(self, client: int, name: str) -> bool:
        """Whether the client passed a descriptor as `name`."""
        return (client, name) in self.upstream

    def of(self, client: int) -> dict[str, str]:
        """What the client calls its descriptors, and how QEMU knows them."""
        return {name: upstream for (owner, name), upstream in self.upstream.items() if owner == client}

    def forget(self, client: int, name: str) -> None:
        """QEMU no longer has what the client passed as `name`."""
        if (upstream := self.upstream.pop((client, name), None)) is not None:
            del self._owner[upstream]

    def leave(self, client: int) -> None:
        """The client is gone. As with QEMU, what it passed stays, for anybody, under QEMU's name."""
        for key in [key for key in self.upstream if key[0] == client]:
            del self._owner[self.upstream.pop(key)]

    def _private(self, name: str) -> str:
        self.serial += 1
        return f"{self.prefix}-{self.serial}-{name}"


def rename(arguments: Mapping[str, object], change: Callable[[str], str]) -> dict[str, object]:
    """The arguments of a command of `USES_NAMES`, with every descriptor's name changed."""
    changed: dict[str, object] = {}
    for key, value in arguments.items():
        if key in _SINGLE and isinstance(value, str):
            changed[key] = _name(value, change)
        elif key in _LISTS and isinstance(value, str):
            changed[key] = ":".join(_name(part, change) for part in value.split(":"))
        elif key in _URIS and isinstance(value, str) and value.startswith("fd:"):
            changed[key] = "fd:" + _name(value[3:], change)
        else:
            changed[key] = _addresses(value, change)
    return changed


def _name(name: str, change: Callable[[str], str]) -> str:
    """A number is a descriptor that QEMU inherited, not a name."""
    return change(name) if name and not name[0].isdigit() else name


def _addresses(value: object, change: Callable[[str], str]) -> object:
    """Socket addresses of type fd, at any depth: {type: fd, str: NAME}, or the same with the rest under
    `data`.
    """
    if isinstance(value, list):
        return [_addresses(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "fd":
        if isinstance(name := value.get("str"), str):
            return {**value, "str": _name(name, change)}
        data = value.get("data")
        if isinstance(data, dict) and isinstance(name := data.get("str"), str):
            return {**value, "data": {**data, "str": _name(name, change)}}
    return {key: _addresses(item, change) for key, item in value.items()}
