"""The options, each in one place: its name, what is written for it, how that is read, and its help.

A field ``dead_after`` is ``dead_after`` in a file and ``--dead-after`` on the command line of `refault run`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from refault.config import values
from refault.daemon.host.paths import runtime_directory, state_directory
from refault.daemon.known.patience import Patience
from refault.daemon.options import VmOptions


@dataclass(frozen=True)
class Option:
    """One option. `read` makes the daemon's value of what is written, or raises ValueError."""

    help: str
    read: Callable[[Any], object] = str
    metavar: str | None = None
    table: type[msgspec.Struct] | None = None
    """In a file what is written may be such a table instead, of which `address_of` makes the text."""


class ListenerTable(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A listener: its address, and what else stands behind that as options."""

    address: Annotated[str, Option("where clients come")]
    mode: Annotated[str | None, Option("the socket file's mode, as 0660")] = None
    owner: Annotated[str | None, Option("its user")] = None
    group: Annotated[str | None, Option("its group")] = None
    allow_users: Annotated[str | tuple[str, ...] | None, Option("who may speak there, by his user")] = None
    allow_groups: Annotated[str | tuple[str, ...] | None, Option("and by one of his groups")] = None
    read_only: Annotated[bool | None, Option("only what tells something and changes nothing", bool)] = None
    deny: Annotated[str | tuple[str, ...] | None, Option("commands that are refused")] = None
    audit: Annotated[bool | None, Option("what changes the VM is a line of the log", bool)] = None
    hide_pause: Annotated[
        int | float | None, Option("for so many seconds a pause that refault recovers is not told there")
    ] = None


_REPEATED = {"allow_users": "allow-user", "allow_groups": "allow-group"}
"""What an address calls by another name, for there it is said once for each."""


def address_of(given: Mapping[str, Any]) -> str:
    """The values of a `ListenerTable` as one address, which has commas within a value doubled."""
    words = [given["address"]]
    for key, value in given.items():
        name = _REPEATED.get(key, key.replace("_", "-"))
        for each in value if isinstance(value, tuple) else (value,):
            said = "on" if each is True else "off" if each is False else str(each).replace(",", ",,")
            if key != "address":
                words.append(f"{name}={said}")
    return ",".join(words)


class Common(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What may be said of several VMs at once: [defaults]."""

    relay: Annotated[
        Literal["auto", "off"] | None,
        Option("carry the migration channel where that can be done (auto), or recover over QMP alone (off)"),
    ] = None
    session: Annotated[
        Literal["auto", "off"] | None,
        Option("make a relayed channel one that outlives lost connections, where both hosts have refault"),
    ] = None
    session_patience: Annotated[
        int | float | None,
        Option(
            "a session is without a connection for so long before its channel counts as lost; default: 30, in"
            " the switchover 3",
            values.seconds,
            "SECONDS",
        ),
    ] = None
    dead_after: Annotated[
        int | float | None,
        Option(
            "a relayed channel counts as lost after so much silence in postcopy; default: 5",
            values.whole_seconds,
            "SECONDS",
        ),
    ] = None
    stall_after: Annotated[
        int | float | None,
        Option(
            "without a relay, a postcopy that stands still for so long is paused; default: 15",
            values.seconds,
            "SECONDS",
        ),
    ] = None
    client_wait: Annotated[
        int | float | None,
        Option(
            "what a client that paused or recovers by hand is left before refault does it; default: 10",
            values.seconds,
            "SECONDS",
        ),
    ] = None
    give_up_after: Annotated[
        int | float | None,
        Option(
            "make no further attempt for a loss that is so old; default: never give up",
            values.long_seconds,
            "SECONDS",
        ),
    ] = None


class VmTable(Common, frozen=True, kw_only=True, omit_defaults=True):
    """What is said of one VM: [vm.NAME]."""

    qemu: Annotated[str, Option("QEMU's monitor", values.qemu_address, "ADDR")]
    listen: Annotated[
        str | tuple[str, ...],
        Option(
            "where QMP clients come; may be given more than once",
            values.listen_address,
            "ADDR",
            ListenerTable,
        ),
    ]
    recover_uri: Annotated[
        str | tuple[str, ...] | None,
        Option(
            "another address of the destination, at which the channel may be recovered; tried in turn",
            values.migration_uri,
            "URI",
        ),
    ] = None
    incoming: Annotated[
        str | None,
        Option(
            "serve a QEMU that was started with -incoming unix:PATH at this address",
            values.incoming,
            "tcp:HOST:PORT,unix:PATH",
        ),
    ] = None
    state_dir: Annotated[
        str | None,
        Option(f"state files, on a tmpfs; default: {state_directory()}", values.path, "DIR"),
    ] = None


class WatchTable(Common, frozen=True, kw_only=True, omit_defaults=True):
    """VMs found by where their QEMUs' sockets are: [[watch]]."""

    qemu: Annotated[str, Option("a pattern of paths")]
    listen: Annotated[str | tuple[str, ...], Option("where the clients of each come", table=ListenerTable)]
    name: Annotated[str, Option("the name of each")] = "{stem}"


class DaemonTable(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is said of the daemon: [daemon]."""

    metrics: Annotated[
        str | None, Option("serve Prometheus metrics here", values.metrics, "HOST:PORT or unix:PATH")
    ] = None
    control: Annotated[
        str | None,
        Option(f"status socket; default: {runtime_directory()}/NAME.control", values.control, "PATH"),
    ] = None
    state_dir: Annotated[
        str | None, Option("below which each VM has a directory of its name", values.path, "DIR")
    ] = None
    exec: Annotated[
        str | None, Option("where libvirt's emulator hands monitors over", values.hand_over, "PATH")
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning"] | None, Option("what is logged, from this level on")
    ] = None


@dataclass(frozen=True)
class Field:
    """An option as it stands in a table."""

    name: str
    kind: Any
    """What is written, without None."""
    option: Option
    required: bool

    @property
    def repeats(self) -> bool:
        """Whether it may be given more than once."""
        return any(get_origin(kind) is tuple for kind in get_args(self.kind))

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The words that are allowed, where there are only some."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else None

    def read(self, written: Any) -> object:
        """The daemon's value of what is written; where it repeats, a tuple. Raises ValueError."""
        if not self.repeats:
            return self.option.read(written)
        return tuple(self.option.read(each) for each in ([written] if isinstance(written, str) else written))


def fields_of(table: type[msgspec.Struct]) -> dict[str, Field]:
    """The options of a table by their names, in the order of the class."""
    hints = get_type_hints(table, include_extras=True)
    found = {}
    for field in msgspec.structs.fields(table):
        annotated, option = get_args(hints[field.name])
        found[field.name] = Field(field.name, _without_none(annotated), option, field.required)
    return found


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        rest = tuple(each for each in get_args(kind) if each is not type(None))
        return Union[rest]  # noqa: UP007 - made at run time
    return kind


class WrongOptionError(ValueError):
    """An option of `key` cannot be as it was given."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{key}: {text}")
        self.key = key
        self.text = text


def vm_options(name: str, given: Mapping[str, Any], state_dir: Path) -> VmOptions:
    """The options of a VM from the values read, by the names of `VmTable`. Raises WrongOptionError."""
    uris: tuple[str, ...] = given.get("recover_uri", ())
    if repeated := {uri for uri in uris if uris.count(uri) > 1}:
        raise WrongOptionError("recover_uri", f"{min(repeated)}: given more than once")
    patience = {field.name: given[field.name] for field in fields(Patience) if field.name in given}
    return VmOptions(
        name=name,
        qemu=given["qemu"],
        listen=tuple(given["listen"]),
        relay=given.get("relay", "auto"),
        session=given.get("session", "off"),
        recover_uris=tuple(uris),
        incoming=given.get("incoming"),
        state_dir=given.get("state_dir", state_dir),
        patience=Patience(**patience),
    )
