"""The log, on standard error: as the journal takes it where that is the journal, else plain lines."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

from refault.daemon.repeats import Sparing

_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)
"""Level and syslog priority (sd-daemon(3))."""


class JournalFormatter(logging.Formatter):
    """Puts the priority before each line: the journal takes lines, not records, and has the time itself."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines, each with its priority."""
        priority = next((p for level, p in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines() or [""])


class PlainFormatter(logging.Formatter):
    """Time, level where it is more than information, and text."""

    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        """The record, with its traceback below it if it has one."""
        level = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        return f"{self.formatTime(record)} {level}{super().format(record)}"


def is_journal(fd: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `fd` is the stream that systemd connected to the journal ($JOURNAL_STREAM, systemd.exec(5))."""
    try:
        stat = os.fstat(fd)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def setup_logging(level: int = logging.INFO) -> None:
    """Sends what refault logs, from `level` on, to standard error. For commands, once; a library does not."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JournalFormatter() if is_journal(sys.stderr.fileno()) else PlainFormatter())
    handler.addFilter(Sparing())
    logger = logging.getLogger("refault")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
