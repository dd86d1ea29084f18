"""The log, on standard error: in the journal's own form where that is the journal, else plain lines.

Whoever writes to standard error here waits for no reader, the interpreter with its warnings and tracebacks
included.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TextIO, cast

from refault.daemon.host.errors import one_line
from refault.daemon.host.journal import JournalSocket, entry, fields_of
from refault.daemon.host.outlet import Outlet
from refault.daemon.host.repeats import Sparing, repeats

_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)
"""Level and syslog priority (sd-daemon(3))."""
_FLUSH_TIMEOUT = 2.0
_LAST_WORD_TIMEOUT = 1.0

AS_IT_IS: Mapping[str, object] = {"as_it_is": True}
"""`extra` of a line that is not the log's but the command's, as an error that it ends with."""


def _priority(record: logging.LogRecord) -> int:
    return next((priority for level, priority in _PRIORITIES if record.levelno >= level), 7)


def spare_full(record: logging.LogRecord) -> bool:
    """Where no descriptor is left for who comes trio says so with a traceback, ten times a second."""
    record.exc_info = None
    vars(record).update(repeats("accept", record.args))
    return True


class _Formatter(logging.Formatter):
    """The text of a record is one line, whatever names and errors are in it; a traceback stands below."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        return one_line(super().formatMessage(record).rstrip())


class JournalFormatter(_Formatter):
    """Puts the priority before each line, for a journal that takes lines alone; it has the time itself."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines, each with its priority."""
        priority = _priority(record)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines() or [""])


class PlainFormatter(_Formatter):
    """Time, level where it is more than information, and text."""

    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        """The record, with its traceback below it if it has one."""
        if getattr(record, "as_it_is", False):
            return super().format(record)
        level = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        return f"{self.formatTime(record)} {level}{super().format(record)}"


class _Handler(logging.Handler):
    """Hands formatted records to an outlet."""

    def __init__(self, write: Callable[[bytes], int], formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.outlet = Outlet(write, self._tell_dropped)

    def emit(self, record: logging.LogRecord) -> None:
        """Never waits."""
        try:
            self.outlet.put(self._line(record))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Waits until all is written, or nobody reads it; `logging.shutdown` calls it as the process ends."""
        self.outlet.flush(_FLUSH_TIMEOUT)

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _tell_dropped(self, count: int) -> bytes:
        text = "%d lines of the log are missing here: nobody read it, or it could not be written"
        return self._line(logging.LogRecord("refault", logging.WARNING, __file__, 0, text, (count,), None))


class _JournalHandler(_Handler):
    """Hands entries of the journal to an outlet."""

    def __init__(self, journal: JournalSocket) -> None:
        super().__init__(journal.write, logging.Formatter())

    def _line(self, record: logging.LogRecord) -> bytes:
        return entry(fields_of(record, self.format(record), _priority(record)))


class _Told(io.TextIOBase):
    """What is written to `sys.stderr` becomes lines of the log."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        """Logs the lines that are whole with it."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            logging.getLogger("refault.stderr").error("%s", line)
        return len(text)


def is_journal(fd: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `fd` is the stream that systemd connected to the journal ($JOURNAL_STREAM, systemd.exec(5))."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def level_of(name: str) -> int:
    """The level of this name, in lower case."""
    return logging.getLevelNamesMapping()[name.upper()]


def set_level(level: int) -> None:
    """What refault logs from now on is of this level, or above it."""
    logging.getLogger("refault").setLevel(level)


def setup_logging(level: int = logging.INFO) -> None:
    """Sends what refault logs, from `level` on, and what others warn of, to standard error. For commands that
    serve, once."""
    handler = _handler()
    handler.addFilter(Sparing())
    logging.getLogger("trio.serve_listeners").addFilter(spare_full)
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    set_level(level)
    logging.captureWarnings(True)
    sys.stderr = cast(TextIO, _Told())


def _handler() -> _Handler:
    journal, fd = is_journal(2), _duplicate_of_standard_error()
    if journal:
        with contextlib.suppress(OSError):  # as where its socket is not in this mount namespace
            handler = _JournalHandler(JournalSocket())
            os.close(fd)
            return handler
    write = partial(os.write, fd)
    return _Handler(write, JournalFormatter() if journal else PlainFormatter())


def lines_dropped() -> int:
    """Lines of the log that nobody will read, since the start."""
    return sum(handler.outlet.dropped for handler in logging.root.handlers if isinstance(handler, _Handler))


def _duplicate_of_standard_error() -> int:
    """A descriptor for the log's thread, which may wait; 2 itself is made not to, as far as that can be.

    What C writes there are the last words of the interpreter or the C library, and after them this process
    has to end. O_NONBLOCK is the open file's, and whoever else has it open would get it: it is opened anew.
    """
    duplicate = os.dup(2)
    kind = os.fstat(2).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        try:
            own = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:  # another user's, or its reader has gone
            return duplicate
        os.dup2(own, 2)
        os.close(own)
    elif stat.S_ISSOCK(kind) and is_journal(2):  # made for this unit alone
        deadline = struct.pack("ll", int(_LAST_WORD_TIMEOUT), 0)  # struct timeval
        with socket.socket(fileno=os.dup(2)) as own_socket:
            own_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, deadline)
    return duplicate
