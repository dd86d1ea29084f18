"""What is owed to a QEMU (daemon/known/owed.py), for the refault that comes after this one."""

from __future__ import annotations

import contextlib
import logging

import msgspec

from refault.daemon.host.repeats import repeats
from refault.daemon.host.whole import whole
from refault.daemon.kernel.process import may_be_same
from refault.daemon.record.replaced import replace
from refault.daemon.record.state_file import StateFile

log = logging.getLogger("refault.state")

_FILE = "owed"


class OwedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """To one QEMU process."""

    qemu_pid: int | None
    qemu_started: int | None
    """Its start time (kernel/process.py), for pids are used again."""
    tls_hostname: str = ""
    """What refault has set where nothing was set; empty: nothing."""
    descriptors: tuple[str, ...] = ()
    """By name, what it is to close."""

    @property
    def anything(self) -> bool:
        """Whether anything is."""
        return bool(self.tls_hostname or self.descriptors)


class OwedFile:
    """Of one VM, replaced as a whole or removed, where `state` may write too."""

    def __init__(self, state: StateFile, vm: str) -> None:
        self._state = state
        self._vm = vm
        self._path = state.directory / f"{vm}.owed.json"

    def save(self, record: OwedRecord) -> None:
        """Where that fails the next refault does not know of it; nothing else is lost."""
        if not self._state.usable(record.qemu_pid):
            return
        try:
            if record.anything:
                replace(self._path, msgspec.json.encode(record))
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            self._state.troubles.fail()
            told = "what QEMU is to be given back cannot be written down; a restarted refault would not know"
            log.warning("%s: %s: %s", self._vm, told, error, extra=repeats((self._vm, _FILE), error.errno))

    def load(self, pid: int | None, started: int | None) -> OwedRecord:
        """What is owed to that process, as far as can be told; nothing where the file is of another, which is
        removed, or cannot be read."""
        none = OwedRecord(qemu_pid=pid, qemu_started=started)
        if pid is None or not self._state.usable(pid):
            return none
        with contextlib.suppress(OSError, msgspec.DecodeError):
            record = msgspec.json.decode(whole(self._path), type=OwedRecord)
            if may_be_same((record.qemu_pid, record.qemu_started), (pid, started)):
                return record
            self._path.unlink()
        return none
