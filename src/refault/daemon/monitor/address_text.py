"""Addresses of QMP sockets, read from QEMU's own words for them.

What stands behind `unix:` or `tcp:` is read as QEMU reads it: chardev/char.c, qemu_chr_parse_compat();
util/qemu-option.c, get_opt_name_value() and get_opt_value(); chardev/char-socket.c, qemu_chr_parse_socket()
and qmp_chardev_validate_socket(). docs/qmp.md lists what is different.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

from refault.daemon.host.errors import must_be_one_line
from refault.daemon.host.paths import SUN_PATH
from refault.daemon.monitor.address import Address
from refault.qmp.access import Callers, Rule, denied

_BOOLEANS = {"on": True, "yes": True, "true": True, "y": True} | {
    "off": False,
    "no": False,
    "false": False,
    "n": False,
}
_IDLE = frozenset({"id", "delay", "nodelay"})
"""Taken and without effect: refault's TCP is never delayed."""
_SWITCHES = {
    "telnet": "refault speaks QMP and nothing around it",
    "tn3270": "refault speaks QMP and nothing around it",
    "websocket": "refault speaks QMP and nothing around it",
    "mux": "every client of refault has the monitor to itself",
    "logappend": "refault keeps no copy of what is said",
}
"""What may only be off."""
_FOREIGN = {
    "tls-creds": "refault has no keys: use a unix socket, or a tunnel",
    "tls-authz": "refault has no keys: use a unix socket, or a tunnel",
    "logfile": "refault keeps no copy of what is said",
    "fd": "refault takes no open descriptor: name the socket",
}
MOST_HIDDEN = 3600
"""Seconds for which a pause can be kept from clients."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_EXPECTED = "expected unix:/path, /path or tcp:HOST:PORT"


class _Options:
    """The options of one address, the last of a name winning; each is taken out as it is read."""

    def __init__(self, text: str, first: str | None) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in _split(text, first):
            self._values.setdefault(name, []).append(value)

    def texts(self, name: str) -> list[str]:
        """Of an option that may be said more than once, all that was."""
        return self._values.pop(name, [])

    def text(self, name: str) -> str | None:
        values = self.texts(name)
        return values[-1] if values else None

    def switch(self, name: str) -> bool | None:
        value = self.text(name)
        if value is None:
            return None
        if value not in _BOOLEANS:
            raise ValueError(f"'{name}={value}': {name} is on or off")
        return _BOOLEANS[value]

    def number(self, name: str) -> int | None:
        value = self.text(name)
        if value is None:
            return None
        try:
            number = int(value, 0)
        except ValueError:
            number = -1
        if number < 0:
            raise ValueError(f"'{name}={value}': {name} is a number")
        return number

    def seconds(self, name: str, most: int) -> float | None:
        value = self.text(name)
        if value is None:
            return None
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if number != 0 and not 1 <= number <= most:
            raise ValueError(f"'{name}={value}': {name} is 0 or a number of seconds from 1 to {most}")
        return number

    def finish(self) -> None:
        """Refuses what nobody took."""
        for name, reason in _SWITCHES.items():
            if self.switch(name):
                raise ValueError(f"'{name}' is not possible: {reason}")
        for name in self._values:
            if name in _FOREIGN:
                raise ValueError(f"'{name}' is not possible: {_FOREIGN[name]}")
            if name not in _IDLE:
                raise ValueError(f"'{name}' is not an option that means something here")


def _split(text: str, first: str | None) -> list[tuple[str, str]]:
    """Names and values as QEMU's option parser finds them; `first` names a value that stands alone first."""
    found = []
    at = 0
    while at < len(text):
        end = next((i for i in range(at, len(text)) if text[i] in "=,"), len(text))
        if text[end : end + 1] == "=":
            name = text[at:end]
            value, at = _value(text, end + 1)
        elif first is not None:
            name = first
            value, at = _value(text, at)
        else:
            flag, at = text[at:end], end
            name, value = (flag[2:], "off") if flag.startswith("no") else (flag, "on")
        found.append((name, value))
        first = None
        at += 1
    return found


def _value(text: str, at: int) -> tuple[str, int]:
    """The value that begins at `at`, in which a doubled comma is one comma, and where it ends."""
    value = ""
    while True:
        comma = text.find(",", at)
        if comma < 0:
            return value + text[at:], len(text)
        value += text[at:comma]
        if text[comma + 1 : comma + 2] != ",":
            return value, comma
        value += ","
        at = comma + 2


def parse_address(text: str, *, server: bool = False) -> Address:
    """Reads `unix:/path`, a bare `/path` or `tcp:HOST:PORT` (`tcp:[IPV6]:PORT`) with QEMU's options behind
    it, and refault's own: `mode=`, `owner=` and `group=`, and at a listener's those of `with_access`.

    `server` is what holds where nothing is said: False for QEMU's address, True for a listener's. Raises
    ValueError, with a text for the operator.
    """
    try:
        return _parse(text, server)
    except ValueError as error:
        raise ValueError(f"address {text!r}: {error}") from None


def with_access(
    address: Address,
    *,
    allow_users: Sequence[str | int] = (),
    allow_groups: Sequence[str | int] = (),
    read_only: bool = False,
    deny: Sequence[str] = (),
    audit: bool = False,
    hide_pause: float | None = None,
) -> Address:
    """A listener's address with rules of who may speak there, and what: names or numbers of users and groups,
    and names of commands. Raises ValueError, with a text for the operator.

    Where users or groups are named, and no mode, owner or group of the socket file, that is open to all
    (0666): it is they who decide.
    """
    callers = Callers(
        frozenset(_id_of(str(user), "user", _uid) for user in allow_users),
        frozenset(_id_of(str(group), "group", _gid) for group in allow_groups),
    )
    if callers and address.path is None:
        raise ValueError(
            "allow-user and allow-group are for unix sockets: of who connects over TCP no user is known"
        )
    mode = address.mode
    if callers and address.server and not address.abstract:
        free = (address.mode, address.owner, address.group) == (None, None, None)
        mode = 0o666 if free else mode
    return replace(address, mode=mode, callers=callers, rule=Rule(read_only, denied(deny), audit, hide_pause))


def _access(options: _Options, address: Address, *, listener: bool) -> Address:
    """The address with the options of `with_access`."""
    users, groups, deny = options.texts("allow-user"), options.texts("allow-group"), options.texts("deny")
    read_only, audit = options.switch("read-only"), options.switch("audit")
    hide_pause = options.seconds("hide-pause", MOST_HIDDEN)
    said = (*users, *groups, *deny, read_only, audit, hide_pause)
    if not listener and any(each is not None for each in said):
        raise ValueError(
            "'allow-user', 'allow-group', 'read-only', 'deny', 'audit' and 'hide-pause' are for where clients"
            " come"
        )
    return with_access(
        address,
        allow_users=users,
        allow_groups=groups,
        read_only=bool(read_only),
        deny=deny,
        audit=bool(audit),
        hide_pause=hide_pause,
    )


def _parse(text: str, server: bool) -> Address:
    must_be_one_line(text)
    if text.startswith("tcp:"):
        host, port, rest = _tcp(text.removeprefix("tcp:"))
        options = _Options(rest, None)
        return _inet(options, options.text("host") or host, options.text("port") or port, server)
    if text.startswith("unix:"):
        return _unix(_Options(text.removeprefix("unix:"), "path"), server)
    if _SCHEME.match(text):
        raise ValueError(f"{_EXPECTED}; refault has no other kinds of sockets")
    if not text:
        raise ValueError(_EXPECTED)
    path, end = _value(text, 0)
    if "/" not in path and not path.startswith("~"):
        raise ValueError(f"{_EXPECTED}; a file of this directory is ./{path}")
    options = _Options(text[end + 1 :], None)
    return _unix(options, server, path)


def _tcp(rest: str) -> tuple[str, str, str]:
    """Host, port, and the options behind them."""
    if rest.startswith("//"):
        raise ValueError("it is no URL: write tcp:HOST:PORT")
    address, _, options = rest.partition(",")
    host, colon, port = address.rpartition(":")
    if not colon:
        raise ValueError("expected tcp:HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address stands in brackets, as in tcp:[::1]:4444")
    return host, port, options


def _port(text: str) -> int:
    """A port's number; it may be named as in /etc/services, which QEMU leaves to getaddrinfo."""
    if text.isascii() and text.isdigit():
        if int(text) <= 65535:
            return int(text)
    elif text:
        try:
            return socket.getservbyname(text, "tcp")
        except OSError:
            pass
    raise ValueError("expected tcp:HOST:PORT with a port up to 65535, or a service's name")


def _inet(options: _Options, host: str, port_text: str, server: bool) -> Address:
    port = _port(port_text)
    listener = server
    server, wait, reconnect = _direction(options, server)
    ipv4, ipv6 = options.switch("ipv4"), options.switch("ipv6")
    if ipv4 is False and ipv6 is False:
        raise ValueError("IPv4 and IPv6 cannot both be off")
    to = options.number("to") or 0
    if to and not server:
        raise ValueError("'to' is for who listens: it goes with server=on")
    if to and not port <= to <= 65535:
        raise ValueError(f"'to={to}': the last port is one from {port} to 65535")
    if not host and not server:
        raise ValueError("no host")
    _none_of(options, ("path",), "'path' is a unix socket's")
    _none_of(options, ("abstract", "tight"), "'{}' is for unix sockets")
    _none_of(options, ("mode", "owner", "group"), "'{}' is for socket files, and TCP has none")
    address = Address(None, host, port, server, wait, ipv4=ipv4, ipv6=ipv6, to=to, reconnect=reconnect)
    address = _access(options, address, listener=listener)
    options.finish()
    return address


def _unix(options: _Options, server: bool, path: str | None = None) -> Address:
    path = options.text("path") or path
    if not path:
        raise ValueError(f"{_EXPECTED}; there is no path, or one with a '=', which is written path=/path")
    listener = server
    server, wait, reconnect = _direction(options, server)
    abstract, tight = options.switch("abstract") or False, options.switch("tight")
    mode, owner, group = _mode(options), _id(options, "owner", _uid), _id(options, "group", _gid)
    if (mode, owner, group) != (None, None, None) and (abstract or not server):
        raise ValueError("'mode', 'owner' and 'group' are for a socket file that refault makes")
    _none_of(options, ("host", "port"), "'{}' is for tcp:")
    _none_of(options, ("ipv4", "ipv6", "to"), "'{}' is for tcp:")
    if not abstract:
        path = _file(path)
    length = len(os.fsencode(path))
    if length >= SUN_PATH:
        raise ValueError(f"a unix socket's path has at most {SUN_PATH - 1} bytes, this has {length}")
    address = Address(
        path,
        server=server,
        wait=wait,
        abstract=abstract,
        tight=tight is not False,
        reconnect=reconnect,
        mode=mode,
        owner=owner,
        group=group,
    )
    address = _access(options, address, listener=listener)
    options.finish()
    return address


def _file(path: str) -> str:
    if path.startswith("~"):
        raise ValueError("'~' means nothing here: write the whole path")
    if path.endswith("/"):
        raise ValueError("that is a directory: name the socket in it")
    if path.startswith("//"):  # a URL's, or one slash too many: the kernel takes them for one
        return "/" + path.lstrip("/")
    return path


def _direction(options: _Options, server: bool) -> tuple[bool, bool, float | None]:
    """Who connects, whether a client is waited for, and how long is waited between two tries."""
    asked = options.switch("server")
    server = server if asked is None else asked
    wait = options.switch("wait")
    seconds, milliseconds = options.number("reconnect"), options.number("reconnect-ms")
    if wait is not None and not server:
        raise ValueError("'wait' is for who listens: it goes with server=on")
    if server and (seconds is not None or milliseconds is not None):
        raise ValueError("'reconnect' is for who connects: it goes with server=off")
    if seconds is not None and milliseconds is not None:
        raise ValueError("'reconnect' and 'reconnect-ms' say the same: name one")
    pause = (seconds or 0) + (milliseconds or 0) / 1000
    return server, bool(wait), pause or None


def _none_of(options: _Options, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if options.text(name) is not None:
            raise ValueError(why.format(name))


def _mode(options: _Options) -> int | None:
    text = options.text("mode")
    if text is None:
        return None
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ValueError(f"'mode={text}': a mode is like 0660")
    return int(text, 8)


def _id(options: _Options, name: str, look_up: Callable[[str], int]) -> int | None:
    text = options.text(name)
    if text is None:
        return None
    try:
        return _id_of(text, name, look_up)
    except ValueError as error:
        raise ValueError(f"'{name}={text}': {error}") from None


def _id_of(text: str, what: str, look_up: Callable[[str], int]) -> int:
    """The number of a user or a group, which may be its name."""
    if text.isascii() and text.isdigit() and int(text) < 2**32 - 1:
        return int(text)
    try:
        return look_up(text)
    except (KeyError, ValueError):
        raise ValueError(f"this host has no such {what}: {text!r}") from None


def _uid(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    return grp.getgrnam(name).gr_gid
