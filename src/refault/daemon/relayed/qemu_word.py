"""Asks QEMU how far its migration is, where what passes does not say it (migration/word.py)."""

from __future__ import annotations

import contextlib
import dataclasses

import trio

from refault.channel.relay import Relay
from refault.daemon.known.course import Course
from refault.migration.phase import Phase, Role
from refault.migration.word import Word, word_of

ASKED_EVERY = 1.0
"""Seconds until QEMU has answered the next time, where the stream is not read."""
ANSWERED_WITHIN = 0.5
"""A source that has come through the TLS handshake has answered its command so soon after the far side's
end."""

BEFORE_STREAM = (None, "setup", "postcopy-paused", "postcopy-recover-setup")
"""The statuses of a source that may still be in the TLS handshake of its newest channel
(migration/migration.c, migrate_fd_connect, which the handshake's end calls, sets the next)."""


class QemuWord:
    """What the QEMU of one relayed migration said last, and which of its commands it has answered."""

    def __init__(self, course: Course, relay: Relay) -> None:
        self.last: Word | None = None
        self._course = course
        self._relay = relay
        self._asked_at = 0.0
        self._told_pump = False
        self._answered = 0

    @property
    def wanted(self) -> bool:
        """Whether bytes pass that cannot be read."""
        return not self._relay.closed and self._relay.passed().opaque

    async def ask(self) -> Word:
        """How far QEMU is. Raises what `execute` raises."""
        vm = self._course.vm
        source = self._course.role is Role.SOURCE
        second = "query-migrate-parameters" if source else "query-status"
        migrate, more = await vm.query_both("query-migrate", second)
        left = not source and more.get("status") not in (None, "inmigrate")
        runs = left or (not self._relay.closed and self._relay.runs_told)
        word = word_of(migrate, more if source else {}, runs=runs)
        if source and word.nothing_left and self._course.had_session:
            stands = (await vm.query("query-status")).get("running") is False
            word = dataclasses.replace(word, stands=stands)
        self.last, self._asked_at = word, trio.current_time()
        if (runs or word.requests > 0) and not self._relay.closed:
            self._relay.guest_runs()
            self.tell_pump()
        return word

    def tell_pump(self) -> None:
        """The pump cannot read that the destination runs, and from when on it is to mind silence."""
        in_postcopy = self.wanted and self._relay.runs_told and not self._course.never_postcopy
        if in_postcopy and not self._told_pump:
            with contextlib.suppress(OSError):  # another time, then
                self._relay.in_postcopy()
                self._told_pump = True

    def much_left(self, seconds: float) -> bool:
        """Whether a source is far from its completion for some seconds more, going by its last word. What it
        sends once its session has no connection is what the rings take."""
        if self.last is None:
            return False
        view = self._relay.session()
        ours = view is not None and view.channel == self._relay.attached  # else of one before
        rings, lost_for = (view.rings, view.lost_for or 0.0) if view is not None and ours else (0, 0.0)
        age = max(0.0, trio.current_time() - lost_for - self._asked_at)
        return self.last.far_from_completion(age + seconds, rings=rings)

    @property
    def sent_all(self) -> bool:
        """Whether a source has sent all in precopy, by its last word. Asked of channels that were a session:
        the other host's refault has all of it yet, when the last connection to it is long gone."""
        return self.last is not None and self.last.sent_all

    def unanswered(self, phase: Phase, *, writes: bool = False) -> Phase:
        """The phase of a QEMU that answers nothing, in `phase` by what is known: the worst that it may be in.
        `writes`: whether it has written what nobody reads.

        A source does so in the completion (word.py), and before the destination runs while it sends PACKAGED.
        One that has sent all in precopy may have what else there is to keep it from an answer.
        """
        if self._course.role is Role.DESTINATION:
            return Phase.SWITCHOVER if phase is Phase.PRECOPY else phase
        if not self._course.postcopy_began:
            may_have_sent_all = phase is Phase.PRECOPY and self._course.had_session and not writes
            return Phase.COMPLETING if may_have_sent_all else phase
        packaged = self.wanted and not self._relay.runs_told and self.much_left(ASKED_EVERY)
        return Phase.SWITCHOVER if packaged else Phase.COMPLETING

    def answered(self, channel: int) -> None:
        """QEMU has answered the command that named `channel`."""
        self._answered = channel

    async def in_tls_handshake(self, channel: int) -> bool:
        """Whether a source never came through the TLS handshake of `channel`, in which it answers nothing."""
        course = self._course
        if course.role is not Role.SOURCE or not course.vm.encrypted or self.came_through(channel):
            return False
        await trio.sleep(ANSWERED_WITHIN)
        return not (self.came_through(channel) or self._relay.closed)

    def came_through(self, channel: int) -> bool:
        """Whether a source is known to have come through the TLS handshake of `channel`, the newest: its
        status may be told before its answer is."""
        return self._answered == channel or self._course.status not in BEFORE_STREAM
