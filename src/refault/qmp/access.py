"""Who may speak at a listener and what is refused there: the rules, without I/O.

A rule refuses by the command's name, which is read as QEMU reads it, out-of-band or not. What another command
can do in its stead is refused with it: `human-monitor-command` does anything, a `transaction` runs others.
`qmp_capabilities` is never refused: it changes nothing but the client's own session.

Read-only is a list of what may be said, so that a command that a later QEMU has is refused. Reviewed for it:
the schemas of QEMU 5.2, 7.2, 10.0 and 11.1. Of the `query-*` that it allows none changes the VM or tells a
secret that was given to QEMU as one. One has an effect: `query-rx-filter` has QEMU tell of the guest's next
change of that filter again (hw/net/virtio-net.c, virtio_net_query_rxfilter), for which who is told of one
asks anyway. Not allowed, though they are not meant to change anything:

- `query-cpu-model-expansion`, `-comparison`, `-baseline`: they make a CPU and set the properties that they
  are given on it, `realized` too, which plugs a vCPU into the guest (target/i386/cpu-sysemu.c,
  x86_cpu_from_model).
- `qom-list-types`, `qom-list-properties`, `device-list-properties`: they load modules and make objects. 7.2
  aborts when a device's module is not installed, 10.0 and 11.1 when the modules are of another build than
  they, as after an upgrade (util/module.c).
- `qom-list-get`: tells all properties, those that are secrets too.
- `x-query-*` and their like: for debugging; one reads the guest's memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

CAPABILITIES = "qmp_capabilities"
HUMAN = "human-monitor-command"

READS: Mapping[str, str] = {
    "qom-list": "names and types of an object's properties",
    "qom-get": "one property of an object; not `data`, which of a `secret` is the secret itself",
}
"""What read-only allows besides `query-*`, and what it tells."""
_SECRET_PROPERTY = "data"  # noqa: S105 - a property's name
"""crypto/secret.c, qcrypto_secret_prop_get_data(): `qom-get` of it tells what `object-add` was given."""

_SETS_PROPERTIES = frozenset(
    ("query-cpu-model-expansion", "query-cpu-model-comparison", "query-cpu-model-baseline")
)
"""The `query-*` that change something."""

MOST_READ = 64 << 10
"""Bytes of one message at a listener that is read-only: no query is near it. QEMU reads byte by byte, and
what comes behind waits, refault's own out-of-band commands too."""

_MOST_SAID = 80
"""Characters of a client's text in an error or a line of the log."""
_PLAIN = re.compile(rf"[\w.:/@#\[\]-]{{1,{_MOST_SAID}}}", re.ASCII)
_MOST_NAMES = 16


@dataclass(frozen=True)
class Callers:
    """Who may connect, by the peer credentials of a unix socket: user ids, and ids of groups of which one is
    the caller's, its primary one or a supplementary one. Empty: whoever the socket lets in.
    """

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.users or self.groups)

    def admit(self, uid: int | None, groups: Callable[[], Collection[int]]) -> bool:
        """Whether a process of `uid` may. `groups` is asked only where they decide. None is nobody."""
        if not self:
            return True
        if uid is None:
            return False
        return uid in self.users or (bool(self.groups) and not self.groups.isdisjoint(groups()))


ANYBODY = Callers()


@dataclass(frozen=True)
class Rule:
    """What a listener's clients may say, whether it is put on record, and what they are not told."""

    read_only: bool = False
    deny: frozenset[str] = frozenset()
    """Names of commands. A `_` and a `-` are the same, for in no QEMU two commands differ in that alone."""
    audit: bool = False
    hide_pause: float | None = None
    """Seconds for which a pause that refault recovers is kept from them (hiding.py); 0: not at all. None: as
    is usual for such a listener, which is 0 but at libvirt's own."""

    def refusal(self, name: str, arguments: Callable[[], Mapping[str, object]]) -> str | None:
        """Why a command is refused, in an error's words; None where it is not. `arguments` decodes them."""
        if name == CAPABILITIES or not (self.read_only or self.deny):
            return None
        why = self._read_only(name, arguments) if self.read_only else None
        why = why or (self._denied(name, arguments) if self.deny else None)
        return why and f"The command {_shortened(name)} is refused: {why}"

    @cached_property
    def _canonical(self) -> frozenset[str]:
        return frozenset(map(canonical, self.deny))

    def _read_only(self, name: str, arguments: Callable[[], Mapping[str, object]]) -> str | None:
        if not reads(name):
            return "this listener is read-only"
        if name == "qom-get" and arguments().get("property") == _SECRET_PROPERTY:
            return f"the property {_SECRET_PROPERTY} may be a secret, and this listener is read-only"
        return None

    def _denied(self, name: str, arguments: Callable[[], Mapping[str, object]]) -> str | None:
        if canonical(name) in self._canonical:
            return "it is denied at this listener"
        if name == HUMAN:
            return f"it could do what is denied at this listener ({', '.join(sorted(self.deny))})"
        if name == "transaction":
            actions = arguments().get("actions")
            for action in actions if isinstance(actions, list) else []:
                kind = action.get("type") if isinstance(action, dict) else None
                if isinstance(kind, str) and canonical(kind) in self._canonical:
                    return f"its action {_shortened(kind)} is denied at this listener"
        return None


FREE = Rule()
"""Everything may be said, as at QEMU's own socket."""
_READ_ONLY = Rule(read_only=True)


def denied(names: Collection[str]) -> frozenset[str]:
    """`Rule.deny` of these names. Raises ValueError, with a text for the operator."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(f"{name!r} is no command's name")
        if canonical(name) == canonical(CAPABILITIES):
            raise ValueError(f"without {CAPABILITIES} no client can say anything: it cannot be denied")
    return frozenset(names)


def unknown(names: Collection[str], commands: Iterable[str]) -> list[str]:
    """Of the names that are denied those that are no command of a QEMU's, in order."""
    known = frozenset(map(canonical, commands))
    return sorted(name for name in names if canonical(name) not in known)


def canonical(name: str) -> str:
    """A command's name, however its words are joined."""
    return name.replace("_", "-")


def reads(name: str) -> bool:
    """Whether a command of this name tells something and changes nothing."""
    return name in READS or (name.startswith("query-") and name not in _SETS_PROPERTIES)


def changes(name: str, arguments: Callable[[], Mapping[str, object]]) -> bool:
    """Whether a command goes on record where that is asked for: what read-only refuses, the reading of a
    secret too. `arguments` decodes them.
    """
    return _READ_ONLY.refusal(name, arguments) is not None


_IDS = ("id",)
_NODE = ("node-name", "driver")
_JOB = ("device", "job-id", "id")
_SPOKEN: Mapping[str, tuple[str, ...]] = {
    "device_add": ("driver", "id"),
    "device_del": _IDS,
    "object-add": ("qom-type", "id"),
    "object-del": _IDS,
    "netdev_add": ("type", "id"),
    "netdev_del": _IDS,
    "chardev-add": _IDS,
    "chardev-change": _IDS,
    "chardev-remove": _IDS,
    "blockdev-add": _NODE,
    "blockdev-del": _NODE,
    "blockdev-mirror": _JOB,
    "blockdev-backup": _JOB,
    "block-commit": _JOB,
    "block-stream": _JOB,
    "block-job-cancel": _JOB,
    "block-job-complete": _JOB,
    "job-cancel": _JOB,
    "job-complete": _JOB,
    "job-dismiss": _JOB,
    "qom-get": ("path", "property"),
    "qom-set": ("path", "property"),
    "set_password": ("protocol",),
    "expire_password": ("protocol",),
    "getfd": ("fdname",),
    "closefd": ("fdname",),
    "migrate": ("resume",),
    "set_link": ("name", "up"),
}
"""Arguments whose values were reviewed and go on record: names that QEMU's objects have, and switches."""


@dataclass(frozen=True)
class Record:
    """What is told of a command: never the values of arguments, but for those reviewed above."""

    command: str
    values: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    """Names of the others."""

    def __str__(self) -> str:
        words = [self.command, *(f"{name}={value}" for name, value in self.values.items())]
        if self.arguments:
            words.append(f"({', '.join(self.arguments)})")
        return " ".join(words)


def record(name: str, arguments: Mapping[str, object]) -> Record:
    """What goes on record of a command. Of a human monitor's line that is its first word."""
    if name == HUMAN:
        line = arguments.get("command-line")
        word = re.split(r"[\s/]", line.strip(), maxsplit=1)[0] if isinstance(line, str) else ""
        return Record(name, {"command-line": _plain(word)})
    spoken = {key: _value(arguments[key]) for key in _SPOKEN.get(name, ()) if key in arguments}
    others = [_plain(key) for key in arguments if key not in spoken]
    if len(others) > _MOST_NAMES:
        others[_MOST_NAMES:] = ["..."]
    return Record(_plain(name), spoken, tuple(others))


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return _plain(value) if isinstance(value, str) else "?"


def _plain(text: str) -> str:
    """Text of a client's in which nothing passes for more than that."""
    return text if _PLAIN.fullmatch(text) else "?"


def _shortened(name: str) -> str:
    return name if len(name) <= _MOST_SAID else f"{name[:_MOST_SAID]}..."
