"""The journal's own form of a line: fields, in one datagram (systemd's docs/JOURNAL_NATIVE_PROTOCOL.md).

So `journalctl VM=vm1`, `journalctl RECOVERY_ID=...` and `journalctl MESSAGE_ID=...` find what they name. What
else a line has for the journal it carries itself, as `extra={"journal": {...}}`.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Mapping
from pathlib import Path

from refault.daemon.host import subjects
from refault.daemon.host.alerts import message_id

SOCKET = Path("/run/systemd/journal/socket")
_IDENTIFIER = "refault"
_GONE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN})
"""What a socket says whose other end has been closed."""
_LONGEST = 48 << 10
"""Bytes of one value, as much as the journal keeps of a line on a stream (journald.conf(5), LineMax=): the
whole datagram must fit into the socket's buffer."""


def entry(fields: Mapping[str, str]) -> bytes:
    """The datagram of one entry."""
    return b"".join(map(_field, fields, fields.values()))


def _field(name: str, text: str) -> bytes:
    value = text.encode(errors="backslashreplace")[:_LONGEST]
    if b"\n" in value:
        return name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
    return name.encode() + b"=" + value + b"\n"


def fields_of(record: logging.LogRecord, message: str, priority: int) -> dict[str, str]:
    """What the journal is told of a record whose text is ``message``."""
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(priority),
        "SYSLOG_IDENTIFIER": _IDENTIFIER,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "?",
    }
    args = record.args
    if str(record.msg).startswith("%s: ") and isinstance(args, tuple) and subjects.is_vm(str(args[0])):
        fields["VM"] = str(args[0])
        if (loss := subjects.loss_of(fields["VM"])) is not None:
            fields["RECOVERY_ID"] = loss
    if (found := message_id(str(record.msg))) is not None:
        fields["MESSAGE_ID"] = found
    fields.update(getattr(record, "journal", {}))
    return fields


class JournalSocket:
    """Where entries go. May block while the journal does not read."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises OSError where there is no journal that can be reached."""
        self._path = path or SOCKET
        self._sock = self._connected()

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(self._path))
        except OSError:
            sock.close()
            raise
        return sock

    def write(self, data: bytes) -> int:
        """Sends one entry, to a journal that was restarted too. Raises OSError where that cannot be done."""
        try:
            return self._sock.send(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            again = self._connected()
            self._sock.close()
            self._sock = again
            return self._sock.send(data)

    def close(self) -> None:
        """Ends it."""
        self._sock.close()
