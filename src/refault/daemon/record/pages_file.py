"""Where a VM's page map is kept across the death of refault: the file that cext/statefile.h describes.

A migration never waits or fails for it: what goes wrong is said and counted, and tracking goes on in memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from refault.channel.relay import Relay
from refault.channel.tracker import Kept, Restored, StateFds
from refault.daemon.host.paths import make_again
from refault.daemon.host.whole import NEW, OPEN, is_ours_alone
from refault.daemon.kernel.mounts import file_system
from refault.daemon.record.state_troubles import StateTroubles

log = logging.getLogger("refault.state")

_NOT_USED = {
    Restored.TORN: "it is torn",
    Restored.VERSION: "it is of another version of refault",
    Restored.FOREIGN: "it is of another QEMU or migration",
    Restored.NO_MEMORY: "it does not fit into memory",
}
_FILE = "pages"
_HEADER = 4096
"""Bytes, with the key among them (cext/statefile.h)."""


class PagesFile:
    """The file of one VM, `NAME.pages`: made anew for each migration and each refault."""

    def __init__(self, directory: Path, vm: str, troubles: StateTroubles) -> None:
        self._vm = vm
        self.path = directory / f"{vm}.pages"
        self._troubles = troubles
        self._warned = False
        self._in_use: tuple[int, int] | None = None
        """Device and inode of the file that is written to; None where there is none."""

    @contextlib.contextmanager
    def opened(self, key: bytes, *, take_over: bool, former: bytes = b"") -> Iterator[StateFds | None]:
        """A new, empty file, and with `take_over` the one that an earlier refault left. That may know the
        migration by another key, the `former`, and then so does the new one.

        On leaving without an error the new one takes the old one's place. None where it cannot be made.
        """
        self._in_use = None
        self._troubles.over(_FILE)
        temporary = self.path.with_name(f"{self.path.name}.new")
        with contextlib.ExitStack() as stack:
            try:
                make_again(self.path.parent)
                self._warn_unless_tmpfs()
                temporary.unlink(missing_ok=True)
                new = os.open(temporary, NEW, 0o600)
                stack.callback(os.close, new)
                stack.callback(_remove_if_there, temporary)
                old = self._old() if take_over else -1
                if old >= 0:
                    stack.callback(os.close, old)
                    if former and former in os.pread(old, _HEADER, 0):
                        key = former
            except OSError as error:
                self._in_memory_alone(str(error))
                yield None
                return
            yield StateFds(new, key, old)
            try:
                temporary.replace(self.path)
            except OSError as error:
                self._in_memory_alone(str(error))
            else:
                status = os.fstat(new)
                self._in_use = status.st_dev, status.st_ino

    def _in_memory_alone(self, why: str) -> None:
        self._in_use = None
        told = f"page requests are in memory alone: {why}; a restarted refault will not replay them"
        self._troubles.add(_FILE, told)
        log.warning("%s: %s", self._vm, told)

    def _old(self) -> int:
        try:
            descriptor = os.open(self.path, OPEN)
        except OSError as error:
            self._troubles.fail()
            log.warning("%s: what was on record is not known: %s", self._vm, error)
            return -1
        if is_ours_alone(os.fstat(descriptor)):
            return descriptor
        self._troubles.fail()
        log.warning("%s: ignoring %s: it is not a file of ours alone, nor of root", self._vm, self.path)
        os.close(descriptor)
        return -1

    def tell(self, relay: Relay) -> None:
        """Tells the operator what a new relay made of the files."""
        if relay.restored in _NOT_USED:
            self._troubles.fail()
            log.warning("%s: ignoring %s: %s", self._vm, self.path, _NOT_USED[relay.restored])
        elif relay.restored is not Restored.NOTHING:
            pages = relay.pages()
            log.info(
                "%s: page requests from before: %d on record, %d outstanding",
                self._vm,
                pages.recorded,
                pages.outstanding,
            )
            lost = pages.torn + pages.refused  # refused: of no RAM block that is known, or for want of room
            if lost:
                self._troubles.tear(lost)
                log.warning(
                    "%s: %d page requests more were torn in %s: they are not replayed, and threads that wait"
                    " for them wait until QEMU asks again or the background copy comes to their pages",
                    self._vm,
                    lost,
                    self.path,
                )
        if relay.restored is Restored.CRASHED:
            log.error(
                "%s: the refault before crashed while it decoded the channel: this migration passes unread"
                " and without replay; please report it",
                self._vm,
            )
        if relay.kept is Kept.NOTHING and self._in_use is not None:
            self._in_memory_alone(f"no room for {self.path}")

    def no_room(self) -> None:
        """There was no room in the file for some requests."""
        told = "no room for more page requests in the state file: a restart will not know all of them"
        self._troubles.add(_FILE, told)
        log.warning("%s: %s", self._vm, told)

    def look(self) -> None:
        """Tells it where the file is gone that is written to."""
        if self._in_use is None:
            return
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError as error:
            self._in_memory_alone(str(error))
            return
        if self._in_use != (status.st_dev, status.st_ino):
            self._in_memory_alone(f"{self.path} is another file than the one that was made")

    def end(self) -> None:
        """The migration has ended: nothing need be in the file any more."""
        self._in_use = None
        self._troubles.over(_FILE)

    def _warn_unless_tmpfs(self) -> None:
        kind = file_system(self.path.parent)
        if kind not in ("tmpfs", "ramfs") and not self._warned:
            self._warned = True
            log.warning(
                "%s: %s is not on a tmpfs: each page request waits for that disk; name another --state-dir",
                self._vm,
                self.path.parent,
            )


def _remove_if_there(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
