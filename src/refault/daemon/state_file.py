"""What a restarted refault must know of a migration under way: which role, which address, which QEMU."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import msgspec

from refault.daemon.pages_file import PagesFile
from refault.daemon.paths import make_again
from refault.daemon.repeats import repeats
from refault.daemon.state_troubles import StateTroubles
from refault.migration.phase import Role

log = logging.getLogger("refault.state")

_FILE = "record"


class MigrationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One migration, as its commands set it up."""

    role: Role
    uri: str
    relayed: bool
    qemu_pid: int | None
    qemu_started: int | None
    """Its start time in clock ticks since boot (/proc/PID/stat, field 22), for pids are used again."""
    preempt: bool = False
    """Whether its channels have a preempt lane."""
    generation: str = ""
    """Of all migrations of this process, which one: the page map's file is of the same."""
    postcopy: bool = False
    """Whether QEMU has said that postcopy had begun."""
    further: tuple[str, ...] = ()
    """The addresses at which a client had a destination recovered, beside `uri`."""
    kept: tuple[str, ...] = ()
    """The names by which QEMU holds our ends of its legs (kept_ends.py)."""

    def key(self, vm: str) -> bytes:
        """By what the page map's file of this migration is known (cext/statefile.h)."""
        return f"{vm} {self.qemu_pid} {self.qemu_started} {self.generation}".encode()


def process_started(pid: int | None) -> int | None:
    """The start time of a process as in `MigrationRecord`; None where it has ended or cannot be read."""
    if pid is None:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


class StateFile:
    """The record of one VM, replaced as a whole or removed."""

    def __init__(self, directory: Path, vm: str) -> None:
        self._vm = vm
        self.directory = directory
        self._path = directory / f"{vm}.migration.json"
        self.troubles = StateTroubles()
        self._record: MigrationRecord | None = None
        """What is to be in the file; None for nothing."""
        self.pages = PagesFile(directory, vm, self.troubles)

    def save(self, record: MigrationRecord) -> None:
        """Writes the record. Where that fails, a restarted refault cannot recover; nothing else is lost."""
        self._record = record
        temporary = self._path.with_suffix(".new")
        try:
            make_again(self.directory)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.encode(record))
            temporary.replace(self._path)
        except OSError as error:
            told = f"cannot save the migration: {error}; a restarted refault could not recover it"
            self.troubles.add(_FILE, told)
            log.warning("%s: %s", self._vm, told, extra=repeats((self._vm, _FILE), error.errno))
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        else:
            self.troubles.over(_FILE)

    def look(self) -> None:
        """Writes again what has gone away since it was written, and tells of what cannot be written again."""
        if self._record is not None and not self._path.exists():
            self.save(self._record)
        self.pages.look()

    def of_a_running_qemu(self) -> bool:
        """Whether there is a record, and the QEMU that it is of still runs, as far as can be told."""
        try:
            record = msgspec.json.decode(self._path.read_bytes(), type=MigrationRecord)
        except (OSError, msgspec.DecodeError):
            return False
        return record.qemu_started == process_started(record.qemu_pid)

    def load(self, pid: int | None) -> MigrationRecord | None:
        """The record, if it is of the QEMU process `pid`; a stale, torn or foreign one is None."""
        try:
            record = msgspec.json.decode(self._path.read_bytes(), type=MigrationRecord)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            self.troubles.count += 1
            log.warning("%s: ignoring %s: %s", self._vm, self._path, error)
            return None
        if record.qemu_pid != pid or record.qemu_started != process_started(pid):
            log.info("%s: %s is of another QEMU process; removed", self._vm, self._path)
            self.remove()
            return None
        return record

    def remove(self) -> None:
        """The migration has ended. What cannot be removed does no harm, for it names a process."""
        self._record = None
        self.troubles.over(_FILE)
        self.pages.end()
        for path in (self._path, self.pages.path):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self.troubles.count += 1
                log.warning("%s: cannot remove what is on record of the migration: %s", self._vm, error)
