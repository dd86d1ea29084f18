"""How the local leg of a lost channel is closed, where it may be (migration/legs.py): at once; or the return
path first, for a source before 8.2; or once a destination's preempt thread has taken the channel up."""

from __future__ import annotations

import contextlib
import math
import socket

import trio

from refault.channel.relay import Relay
from refault.daemon.known.course import Course
from refault.daemon.near.kept_ends import KeptEnds
from refault.daemon.near.return_path import end_first
from refault.migration.legs import WAITS_FOR_PONG
from refault.migration.messages import PONG_LOADED
from refault.migration.phase import Phase, Role
from refault.migration.versions import abilities

SAID_WITHIN = 0.02
"""Seconds until a source is asked again how far it is: without the `events` capability it does not tell."""
WRITES_FOR = 0.1
"""The same of one that cannot be read: an iteration of QEMU's takes 0.05 (migration/ram.c, MAX_WAIT)."""
_SIP = 64 * 1024
_SIP_EVERY = 0.001
PREEMPT_WAKES_WITHIN = 0.3
"""Seconds from RESUME_ACK until a destination's preempt thread has surely taken up the new channel."""
_ACK_WITHIN = 5.0
"""Seconds for which RESUME_ACK is waited for where the channel has been lost meanwhile."""


class Closing:
    """Of the newest channel of one relayed migration."""

    def __init__(self, course: Course, relay: Relay, kept: KeptEnds) -> None:
        self._course = course
        self._relay = relay
        self._kept = kept
        self._channel = 0
        self.peer_inode = 0
        """Of QEMU's end of the newest channel's local leg."""
        self._return_path_over = False
        self._ending = trio.Lock()
        self._said_to = 0
        """The channel on which that was said."""
        self._preempt_given = False
        """Whether QEMU has been given, or is being given, the preempt lane of a recovered channel."""
        self._ack_at = math.inf
        """When RESUME_ACK was seen on this channel."""
        self._acknowledged = trio.Event()
        """Set then, or when there is nothing to wait for any more."""

    def begin(self, channel: int, peer_inode: int) -> None:
        """A new channel has been joined; QEMU's end of its local leg is socket `peer_inode`."""
        self._channel = channel
        self.peer_inode = peer_inode
        self._return_path_over = False
        self._preempt_given = False
        self._ack_at = math.inf
        self._acknowledged.set()
        self._acknowledged = trio.Event()

    def look(self) -> None:
        """To be told whenever the pump told of something."""
        if not self._acknowledged.is_set() and self._relay.passed().resume_acknowledged:
            self._ack_at = trio.current_time()
            self._acknowledged.set()

    def end(self) -> None:
        """The relay ends: nothing is waited for any more."""
        self._acknowledged.set()

    def gives_preempt(self, channel: int) -> None:
        """To be told before QEMU is given the preempt lane of `channel`.

        From then on a recovered channel's legs must stay until QEMU's preempt thread has taken it up. Did the
        main one end before QEMU had accepted the lane, it would take that for a main channel (migration.c,
        migration_ioc_process_incoming). Did it end right behind RESUME, the thread that this wakes would read
        from no channel (savevm.c, postcopy_pause_incoming; postcopy-ram.c, postcopy_preempt_thread). 10.0
        segfaults in both cases.
        """
        self._preempt_given = channel == self._channel and self._relay.passed().resumed

    def close(self, phase: Phase) -> None:
        """Closes the channel, lost in `phase`, as soon as its QEMU survives it."""
        course = self._course
        lags = course.role is Role.SOURCE and abilities(course.vm.version).resume_after > 0
        if phase is Phase.POSTCOPY and lags:
            course.vm.start_soon(self.close_return_path_first, self._channel)
        elif self._preempt_thread_wakes():
            course.vm.start_soon(self._close_when_awake, self._channel)
        else:
            self.close_now(self._channel)

    def close_now(self, channel: int) -> None:
        """Closes `channel` if it is still there."""
        if not self._relay.closed:
            self._relay.close_channel(channel)
        if channel == self._channel:
            self._kept.drop()

    async def close_return_path_first(self, channel: int) -> None:
        """Closes a lost channel, and the return path a little earlier, where QEMU is seen to take note."""
        async with self._ending:
            pid = self._course.vm.qemu_pid
            try:
                if self._kept.main is not None and pid is not None:
                    over = await end_first(self._kept.main, pid, self.peer_inode)
                    self._return_path_over = over and channel == self._channel
            finally:
                self.close_now(channel)

    async def return_path_over(self) -> bool:
        """Whether QEMU's return-path thread has surely left the lost channel; waits for what sees to it."""
        async with self._ending:
            return self._return_path_over

    async def bring_on(self, channel: int, *, say: bool) -> None:
        """Has a source's QEMU take note that its guest has arrived, though its destination is lost.

        Since 10.2 it is in `postcopy-device` until PONG 0x42 has come; did its channel end before, it would
        run the guest again, be it at the destination or not (11.1). Told so it pauses, as QEMU up to 10.1
        does. The PONG is said once; where it cannot be (not `say`) it may have come before the loss. Returns
        when QEMU has taken note, or has not for SAID_WITHIN or WRITES_FOR.
        """
        seconds = SAID_WITHIN if say else WRITES_FOR
        if self._kept.main is None or channel != self._channel:
            await trio.sleep(seconds)
            return
        if say and self._said_to != channel and not self._relay.closed:
            self._said_to = channel
            with contextlib.suppress(OSError):
                self._relay.say(channel, PONG_LOADED)
        with trio.socket.from_stdlib_socket(self._kept.main.dup()) as leg, contextlib.suppress(OSError):
            with trio.move_on_after(seconds):
                # In the midst of a write it takes note of nothing (migration_iteration_run). No more is read
                # than need be: one that has sent all is in its completion.
                while self._course.status == WAITS_FOR_PONG and channel == self._channel:
                    with trio.move_on_after(_SIP_EVERY):
                        await leg.recv(_SIP, socket.MSG_DONTWAIT)
                    await trio.sleep(_SIP_EVERY)

    async def swallow(self) -> None:
        """Reads what QEMU still writes on a lost channel, into nothing, until it ends it or we are cancelled.

        The pump reads nothing that it cannot pass on, and a QEMU that writes takes note of nothing else.
        """
        if self._kept.main is not None:
            with trio.socket.from_stdlib_socket(self._kept.main.dup()) as leg, contextlib.suppress(OSError):
                while await leg.recv(1 << 16, socket.MSG_DONTWAIT):
                    pass

    def _preempt_thread_wakes(self) -> bool:
        """Whether QEMU's preempt thread may still be on its way back from the last pause."""
        if not self._preempt_given or self._relay.closed:
            return False
        return trio.current_time() < self._ack_at + PREEMPT_WAKES_WITHIN

    async def preempt_thread_awake(self) -> None:
        """Waits until it surely has come back from the last pause."""
        if self._preempt_thread_wakes():
            with trio.move_on_after(_ACK_WITHIN):
                await self._acknowledged.wait()
            await trio.sleep(PREEMPT_WAKES_WITHIN)

    async def _close_when_awake(self, channel: int) -> None:
        try:
            await self.preempt_thread_awake()
        finally:
            self.close_now(channel)
