"""Processes that the lab starts: each in a group of its own, its output in a file, gone when its block is
left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import trio


class ProcessFailed(Exception):  # noqa: N818 - it says what happened
    """A process of the lab could not be started or has ended; the message holds the end of its output."""


class Process:
    """A running process. It does not outlive its block, and what it wrote can be read at any time."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], output: Path) -> None:
        self.name = name
        self.output = output
        self._popen = popen

    @property
    def pid(self) -> int:
        """Its process id, which is its process group's too."""
        return self._popen.pid

    @property
    def status(self) -> int | None:
        """Its exit status (negative: killed by that signal), or None while it runs."""
        return self._popen.poll()

    async def wait(self) -> int:
        """Waits until it has ended; gives its exit status. The deadline is the caller's."""
        if (status := self._popen.poll()) is not None:
            return status
        pidfd = os.pidfd_open(self.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        return self._popen.wait()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process, not to its children; none if it has ended."""
        if self._popen.poll() is None:
            self._popen.send_signal(number)

    def kill(self) -> None:
        """Kills the process and everything in its group, and collects it. Never waits long: SIGKILL does not
        ask.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    async def stop(self, grace: float = 20.0) -> int:
        """Asks it with SIGTERM to end, kills it after ``grace`` seconds; gives its exit status."""
        self.signal(signal.SIGTERM)
        with trio.move_on_after(grace):
            return await self.wait()
        self.kill()
        return self._popen.wait()

    def tail(self, lines: int = 20) -> str:
        """The last lines of what it wrote."""
        try:
            text = self.output.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def must_run(self) -> None:
        """Raises ProcessFailed when it has ended."""
        if (status := self.status) is not None:
            how = (
                f"was ended by {signal.Signals(-status).name}"
                if status < 0
                else f"ended with status {status}"
            )
            raise ProcessFailed(f"{self.name} {how}; its last output:\n{self.tail()}")


def _start(
    name: str,
    command: Sequence[str],
    output: Path,
    environment: Mapping[str, str] | None,
    pass_fds: Sequence[int],
    stdin: int,
) -> Process:
    # Forked by this thread, not by one of trio's: the kernel's death signal follows the thread.
    leash = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    if shutil.which(command[0]) is None:
        raise ProcessFailed(f"cannot start {name}: there is no program {command[0]} that may be run")
    with output.open("ab") as log:
        try:
            popen = subprocess.Popen(
                [*leash, *command],
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=None if environment is None else {**os.environ, **environment},
                pass_fds=pass_fds,
                start_new_session=True,
            )
        except OSError as error:
            raise ProcessFailed(f"cannot start {name} ({command[0]}): {error.strerror or error}") from error
    return Process(name, popen, output)


@contextlib.contextmanager
def started(
    name: str,
    command: Sequence[str],
    output: Path,
    *,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
) -> Iterator[Process]:
    """Starts ``command`` with its output appended to the file ``output``; kills its group when the block is
    left.

    Raises ProcessFailed when it cannot be started.
    """
    process = _start(name, command, output, environment, pass_fds, stdin)
    try:
        yield process
    finally:
        process.kill()
