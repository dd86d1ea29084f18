"""What a restarted refault must know of a migration under way: which role, which address, which QEMU."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from refault.daemon.host.repeats import repeats
from refault.daemon.host.whole import whole
from refault.daemon.kernel.process import start_of, still_runs
from refault.daemon.record.pages_file import PagesFile
from refault.daemon.record.replaced import replace
from refault.daemon.record.session_file import SessionFile
from refault.daemon.record.state_troubles import StateTroubles
from refault.migration.phase import Role

log = logging.getLogger("refault.state")

_FILE = "record"
SUFFIX = ".migration.json"


class MigrationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One migration, as its commands set it up."""

    role: Role
    uri: str
    relayed: bool
    qemu_pid: int | None
    qemu_started: int | None
    """Its start time in clock ticks since boot (/proc/PID/stat, field 22), for pids are used again; None
    where that may not be looked at."""
    preempt: bool = False
    """Whether its channels have a preempt lane."""
    qemu_threads: tuple[int, ...] = ()
    """Where the process is not known, for it is behind TCP or in a pid namespace beside ours: the threads of
    its vCPUs, by its own word (query-cpus-fast). Another QEMU has others."""
    generation: str = ""
    """Of all migrations of this process, which one: the page map's file is of the same."""
    postcopy: bool = False
    """Whether QEMU has said that postcopy had begun."""
    awaited: bool = False
    """Of a source that was seen from the migration's beginning: whether it has yet to hear that its guest has
    arrived."""
    stopped_by_switchover: bool = False
    """Whether its guest ran until a source before 10.0 stopped it for postcopy."""
    further: tuple[str, ...] = ()
    """The addresses at which a client had a destination recovered, beside `uri`."""
    session: bytes | None = None
    """The id of the last session that a channel of it became."""
    kept: tuple[str, ...] = ()
    """The names by which QEMU holds our ends of its legs (kept_ends.py)."""
    leg: tuple[int, bytes] | None = None
    """By which the one is found that the next refault goes on with (handed_leg.py), or else has to end."""
    handed: str = ""
    """Which session file is of that leg as it is now. Each refault has another from when it takes it on, so
    that a file which cannot be removed is not taken a second time."""

    def key(self, vm: str) -> bytes:
        """By what the page map's file of this migration is known (cext/statefile.h). Not since when QEMU
        runs: that may be told later."""
        return f"{vm} {self.qemu_pid} {self.generation}".encode()

    def former_key(self, vm: str) -> bytes:
        """The same until 2026-11-30."""
        return f"{vm} {self.qemu_pid} {self.qemu_started} {self.generation}".encode()


class StateFile:
    """The record of one VM, replaced as a whole or removed."""

    def __init__(self, directory: Path, vm: str, is_ours: Callable[[], bool] = lambda: True) -> None:
        """`is_ours` tells whether the files are this process's to look at and to write (state_lock.py)."""
        self._vm = vm
        self._is_ours = is_ours
        self.directory = directory
        self._not_ours = False
        """Whether they were another's when that was looked at last."""
        self._path = directory / f"{vm}{SUFFIX}"
        self.troubles = StateTroubles()
        self._record: MigrationRecord | None = None
        """What is to be in the file; None for nothing."""
        self.pages = PagesFile(directory, vm, self.troubles)
        self.session = SessionFile(directory, vm)

    def save(self, record: MigrationRecord) -> None:
        """Writes the record. Where that fails, a restarted refault cannot recover; nothing else is lost."""
        self._record = record
        if not self.usable(record.qemu_pid):
            return
        try:
            replace(self._path, msgspec.json.encode(record))
        except OSError as error:
            told = f"cannot save the migration: {error}; a restarted refault could not recover it"
            self.troubles.add(_FILE, told)
            log.warning("%s: %s", self._vm, told, extra=repeats((self._vm, _FILE), error.errno))
        else:
            self.troubles.over(_FILE)

    def look(self) -> None:
        """Writes again what has gone away since it was written, and tells of what cannot be written again."""
        if self._record is not None and (self._not_ours or not os.path.exists(self._path)):
            self.save(self._record)
        self.pages.look()

    def of_a_running_qemu(self) -> bool:
        """Whether there is a record, and the QEMU that it is of still runs, as far as can be told."""
        record = self._read()
        return record is not None and (
            record.qemu_pid is None or still_runs(record.qemu_pid, record.qemu_started)
        )

    def usable(self, pid: int | None) -> bool:
        """Whether the files may be used for the QEMU process `pid`: not while another refault has them, nor
        if they are of another QEMU that runs.
        """
        told = "the state directory is not usable" if not self._is_ours() else self._why_another(pid)
        self._not_ours = told is not None
        if told is not None and self._record is not None:
            self.troubles.add(_FILE, f"{told}; a restarted refault could not recover the migration")
        return told is None

    def _why_another(self, pid: int | None) -> str | None:
        record = self._read()
        if record is None or record.qemu_pid is None or record.qemu_pid == pid:
            return None
        if not still_runs(record.qemu_pid, record.qemu_started):
            return None
        runs = "still runs"
        try:
            start_of(record.qemu_pid)
        except OSError as error:
            runs = f"may still run, for {error.strerror}"
        told = (
            f"{self._path} is of QEMU process {record.qemu_pid}, which {runs}, so nothing is kept for"
            " this one: give this VM another --name or --state-dir, or end that QEMU"
        )
        log.error("%s: %s", self._vm, told, extra=repeats((self._vm, "another"), told))
        return told

    def load(self, pid: int | None, threads: Collection[int] = ()) -> MigrationRecord | None:
        """The record, if it is of the QEMU process `pid`, as far as can be told; a stale, torn or foreign one
        is None.

        `threads`: those of its vCPUs, where the process is not known. vCPUs are plugged and unplugged.
        """
        if not self.usable(pid):
            return None
        try:
            record = msgspec.json.decode(whole(self._path), type=MigrationRecord)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            self.troubles.fail()
            why = error.strerror if isinstance(error, OSError) else error
            log.warning("%s: ignoring %s: %s", self._vm, self._path, why)
            return None
        if pid is None:
            same = not set(threads).isdisjoint(record.qemu_threads)
        else:
            same = still_runs(pid, record.qemu_started)
        if record.qemu_pid != pid or not same:
            whose = "another QEMU" if pid is None else "a QEMU process that has ended"
            log.info("%s: %s is of %s; removed", self._vm, self._path, whose)
            self.remove()
            return None
        return record

    def left(self) -> MigrationRecord | None:
        """The record of a migration whose leg QEMU may hold for the next refault."""
        record = self._read()
        return record if record is not None and record.leg is not None else None

    def has(self, leg: tuple[int, bytes], handed: str) -> bool:
        """Whether the record tells of this leg, and of this hand-over."""
        record = self._read()
        return record is not None and (record.leg, record.handed) == (leg, handed)

    def _read(self) -> MigrationRecord | None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(whole(self._path), type=MigrationRecord)
        return None

    def remove(self) -> None:
        """The migration has ended. What cannot be removed does no harm, for it names a process."""
        self._record = None
        self.troubles.over(_FILE)
        self.pages.end()
        if self._not_ours or not self._is_ours():
            return
        for path in (self._path, self.pages.path, self.session.path, self.session.half):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self.troubles.fail()
                log.warning("%s: cannot remove what is on record of the migration: %s", self._vm, error)
