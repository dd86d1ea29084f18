"""Where a VM's page map is kept across the death of refault: the file that cext/statefile.h describes."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from refault.channel.relay import Relay
from refault.channel.tracker import Kept, Restored, StateFds

log = logging.getLogger("refault.state")

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_NOT_USED = {
    Restored.TORN: "it is torn",
    Restored.VERSION: "it is of another version of refault",
    Restored.FOREIGN: "it is of another QEMU or migration",
    Restored.NO_MEMORY: "it does not fit into memory",
}


class PagesFile:
    """The file of one VM, `NAME.pages`: made anew for each migration and each refault."""

    def __init__(self, directory: Path, vm: str) -> None:
        self._vm = vm
        self._path = directory / f"{vm}.pages"
        self._warned = False

    @contextlib.contextmanager
    def opened(self, key: bytes, *, take_over: bool) -> Iterator[StateFds | None]:
        """A new, empty file, and with `take_over` the one that an earlier refault left.

        On leaving without an error the new one takes the old one's place. None where it cannot be made.
        """
        with contextlib.ExitStack() as stack:
            temporary = self._path.with_name(f"{self._path.name}.new")
            try:
                self._warn_unless_tmpfs()
                temporary.unlink(missing_ok=True)
                new = os.open(temporary, _NEW, 0o600)
                stack.callback(os.close, new)
                old = self._old() if take_over else -1
                if old >= 0:
                    stack.callback(os.close, old)
            except OSError as error:
                log.warning(
                    "%s: page requests are in memory alone: %s; a restarted refault will not replay them",
                    self._vm,
                    error,
                )
                yield None
                return
            yield StateFds(new, key, old)
            temporary.replace(self._path)

    def _old(self) -> int:
        try:
            descriptor = os.open(self._path, _OLD)
        except OSError as error:
            log.warning("%s: what was on record is not known: %s", self._vm, error)
            return -1
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
            return descriptor
        log.warning("%s: ignoring %s: it is not a file of ours alone", self._vm, self._path)
        os.close(descriptor)
        return -1

    def tell(self, relay: Relay) -> None:
        """Tells the operator what a new relay made of the files."""
        if relay.restored in _NOT_USED:
            log.warning("%s: ignoring %s: %s", self._vm, self._path, _NOT_USED[relay.restored])
        elif relay.restored is not Restored.NOTHING:
            pages = relay.pages()
            log.info(
                "%s: page requests from before: %d on record, %d outstanding",
                self._vm,
                pages.recorded,
                pages.outstanding,
            )
        if relay.restored is Restored.CRASHED:
            log.error(
                "%s: the refault before crashed while it decoded the channel: this migration passes unread"
                " and without replay; please report it",
                self._vm,
            )
        if relay.kept is Kept.NOTHING:
            log.warning(
                "%s: page requests are in memory alone: no room for %s; a restarted refault will not replay"
                " them",
                self._vm,
                self._path,
            )

    def remove(self) -> None:
        """The migration has ended."""
        self._path.unlink(missing_ok=True)

    def _warn_unless_tmpfs(self) -> None:
        kind = file_system(self._path.parent)
        if kind not in ("tmpfs", "ramfs") and not self._warned:
            self._warned = True
            log.warning(
                "%s: %s is not on a tmpfs: each page request waits for that disk; name another --state-dir",
                self._vm,
                self._path.parent,
            )


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on; empty where the kernel does not tell."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:
        for mount in mounts:
            fields, _, kind = mount.partition(" - ")
            if fields.split()[2] == wanted:
                return kind.split()[0]
    return ""
