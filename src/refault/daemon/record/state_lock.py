"""Whose the state of a VM of some name in some directory is: of the one refault that holds `NAME.lock` there.

The lock is the kernel's (flock(2)), and so ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
from pathlib import Path

import trio

from refault.daemon.host.errors import OperatorError
from refault.daemon.host.paths import make_again, make_if_default, must_be_writable
from refault.daemon.host.whole import whole
from refault.daemon.kernel.inotify import until_gone

log = logging.getLogger("refault.state")

CLAIM_PATIENCE = 1.0
_CLAIM_LOOK = 0.02
_SETTLES = 5.0
"""Seconds that a file, or a whole directory, that has gone away is left to be there again."""


class StateTaken(OperatorError):  # noqa: N818 - it says what is
    """Another refault has it."""


class StateLock:
    """The claim of this process to the state files of the VM `name` in `directory`."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self.path = directory / f"{name}.lock"
        """Removed by whoever gives the lock up."""
        self._fd: int | None = None
        self._was_held = False

    @property
    def held(self) -> bool:
        """Whether the files may be looked at and written."""
        return self._fd is not None

    async def claim(self, *, wait: bool = True) -> None:
        """Takes it; where the directory is not usable that is left to `keep`.

        Raises StateTaken where another refault holds it and does not end soon; without `wait` at once.
        """
        deadline = math.inf
        while True:
            try:
                if self._take():
                    return
            except OperatorError:
                return
            if not wait:
                raise self._taken()
            if deadline == math.inf:
                deadline = trio.current_time() + CLAIM_PATIENCE
                log.info(
                    "%s: %s; it may be about to end: waiting %g s", self._name, self._taken(), CLAIM_PATIENCE
                )
            if trio.current_time() > deadline:
                raise self._taken()
            await trio.sleep(_CLAIM_LOOK)

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Holds it until cancelled. Raises OperatorError where it cannot be had, or its file was removed."""
        if not self.held and not self._take():
            raise self._taken()
        task_status.started()
        while self._is_there(self._fd):
            await until_gone(str(self.path), lambda: self._is_there(self._fd))
            await trio.sleep(_SETTLES)
        self.release()
        raise OperatorError(f"{self.path} was removed or replaced; leave it, it says whose the state is")

    def release(self) -> None:
        """Gives it up."""
        if self._fd is not None:
            if self._is_there(self._fd):
                with contextlib.suppress(OSError):
                    self.path.unlink()
            os.close(self._fd)
            self._fd = None

    def _take(self) -> bool:
        """False where another holds it. Raises OperatorError where the directory is not usable."""
        make_if_default(self._directory)
        if self._was_held:
            make_again(self._directory)
        must_be_writable(self._directory)
        fd = -1
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if isinstance(error, BlockingIOError):
                return False
            raise OperatorError(
                f"cannot keep state in {self._directory}: {self.path.name}: {error.strerror}; remove that"
                " file, or name another directory with --state-dir"
            ) from error
        if not self._is_there(fd):  # who held it has given it up meanwhile, and removed it
            os.close(fd)
            return False
        with contextlib.suppress(OSError):  # the disk may be full: it is for people alone
            os.ftruncate(fd, 0)
            os.write(fd, b"%d\n" % os.getpid())
        self._fd, self._was_held = fd, True
        return True

    def _is_there(self, fd: int | None) -> bool:
        """Whether the file of that descriptor is the one at the path."""
        try:
            return fd is not None and os.path.samestat(os.fstat(fd), os.lstat(self.path))
        except OSError:
            return False

    def _taken(self) -> StateTaken:
        holder = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            holder = whole(self.path).decode()[:20].strip()
        pid = f" (pid {holder})" if holder.isdigit() else ""
        return StateTaken(
            f"another refault{pid} keeps the state of a VM of the name {self._name} in {self._directory};"
            " give this VM another --name or --state-dir, or end that refault first"
        )
