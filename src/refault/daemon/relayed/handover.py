"""A planned restart while the channel is a session: what the pump has of it is written down, QEMU holds our
end of its leg meanwhile, and the next refault goes on. QEMU sees nothing."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from pathlib import Path

import trio

from refault.channel.relay import LegState, Relay, SessionState, SessionView
from refault.daemon.host.errors import OperatorError
from refault.daemon.known.course import Course
from refault.daemon.monitor.monitor import MonitorLost, QmpError
from refault.daemon.near.handed_leg import can_be_taken, end, identity_of, take
from refault.daemon.near.kept_ends import KeptEnds
from refault.daemon.record.session_file import NO_LEG, HandedChannel
from refault.daemon.record.state_file import StateFile
from refault.daemon.relayed.closing import Closing
from refault.daemon.relayed.guard import Guard
from refault.migration.phase import Role

log = logging.getLogger("refault.migration")

HELD_WITHIN = 2.0
"""For QEMU to take our end: a destination does not while its main thread waits for a page."""
ENDS_LOOK = 0.01
_BESIDE_RINGS = 1 << 20
"""Bytes, at the most, of what is written down beside the rings (cext/handed.h)."""


def release(directory: Path, vm: str) -> int | None:
    """Ends the leg that QEMU holds for the next refault of the VM, where that harms no guest; QEMU's process,
    None where there was none. Raises OperatorError where it is not to be ended, or cannot be."""
    state = StateFile(directory, vm)
    record = state.left()
    if record is None or record.leg is None:
        return None
    which = (record.generation, record.leg[1], record.handed)
    about = state.session.look(*which)
    qemu = f"{vm}: QEMU, process {record.qemu_pid},"
    try:
        sock = take(record.qemu_pid, record.qemu_started, record.leg)
        if sock is None:
            return None
        if about is None or not about.may_end:
            sock.close()
            raise OperatorError(
                f"{qemu} holds a migration's channel for the next refault, and to end it now might cost a"
                " guest: start refault once, which goes on with it, or ends it when that does no harm"
            )
        state.session.take(*which)  # nobody goes on with what is about to end
        end(sock)
        state.remove()
    except OSError as error:
        raise OperatorError(f"{qemu} holds a migration's channel that cannot be ended: {error}") from error
    return record.qemu_pid


class HandOver:
    """Of the newest channel of one relayed migration."""

    def __init__(self, course: Course, relay: Relay, kept: KeptEnds, guard: Guard, closing: Closing) -> None:
        self.leg: tuple[int, bytes] | None = None
        """By which the next refault finds our end of the leg; None: it is not to go on with it."""
        self.handed = secrets.token_hex(8)
        """Which hand-over it is or will be: the next refault goes on with no other."""
        self.done = False
        """Whether the channel is the next refault's."""
        self._course = course
        self._relay = relay
        self._kept = kept
        self._guard = guard
        self._closing = closing

    def leaves(self, main: socket.socket | None) -> None:
        """Has the next refault find that end of a leg, which QEMU is to hold or holds, though none was handed
        over; None: no more."""
        self.leg = identity_of(main) if main is not None else None
        self._course.remember()

    async def prepare(self) -> bool:
        """Has QEMU hold our end, while the relay goes on. False where it is not to be handed over, or QEMU
        does not answer soon."""
        main = self._kept.main
        self.leg = None
        if self._course.role is Role.DESTINATION:
            await self._until_ended()
        if self.delivers:
            return True
        if main is None or not self._is_possible():
            return False
        self.leg = identity_of(main)
        self._course.remember()  # who follows must know before QEMU holds it, and what it holds already
        with trio.move_on_after(HELD_WITHIN):
            await self._guard.give()
        if self._is_held():
            return True
        log.info(
            "%s: QEMU does not take our end of its leg, or that cannot be written down: the channel ends with"
            " this refault",
            self._course.name,
        )
        self._not_handed_over()
        return False

    @property
    def delivers(self) -> bool:
        """Whether a destination has completed, and its source has yet to hear that: nobody else tells it."""
        course, relay = self._course, self._relay
        if course.status != "completed" or course.role is not Role.DESTINATION or course.lanes.count:
            return False
        view = relay.session() if self._leg_has_ended else None
        if view is None or not _goes_on(view) or view.complete:
            return False
        return course.vm.state_file.usable(course.vm.qemu_pid)

    async def _until_ended(self) -> None:
        """A destination that completes says so and ends its leg, one right after the other."""
        course = self._course
        if self._relay.session() is None:
            return
        with trio.move_on_after(HELD_WITHIN):
            if course.under_way and self._leg_has_ended:
                with contextlib.suppress(QmpError, MonitorLost, trio.TooSlowError):
                    status = (await course.vm.query("query-migrate")).get("status")
                    if status == "completed":
                        course.on_status(status)
            # What tells of its end tells others.
            while course.status == "completed" and not self._leg_has_ended:  # noqa: ASYNC110
                await trio.sleep(ENDS_LOOK)

    @property
    def _leg_has_ended(self) -> bool:
        return self._relay.closed or self._relay.look().local is not LegState.OPEN

    def _is_held(self) -> bool:
        """Whether QEMU has said that it holds the leg of the newest channel, and the record tells of it."""
        main, leg = self._kept.main, self.leg
        if main is None or leg is None or not self._kept.by_qemu or identity_of(main) != leg:
            return False
        return self._course.vm.state_file.has(leg, self.handed)

    def _is_possible(self) -> bool:
        vm = self._course.vm
        if self._course.lanes.count or vm.encrypted or not self._session_is_there():
            return False
        passed = self._relay.passed()
        if passed.resumed and not passed.resume_acknowledged:
            return False  # nor would the next one know that it is not to end it
        return vm.state_file.usable(vm.qemu_pid) and can_be_taken(vm.qemu_pid)

    def _session_is_there(self) -> bool:
        view = self._relay.session()
        return view is not None and view.has_leg and _goes_on(view)

    def hand_over(self, generation: str, *, delivers: bool, may_close: bool, laid: tuple[str, ...]) -> None:
        """The channel is the next refault's from here on, where QEMU holds our end and what it needs can be
        written down; else it ends with this one. `delivers`: as it was when the record was written, for QEMU
        may end its side at any time; `may_close`: whether the leg could be ended now; `laid` as the role has
        it."""
        if self._relay.closed or (self.leg is None and not delivers):
            return
        try:
            if delivers:
                self._write_down(generation, None, may_close=False, laid=laid)
            elif self.leg is not None and self._is_held():  # QEMU may have ended its side since
                self._write_down(generation, self.leg, may_close=may_close, laid=laid)
        except OSError as error:
            log.warning("%s: the channel cannot be left to the next refault: %s", self._course.name, error)
        except Exception:  # the clients are to be handed over all the same
            log.exception("%s: internal error as the channel is left to the next refault", self._course.name)
        if not self.done:
            self._not_handed_over()

    def _write_down(
        self, generation: str, leg: tuple[int, bytes] | None, *, may_close: bool, laid: tuple[str, ...]
    ) -> None:
        """Raises OSError."""
        course, relay = self._course, self._relay
        # Where the stream is not read how far QEMU is was its word, which may be an old one by now.
        unread = relay.passed().opaque
        if course.role is Role.DESTINATION:
            stays = relay.runs_told or not unread
        else:  # it may write its last meanwhile, which nobody reads, and then an end has it run its guest
            stays = not (course.postcopy_began or course.guest_stopped or unread)
        view = relay.session()
        if view is None:
            return
        about = HandedChannel(
            generation=generation,
            leg=leg[1] if leg is not None else NO_LEG,
            handed=self.handed,
            peer_inode=self._closing.peer_inode,
            session=view.id,
            recovered=relay.recovered,
            runs_told=relay.runs_told,
            status=course.status,
            may_end=may_close and stays,
            laid=laid,
            guest_stopped=course.guest_stopped,
            stopped_by_switchover=course.stopped_by_switchover,
            never_postcopy=course.never_postcopy,
        )
        with course.vm.state_file.session.reserved(view.rings + _BESIDE_RINGS) as write:
            self.done = True  # from here on the next one has it, or ends it
            channel = relay.hand_over()
            if channel is None:
                self.done = False
                return
            write(about, channel)
        log.info("%s: the channel is left to the next refault", course.name)

    def _not_handed_over(self) -> None:
        self.leg = None
        self._course.remember()


def _goes_on(view: SessionView) -> bool:
    return view.state in (SessionState.CARRIED, SessionState.BETWEEN)
