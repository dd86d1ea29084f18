"""The service manager's notification protocol (sd_notify(3)): a datagram a notice, to $NOTIFY_SOCKET."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

import trio

_log = logging.getLogger(__name__)


class Notifier:
    """Tells systemd how far the daemon is; says nothing where nobody asked.

    Nothing here raises: a manager that does not listen must not stop a daemon that works. Sending never
    blocks, so it may be done in the event loop; a notice for which the manager's queue has no room is lost.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = address_of(environment)
        self._watchdog = _seconds_of_watchdog(environment)

    def ready(self, text: str) -> None:
        """Start-up is done; `text` is what ``systemctl status`` shows."""
        self._send("READY=1", _status(text))

    def reloading(self) -> None:
        """A reload has begun, of which `ready` says that it is over (Type=notify-reload)."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    async def keep_watchdog(self) -> None:
        """Tells, as long as the event loop turns, that it does, where the manager asks for that
        (WatchdogSec=)."""
        if self._watchdog is None:
            return
        while True:
            self._send("WATCHDOG=1")
            await trio.sleep(self._watchdog / 2)

    def stopping(self, text: str) -> None:
        """Shutdown has begun."""
        self._send("STOPPING=1", _status(text))

    def extend_timeout(self, seconds: float) -> None:
        """Asks for `seconds` more from now before the manager gives up on the start or stop under way."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def _send(self, *assignments: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            _log.warning("cannot notify the service manager at %s: %s", self._address, error)


def address_of(environment: Mapping[str, str]) -> str | None:
    """Where the manager listens; None where there is none."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return None
    # A leading @ stands for the NUL of an abstract socket's name.
    return "\0" + address[1:] if address.startswith("@") else address


def _seconds_of_watchdog(environment: Mapping[str, str]) -> float | None:
    """As sd_watchdog_enabled(3) has it; None where there is none, or it is another process's."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1_000_000 or None


def _status(text: str) -> str:
    """One assignment a line: a line break in `text` would begin another."""
    return "STATUS=" + " ".join(text.split())
