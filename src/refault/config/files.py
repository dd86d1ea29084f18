"""The files of `refault serve`: refault.toml, and in vms.d beside it further VMs.

[daemon]                    # in refault.toml alone, as [defaults]
metrics = "127.0.0.1:9099"
[defaults]
client_wait = 30
[vm.web1]
qemu = "/run/qemu/web1.real"
listen = ["/run/qemu/web1", "tcp:127.0.0.1:4444"]
[[watch]]
qemu = "/run/qemu/*.real"
listen = "{dir}/{stem}"
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from refault.config import values
from refault.config.hand_over import Handed
from refault.config.options import (
    Common,
    DaemonTable,
    VmTable,
    WatchTable,
    WrongOptionError,
    vm_options,
)
from refault.config.tables import decode, key_as_written
from refault.config.watch import Watch
from refault.daemon import uses
from refault.daemon.host.errors import OperatorError, one_line
from refault.daemon.host.paths import control_socket, state_directory
from refault.daemon.monitor.address import Address, place_of
from refault.daemon.options import Configuration, HostOptions, VmOptions

DEFAULT = Path("/etc/refault/refault.toml")
VMS_D = "vms.d"
MOST = 16 << 20
"""Bytes of one file."""
_BYTE_ORDER_MARK = "\ufeff"
_LONGEST_LINE = 1000
"""Characters of what is said about one thing."""
_OURS = frozenset({"listen", "control", "metrics", "exec"})
"""Options whose socket files refault makes."""
_TOP = "[daemon], [defaults], [vm.NAME] and [[watch]]"


class ConfigError(OperatorError):
    """The files cannot be as they are."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)
        """One for each thing that is wrong: file, line or key, and what is allowed."""


class Files:
    """`main` and the files NAME.toml in vms.d beside it, as they are read again and again."""

    def __init__(self, main: Path) -> None:
        self._main = main
        self._needs_directory = False
        """Whether something stood in vms.d: that it has gone, as while it is replaced, is no wish to drop all
        VMs."""

    def load(self) -> Configuration:
        """What they say now. Raises ConfigError."""
        directory = self._main.parent / VMS_D
        if self._needs_directory and not os.path.lexists(directory):
            raise ConfigError([f"{directory}: it has gone; make it again, empty if its VMs are to go"])
        found = load(self._main)
        self._needs_directory = any(directory.glob("*.toml"))
        return found


def load(main: Path) -> Configuration:
    """What `main` and the files NAME.toml in vms.d beside it say. Raises ConfigError."""
    directory = main.parent / VMS_D
    try:
        further = sorted(
            file for file in directory.iterdir() if file.suffix == ".toml" and not file.name.startswith(".")
        )
    except FileNotFoundError as error:
        if directory.is_symlink():
            raise ConfigError([f"{directory}: {error.strerror}: it is a link to nowhere"]) from error
        further = []
    except OSError as error:
        raise ConfigError([f"{directory}: {error.strerror}"]) from error
    return _Reader().read(main, further)


def load_alone(files: Sequence[Path]) -> Configuration:
    """What these files, each as it could be refault.toml, say together. Raises ConfigError."""
    return _Reader(waits=True).read(None, files)


class _Reader:
    """Reads on after what is wrong, so that all of it is told at once."""

    def __init__(self, *, waits: bool = False) -> None:
        self._waits = waits
        """For whoever writes into a pipe: not where a daemon reads."""
        self._wrong: list[str] = []
        self._common: dict[str, object] = {}
        self._daemon: dict[str, Any] = {}
        self._state_dir = state_directory()
        self._once: dict[str, Path] = {}
        """In which file [daemon] and [defaults] stand."""
        self._vms: dict[str, tuple[VmOptions, Path]] = {}
        self._watches: list[tuple[Watch, str]] = []

    def read(self, main: Path | None, further: Sequence[Path]) -> Configuration:
        tables = [(file, self._tables(file)) for file in ([main] if main else []) + list(further)]
        for file, table in tables:
            for name in ("daemon", "defaults"):
                if name in table:
                    self._read_common(file, name, table[name], main)
        for file, table in tables:
            self._read_vms(file, table.get("vm", {}))
            self._read_watches(file, table.get("watch", []))
        control = self._daemon.get("control") or Address(str(control_socket("refault")), server=True)
        self._check_uses(control)
        if self._wrong:
            raise ConfigError([_readable(one_line(line)) for line in self._wrong])
        return Configuration(
            host=HostOptions(metrics=self._daemon.get("metrics"), control=control),
            log_level=self._daemon.get("log_level", "info"),
            vms=tuple(vm for vm, _ in self._vms.values()),
            watches=tuple(watch for watch, _ in self._watches),
            handed=Handed(self._daemon["exec"], tuple(sorted(self._common.items())), self._state_dir)
            if "exec" in self._daemon
            else None,
        )

    def _tables(self, file: Path) -> Mapping[str, Any]:
        try:
            text = self._bytes(file).decode()
            if text.startswith(_BYTE_ORDER_MARK):
                raise ValueError("Byte order mark, which TOML does not have (at line 1, column 1)")
            table = tomllib.loads(text)
        except OSError as error:
            self._wrong.append(f"{file}: {error.strerror}")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            self._wrong.append(f"{file}: line {line}: TOML is written in UTF-8, and this is not")
        except ValueError as error:  # a number of too many digits is no TOMLDecodeError
            self._wrong.append(f"{file}: {_toml_error(str(error))}")
        except RecursionError:
            self._wrong.append(f"{file}: too many brackets within one another")
        else:
            for key in table.keys() - {"daemon", "defaults", "vm", "watch"}:
                self._wrong.append(f"{file}: {key_as_written(key)}: not known; at the top stand {_TOP}")
            return table
        return {}

    def _bytes(self, file: Path) -> bytes:
        """Raises OSError."""
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | (0 if self._waits else os.O_NONBLOCK))
        with os.fdopen(fd, "rb") as opened:
            if not self._waits and not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "no regular file")
            data = opened.read(MOST + 1)
        if len(data) > MOST:
            raise OSError(errno.EFBIG, f"more than {MOST >> 20} MiB")
        return data

    def _read_common(self, file: Path, name: str, table: object, main: Path | None) -> None:
        where = f"{file}: [{name}]"
        if main is not None and file != main:
            self._wrong.append(f"{where} stands in {main} alone; here stand [vm.NAME] and [[watch]]")
        elif name in self._once:
            self._wrong.append(f"{where} stands in {self._once[name]} already, and once is enough")
        else:
            self._once[name] = file
            kind = DaemonTable if name == "daemon" else Common
            given = self._decode(where, table, kind)
            if given is None:
                return
            if name == "defaults":
                self._common = given
            else:
                self._daemon = given
                self._state_dir = given.get("state_dir", self._state_dir)
                self._check_daemon(where, given)

    def _check_daemon(self, where: str, given: Mapping[str, Any]) -> None:
        paths = {key: given[key].path for key in ("control", "metrics", "exec") if key in given}
        for key, path in {**paths, "state_dir": given.get("state_dir")}.items():
            if path is not None and not os.path.isabs(path):
                self._wrong.append(f"{where} {key}: {str(path)!r} is not a whole path: begin with /")
        if os.path.exists(self._state_dir) and not os.path.isdir(self._state_dir):
            self._wrong.append(f"{where} state_dir: {self._state_dir} is not a directory")

    def _read_vms(self, file: Path, vms: object) -> None:
        if not isinstance(vms, dict):
            self._wrong.append(f"{file}: vm: a VM is a table with its name, [vm.NAME]")
            return
        for name, table in vms.items():
            where = f"{file}: [vm.{key_as_written(name)}]"
            if isinstance(table, list):
                self._wrong.append(f"{where} is one table, in single brackets")
                continue
            if not isinstance(table, dict):
                self._wrong.append(
                    f"{file}: [vm] {key_as_written(name)}: a VM is a table with its name, [vm.NAME]"
                )
                continue
            try:
                values.vm_name(name)
            except ValueError as error:
                self._wrong.append(f"{where}: {error}")
                continue
            if name in self._vms:
                self._wrong.append(f"{where}: {self._vms[name][1]} has a VM of this name already")
                continue
            given = self._decode(where, table, VmTable)
            if given is None:
                continue
            try:
                vm = vm_options(name, self._common | given, self._state_dir / name)
            except WrongOptionError as error:
                self._wrong.append(f"{where} {error.key}: {error.text}")
                continue
            self._vms[name] = vm, file

    def _read_watches(self, file: Path, watches: object) -> None:
        if not isinstance(watches, list):
            self._wrong.append(f"{file}: [watch]: there may be several, so each is [[watch]]")
            return
        for number, table in enumerate(watches, 1):
            where = f"{file}: [[watch]]" + (f" number {number}" if len(watches) > 1 else "")
            given = self._decode(where, table, WatchTable)
            if given is None:
                continue
            try:
                watch = Watch.made(self._common | given, self._state_dir)
            except WrongOptionError as error:
                self._wrong.append(f"{where} {error.key}: {error.text}")
                continue
            self._watches.append((watch, where))

    def _decode(self, where: str, table: object, kind: type[msgspec.Struct]) -> dict[str, Any] | None:
        """The values of a table that are given, read; None, and said, where something is wrong."""
        given, wrong = decode(table, kind)
        self._wrong += [f"{where} {line}" for line in wrong]
        return None if wrong else given

    def _check_uses(self, control: Address) -> None:
        taken = [uses.of_control("[daemon]", control)]
        if (metrics := self._daemon.get("metrics")) is not None:
            taken.append(uses.of_metrics("[daemon]", metrics))
        if (handed := self._daemon.get("exec")) is not None:
            taken.append(uses.of_exec("[daemon]", handed))
        files = {"[daemon]": self._once.get("daemon", Path("by default"))}
        directories: dict[tuple[object, ...], str] = {}
        for name, (vm, file) in self._vms.items():
            owner = f"[vm.{key_as_written(name)}]"
            files[owner] = file
            taken += uses.of_vm(owner, vm)
            directories[place_of(vm.state_dir)] = owner
            if os.path.exists(vm.state_dir) and not os.path.isdir(vm.state_dir):
                self._wrong.append(f"{file}: {owner} state_dir: {vm.state_dir} is not a directory")
        for use in taken:
            if use.place in directories:
                self._wrong.append(
                    f"{files[use.owner]}: {use.owner} {use.option}: {use.written} is the state directory of"
                    f" {directories[use.place]}"
                )
        for use, first in uses.clashes(taken):
            self._wrong.append(
                f"{files[use.owner]}: {use.owner} {use.option}: {use.written} is {first.option} of"
                f" {first.owner} already; each needs an address of its own"
            )
        patterns: dict[str, str] = {}
        for watch, where in self._watches:
            if watch.pattern in patterns:
                self._wrong.append(f"{where} qemu: {watch.pattern} is that of {patterns[watch.pattern]}")
            patterns.setdefault(watch.pattern, where)
            for use in (use for use in taken if use.option in _OURS and use.place[0] == "unix"):
                if watch.matches("/".join(map(str, use.place[1:]))):
                    self._wrong.append(
                        f"{where} qemu: {watch.pattern} would find {use.written}, which is {use.option} of"
                        f" {use.owner} and no QEMU's"
                    )


def _readable(line: str) -> str:
    """One with a very long value has no middle: the place and what is allowed stand at its ends."""
    if len(line) <= _LONGEST_LINE:
        return line
    half = _LONGEST_LINE // 2
    return f"{line[:half]} [...] {line[-half:]}"


def _toml_error(text: str) -> str:
    """Python's words, with the place in front: "Invalid value (at line 3, column 9)"."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", text, flags=re.DOTALL)
    if match is None:
        return " ".join(text.split())
    what, line, column = match.groups()
    where = f"line {line}, column {column}" if line else "at its end"
    return f"{where}: {' '.join(what.split())}"
