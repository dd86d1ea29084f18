"""How long a channel that is a session waits for its next connection (migration/session_patience.py)."""

from __future__ import annotations

import math

import trio

from refault.daemon.known.course import Course
from refault.daemon.monitor.monitor import MonitorLost, QmpError
from refault.daemon.relayed.channels import Channels
from refault.migration.phase import Phase, Role
from refault.migration.session_patience import session_patience

ENDED_PATIENCE = 30.0
"""QEMU has ended its side, and nobody waits for what is left."""
ANSWERS_WITHIN = 0.5
"""A source that has handed its channel all that it has answers again so soon."""


class SessionWaits:
    """Of one relayed migration."""

    def __init__(self, course: Course, channels: Channels) -> None:
        self._course = course
        self._channels = channels

    def seconds(self) -> float:
        """As things stand now."""
        told = self._course.vm.patience.session_patience
        if self._channels.relay.closed:
            return 0.0
        seconds = session_patience(
            self._channels.phase,
            self._course.role,
            self._channels.relay.passed(),
            stopped=self._course.guest_stopped,
        )
        return seconds if told is None or math.isinf(seconds) else told

    def delivers_for(self) -> float:
        """The same once QEMU has ended its side. A source waits for its destination's last word."""
        course = self._course
        return math.inf if course.role is Role.DESTINATION and not course.gone else ENDED_PATIENCE

    async def has_sent_all(self) -> bool:
        """Whether a source in precopy waits for nothing but its destination's last word.

        A close would have it run its guest again, and the destination may run it. While it writes the rest it
        answers nobody (migration/migration.c, migration_completion holds the BQL).
        """
        course = self._course
        if course.role is not Role.SOURCE or self._channels.phase is not Phase.PRECOPY:
            return False
        if not course.guest_stopped:
            return False
        with trio.move_on_after(ANSWERS_WITHIN):
            try:
                migrate = await course.vm.query("query-migrate")
            except (QmpError, MonitorLost, trio.TooSlowError):
                return False
            ram = migrate.get("ram")
            return isinstance(ram, dict) and ram.get("remaining") == 0
        return False
