"""The standard streams of a command, of which any may be closed, full, or without a reader."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from refault.daemon.host.errors import OperatorError


class OutputLost(OperatorError):  # noqa: N818 - it says what happened
    """Standard output takes no more. `quiet`: its reader has gone, as in ``refault status | head -1``."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror or error}")
        self.quiet = isinstance(error, BrokenPipeError)


class _Output(io.FileIO):
    """Standard output. The first failure is told; what is written after it is lost, so that nothing on the
    way out fails again."""

    def write(self, data: Any) -> int:
        """Raises OutputLost."""
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            raise OutputLost(error) from error


class _Errors(io.FileIO):
    """Standard error: there is nobody to tell that it cannot be written to."""

    def write(self, data: Any) -> int:
        """What cannot be written is lost."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare() -> None:
    """Gives a command standard streams that do as they should, whatever it was started with.

    A descriptor from 0 to 2 that is closed is opened, or the next socket would get its number, and what is
    written to standard error would go there. Output to one fails, as it does to a closed one.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY if fd else os.O_WRONLY), True)
    # A test's own streams stay.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Output(1, "w", closefd=False))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Errors(2, "w", closefd=False))


def _text(raw: io.FileIO) -> io.TextIOWrapper:
    encoding = sys.__stdout__.encoding if sys.__stdout__ is not None else "utf-8"
    by_line = raw.fileno() == 2 or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_line)
