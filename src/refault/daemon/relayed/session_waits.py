"""How long a channel that is a session waits for its next connection (migration/session_patience.py)."""

from __future__ import annotations

import contextlib
import math

import trio

from refault.daemon.kernel.process import still_runs
from refault.daemon.known.course import Course
from refault.daemon.monitor.monitor import MonitorLost, QmpError
from refault.daemon.relayed.channels import Channels
from refault.migration.phase import Phase, Role
from refault.migration.session_patience import NETWORK, session_patience
from refault.migration.word import Word, phase_after_loss

ENDED_PATIENCE = 30.0
"""QEMU has ended its side, and nobody waits for what is left."""
_PAUSES = (Phase.SWITCHOVER, Phase.POSTCOPY, Phase.RECOVERY_HANDSHAKE)
"""The phases in which a source whose channel has ended has paused."""
KNOWN_WITHIN = 60.0
"""A QEMU that has ended its side without a word ends, or has completed. One that ends gives much memory back
before."""
_LOOK = 0.02
ANSWERS_WITHIN = 0.5
"""A source that has handed its channel all that it has answers again so soon."""


class SessionWaits:
    """Of one relayed migration."""

    def __init__(self, course: Course, channels: Channels) -> None:
        self._course = course
        self._channels = channels
        self._word: Word | None = None
        """QEMU's last, where its stream is not read."""

    def seconds(self) -> float:
        """As things stand now."""
        told = self._course.vm.patience.session_patience
        if self._channels.relay.closed or self._has_paused:
            return 0.0
        if self._completes_perhaps:
            return NETWORK if told is None else told
        seconds = session_patience(
            self._channels.phase,
            self._course.role,
            self._channels.relay.passed(),
            stopped=self._course.guest_stopped,
        )
        return seconds if told is None or math.isinf(seconds) else told

    def delivers_for(self) -> float:
        """The same once QEMU has ended its side. A source waits for its destination's last word."""
        course, channels = self._course, self._channels
        if course.role is Role.DESTINATION:
            return ENDED_PATIENCE if course.gone else math.inf
        return 0.0 if channels.relay.closed or channels.phase in _PAUSES else ENDED_PATIENCE

    async def ended_without_guest(self) -> bool:
        """Of a destination whose QEMU has ended its side without a word: waits until it is known what became
        of it; whether its process has ended, and never had the guest.

        The process is asked for, not the leg: what no longer runs has no guest, whatever it did before. One
        that had it for a moment may have written to its disks, so that is left to an operator.
        """
        course = self._course
        pid, started = course.vm.qemu_pid, course.vm.qemu_started
        if pid is None:
            return False
        with trio.move_on_after(KNOWN_WITHIN):
            # Of its end the monitor's tells, behind all that QEMU said there; `failed` is said right before.
            while self._channels.tells and not course.gone and course.status != "completed":  # noqa: ASYNC110
                await trio.sleep(_LOOK)
        if not self._channels.tells or not course.gone or course.postcopy_began:
            return False
        return not self._channels.relay.runs_told and not still_runs(pid, started)

    @property
    def _has_paused(self) -> bool:
        """Whether a source's QEMU has said so, though not all that it wrote is taken from it yet.

        It waits for nothing and dials nobody: a destination that has lost its refault may be recovered by
        hand from here on, and its QEMU would not survive our HELLO.
        """
        return self._course.role is Role.SOURCE and self._course.pause_told.is_set()

    @property
    def _completes_perhaps(self) -> bool:
        """Whether a source is in postcopy, in its midst or at its end: what passes cannot be read."""
        channels = self._channels
        is_source = self._course.role is Role.SOURCE
        return is_source and channels.unread and channels.phase in (Phase.POSTCOPY, Phase.COMPLETING)

    async def _completes(self) -> bool:
        """The same, by what QEMU says of it: one that may be at its end waits on, and is asked again."""
        channels = self._channels
        before, self._word = self._word, None
        with trio.move_on_after(ANSWERS_WITHIN):
            # Whose monitor is lost, or says what nobody understands, may be anywhere, as who says nothing.
            with contextlib.suppress(QmpError, MonitorLost, trio.TooSlowError):
                self._word = await channels.word.ask()
        if channels.relay.closed:
            return False
        if self._word is None:
            return channels.word.unanswered(channels.phase) is Phase.COMPLETING
        phase = phase_after_loss(channels.relay.passed(), Role.SOURCE, before, self._word)
        return phase in (None, Phase.COMPLETING)

    async def has_sent_all(self) -> bool:
        """Whether a source waits for nothing but its destination's last word.

        A close would have it run its guest again, and the destination may run it. While it writes the rest it
        answers nobody (migration/migration.c, migration_completion holds the BQL).
        """
        course = self._course
        if self._completes_perhaps:
            return await self._completes()
        if course.role is not Role.SOURCE or self._channels.phase is not Phase.PRECOPY:
            return False
        if not course.guest_stopped and not self._channels.unread:
            return False  # of one that cannot be read STOP may have come while no refault was there
        with trio.move_on_after(ANSWERS_WITHIN):
            try:
                migrate = await course.vm.query("query-migrate")
            except trio.TooSlowError:
                return False
            except (QmpError, MonitorLost):
                return True  # it may have, and is asked again
            ram = migrate.get("ram")
            return isinstance(ram, dict) and ram.get("remaining") == 0
        return False
