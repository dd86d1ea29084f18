"""The relay pump (cext/relay.c): one thread a migration, steered and watched from here without ever waiting
for it."""

from __future__ import annotations

import contextlib
import enum
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from refault.channel._channel import ffi, lib
from refault.channel.pagemap import (
    BlockStats,
    Latency,
    PageMapStats,
    read_block_stats,
    read_latency,
    read_stats,
)
from refault.channel.tracker import Fact, Kept, Restored, StateFds
from refault.migration.phase import Passed, Role
from refault.session.wire import Positions

MEMORY_CEILING = 512 * 1024 * 1024
"""Bytes that the tracking of one migration may take; a guest of 1 TiB whose every page was forwarded takes
64 MiB."""

SOURCE_QUEUE = int(lib.RF_QUEUE_SOURCE)
"""SO_SNDBUF, in bytes, of a source's end of a leg; the pump sizes the rest (cext/queues.h)."""
DEAD_AFTER_SECONDS = 5
"""How long the other host may be silent in postcopy, though asked, before the channel counts as lost."""
RUN_SECONDS = 1.0
"""From PONG 3 until the destination has surely read RUN, the next command, where no event says that it runs
(a guest that is to stay paused)."""


class Lane(enum.IntEnum):
    """What a further connection of a channel carries (cext/lane.h)."""

    PREEMPT = lib.RF_LANE_PREEMPT
    MULTIFD = lib.RF_LANE_MULTIFD


class SessionEnd(enum.IntEnum):
    """Which end of a session a channel's far leg may become (cext/link.h)."""

    NO = lib.RF_LINK_NO
    DIALS = lib.RF_LINK_DIALS
    ANSWERS = lib.RF_LINK_ANSWERS


class SessionState(enum.IntEnum):
    """How far it is one (cext/link.h)."""

    NONE = lib.RF_LINK_NONE
    PLAIN = lib.RF_LINK_PLAIN
    OFFERED = lib.RF_LINK_OFFERED
    CARRIED = lib.RF_LINK_CARRIED
    BETWEEN = lib.RF_LINK_BETWEEN
    OVER = lib.RF_LINK_OVER


class LegState(enum.IntEnum):
    """The state of one leg (cext/leg.h)."""

    NONE = lib.RF_LEG_NONE
    OPEN = lib.RF_LEG_OPEN
    ENDED = lib.RF_LEG_ENDED
    FAILED = lib.RF_LEG_FAILED
    CLOSED = lib.RF_LEG_CLOSED
    REFUSED = lib.RF_LEG_REFUSED

    @property
    def lost(self) -> bool:
        """Whether the peer ended it, or it broke, or we refused what is behind it."""
        return self in (LegState.ENDED, LegState.FAILED, LegState.REFUSED)


@dataclass(frozen=True)
class RelayView:
    """What the pump published last. Times are CLOCK_MONOTONIC in ns, 0 for never; byte counts are of the
    migration."""

    channel: int
    local: LegState
    far: LegState
    local_error: int
    far_error: int
    forward_bytes: int
    return_bytes: int
    replayed: int
    held: int
    last_replay_ns: int
    lost_ns: int
    lanes: int
    """Connections that were added beside the main one of this channel."""
    waiting: bool
    """Whether bytes are held back until all lanes are there."""
    last_lanes: bool
    """Whether a source's QEMU has ended its leg, and the lanes that it had opened are yet to be added."""

    @property
    def passed_bytes(self) -> int:
        """In both directions."""
        return self.forward_bytes + self.return_bytes

    def far_loss(self) -> str:
        """How the far leg was lost, in words."""
        return _loss(self.far, self.far_error)

    def local_loss(self) -> str:
        """How the local leg was lost, in words."""
        return _loss(self.local, self.local_error)


@dataclass(frozen=True)
class SessionView:
    """A session as the pump has it at this moment."""

    state: SessionState
    channel: int
    """The number of the channel that it is."""
    error: int
    """What ended the last connection: an errno, 0 for its end in order, or below 0 what was wrong with what
    the peer said (enum rf_wrong)."""
    id: bytes
    has_leg: bool
    """Whether QEMU's side has not ended; else what is left is delivered."""
    delivered: bool
    """Whether our own stream is over and acknowledged."""
    complete: bool
    """Whether both streams are over, acknowledged and taken, and nothing is to be told any more."""
    word_due: bool
    """Whether it is to be told what became of QEMU (`Relay.session_last_word`)."""
    broke_there: bool
    """Whether the other end has said that its QEMU broke."""
    lost_ns: int
    """CLOCK_MONOTONIC, since when there is no connection; 0 where there is one."""
    moved: int
    """Bytes received and acknowledged."""
    taken: int
    """Bytes of the other's stream that QEMU's side has taken."""
    end: int
    """Where our own stream ends so far."""
    retransmitted: int
    """Bytes that were sent more than once."""
    kept: int
    """Bytes in its rings."""
    rings: int
    """Bytes that its rings have."""

    @property
    def lost_for(self) -> float | None:
        """Seconds since when there is no connection; None where there is one."""
        return time.monotonic() - self.lost_ns / 1e9 if self.lost_ns else None

    def why(self) -> str:
        """What ended the last connection, in words."""
        if self.error < 0:
            return f"the other refault is not to be believed (rule {-self.error} of the session protocol)"
        return os.strerror(self.error) if self.error else "it was closed"


def _loss(state: LegState, error: int) -> str:
    match state:
        case LegState.ENDED:
            return "closed by the other side"
        case LegState.FAILED:
            return os.strerror(error)
        case LegState.REFUSED:
            return "cut by refault: the destination behind it is another VM's"
        case _:
            return state.name.lower()


def _told(peer: Positions) -> Any:
    at = (peer.received, peer.written, peer.first_kept, peer.end, peer.window)
    return ffi.new("struct rf_positions *", at)


@contextlib.contextmanager
def _closed_on_error(*descriptors: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):
        for descriptor in descriptors:
            os.close(descriptor)
        raise


class Relay:
    """One migration's pump and tracker; `close` ends it.

    After that all but `closed` and `close` raises ValueError.
    """

    def __init__(
        self,
        role: Role,
        *,
        ceiling: int = MEMORY_CEILING,
        dead_after: int = DEAD_AFTER_SECONDS,
        state: StateFds | None = None,
    ) -> None:
        """Starts the thread. Raises OSError where memory, descriptors or threads are short."""
        side = lib.RF_RELAY_SOURCE if role is Role.SOURCE else lib.RF_RELAY_DESTINATION
        state = state or StateFds(-1, b"")
        self._relay = lib.rf_relay_start(
            side, ceiling, dead_after, state.new, state.old, state.key, len(state.key)
        )
        if self._relay == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self._tracker = lib.rf_relay_tracker(self._relay)
        self._map = lib.rf_tracker_pagemap(self._tracker)
        self._last: RelayView | None = None
        self._loaded_at: float | None = None
        self._runs_told = False
        self._role = role
        self.stale = False
        """Whether `look` gave an older picture, for the pump kept writing: look again soon."""
        self._resumed = False
        self._retransmitted = 0
        """By the sessions of the channels before the newest."""
        self._lanes = 0
        self.attached = 0
        """How many channels it was given: the number of the newest, which the pump may not have come to."""
        self.restored = Restored(lib.rf_tracker_restored(self._tracker))
        """What was found in the old state file."""

    def __del__(self) -> None:
        # One that nobody can close any more: neither its thread nor its descriptors stay.
        if getattr(self, "_relay", ffi.NULL) != ffi.NULL:
            self.close()

    @property
    def notify_fd(self) -> int:
        """An eventfd, readable when something changed; read it, then look."""
        return int(lib.rf_relay_notify_fd(self._open()))

    @property
    def kept(self) -> Kept:
        """How much of the page map is in the state file."""
        self._open()
        return Kept(lib.rf_tracker_kept(self._tracker))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._relay == ffi.NULL)

    def _open(self) -> Any:
        if self.closed:
            raise ValueError("the relay is closed")
        return self._relay

    def look(self) -> RelayView:
        """The newest picture (or the one before, where the pump was writing)."""
        raw = ffi.new("struct rf_relay_view *")
        self.stale = not lib.rf_relay_look(self._open(), raw)
        if not self.stale or self._last is None:
            self._last = RelayView(
                channel=raw.channel,
                local=LegState(raw.local_state),
                far=LegState(raw.far_state),
                local_error=raw.local_error,
                far_error=raw.far_error,
                forward_bytes=raw.forward_bytes,
                return_bytes=raw.return_bytes,
                replayed=raw.replayed,
                held=raw.held,
                last_replay_ns=raw.last_replay_ns,
                lost_ns=raw.lost_ns,
                lanes=raw.lanes,
                waiting=bool(raw.waiting),
                last_lanes=bool(raw.last_lanes),
            )
        return self._last

    def passed(self) -> Passed:
        """What has passed, for the phase."""
        self._open()
        facts = Fact(lib.rf_tracker_facts(self._tracker))
        channel = Fact(lib.rf_tracker_channel_facts(self._tracker))
        return Passed(
            discarding=Fact.POSTCOPY_DISCARD_SEEN in facts,
            packaged_begun=Fact.PACKAGED_BEGUN in facts,
            packaged_passed=Fact.PACKAGED_PASSED in facts,
            running=self._runs(facts),
            completing=Fact.COMPLETION_BEGUN in channel,
            ended=Fact.EOF_PASSED in channel,
            shut=Fact.SHUT_PASSED in channel,
            resumed=self._resumed,
            resume_acknowledged=Fact.RESUME_ACK_PASSED in channel,
            opaque=self.opaque_reason() is not None,
        )

    @property
    def recovered(self) -> bool:
        """Whether the newest channel follows a lost one."""
        self._open()
        return self._resumed

    @property
    def host_page_cut(self) -> bool:
        """Whether the source goes on with a host page in its midst, which the destination will refuse."""
        self._open()
        return Fact.HOST_PAGE_CUT in Fact(lib.rf_tracker_channel_facts(self._tracker))

    def guest_runs(self) -> None:
        """The destination's QEMU has said so: an event RESUME."""
        self._open()
        self._runs_told = True

    @property
    def runs_told(self) -> bool:
        """Whether it was said that the destination runs."""
        self._open()
        return self._runs_told

    def _runs(self, facts: Fact) -> bool:
        """PONG 3 comes right before RUN (tracker.h). Until RUN is read a destination does not pause but exits
        (savevm.c, qemu_loadvm_state_main), and PONG 4, another thread's, may come before that too."""
        if Fact.PONG_3 not in facts:
            return False
        if self._loaded_at is None:
            self._loaded_at = time.monotonic()
        told = self._role is Role.SOURCE or self._runs_told
        return told or time.monotonic() - self._loaded_at >= RUN_SECONDS

    def opaque_reason(self) -> str | None:
        """Why the bytes are no longer read, in words; None while both directions are decoded."""
        self._open()
        for reason in (
            lib.rf_tracker_forward_opaque(self._tracker),
            lib.rf_tracker_return_opaque(self._tracker),
        ):
            if reason:
                return str(ffi.string(lib.rf_forward_reason_text(reason)).decode())
        return None

    def trust_bitmaps(self) -> None:
        """Takes no received bitmap for another VM's from now on (cext/tracker.h says when that is right)."""
        self._open()
        lib.rf_tracker_trust_bitmaps(self._tracker)

    def pages(self) -> PageMapStats:
        """Page requests and what became of them, over all RAM blocks."""
        self._open()
        return read_stats(self._map)

    def blocks(self) -> list[BlockStats]:
        """The same by RAM block."""
        self._open()
        return read_block_stats(self._map)

    def latency(self) -> Latency:
        """How long the answered requests took."""
        self._open()
        return read_latency(self._map)

    def attach(
        self,
        local_fd: int,
        far_fd: int,
        *,
        recovered: bool,
        may_replay: bool,
        lanes: int = 0,
        session: SessionEnd = SessionEnd.NO,
        session_id: bytes = bytes(16),
        encrypted: bool = False,
    ) -> None:
        """Joins two stream sockets as the next channel, to which `lanes` more connections belong. `session`:
        what the far one may become; who answers offers it under `session_id`, or in a TLS handshake, where it
        is `encrypted`, under what both have of that.

        Both descriptors are the pump's from now on, and closed on an error. Raises OSError where memory is
        short.
        """
        with _closed_on_error(local_fd, far_fd):
            retransmitted = self.retransmitted()
            attached = lib.rf_relay_attach(
                self._open(),
                local_fd,
                far_fd,
                recovered,
                may_replay,
                lanes,
                int(session),
                encrypted,
                session_id,
            )
            self._give(attached)
        self._resumed = recovered
        self._retransmitted = retransmitted
        self.attached += 1
        self._lanes = lanes

    def add_lane(
        self, channel: int, kind: Lane, local_fd: int, far_fd: int | None, *, number: int = 1
    ) -> None:
        """Joins two stream sockets as a further lane of `channel`; of one that is gone, both are closed.
        `number`: which of a session it may be; 0 for none. `far_fd` None: it begins as one of the session
        that the channel is.

        As for `attach`.
        """
        far = () if far_fd is None else (far_fd,)
        with _closed_on_error(local_fd, *far):
            self._give(
                lib.rf_relay_add_lane(self._open(), channel, int(kind), number, local_fd, *far or (-1,))
            )

    def _give(self, result: int) -> None:
        if result < 0:
            raise OSError(ffi.errno, os.strerror(ffi.errno))

    def no_more_lanes(self, channel: int) -> None:
        """A source's QEMU opens no more lanes of `channel` than were added. Raises as `lose` does."""
        self._give(lib.rf_relay_no_more_lanes(self._open(), channel))

    def lose(self, channel: int, error: int) -> None:
        """Ends the far legs of `channel`, if it is the one attached last, as if one had broken with `error`,
        an errno. Raises OSError where memory is short.
        """
        self._give(lib.rf_relay_lose(self._open(), channel, error))

    def say(self, channel: int, message: bytes) -> None:
        """Says a message, of at most 64 bytes, to the QEMU of a source on the return path of `channel`,
        between two others; nothing where it does not hear. Raises OSError where memory is short.
        """
        self._give(lib.rf_relay_say(self._open(), channel, message, len(message)))

    def in_postcopy(self) -> None:
        """The destination runs, by QEMU's word, for the stream cannot be read: queues are short from here
        on, and silence is a loss. Raises as `lose` does.
        """
        self._give(lib.rf_relay_in_postcopy(self._open()))

    def close_channel(self, channel: int) -> None:
        """Closes both legs of `channel`, if it is still the one attached last. Raises as `lose` does."""
        self._give(lib.rf_relay_close_channel(self._open(), channel))

    def complete(self) -> None:
        """Tells the tracker that the migration has ended, so that nothing is outstanding any more.

        Raises as `lose` does.
        """
        self._give(lib.rf_relay_complete(self._open()))

    # ---- the session ----

    # Of its lanes 0 is the main connection.

    def session(self, lane: int = 0) -> SessionView | None:
        """The session of this migration as it is now; None where there is none, or none any more, as once it
        is closed."""
        if self.closed:
            return None
        view = ffi.new("struct rf_link_view *")
        if not lib.rf_relay_session_look(self._open(), lane, view):
            return None
        return SessionView(
            state=SessionState(view.state),
            channel=view.channel,
            error=int(ffi.cast("int64_t", view.error)),
            id=bytes(ffi.buffer(view.id)),
            has_leg=bool(view.has_leg),
            delivered=bool(view.delivered),
            complete=bool(view.complete),
            word_due=bool(view.word_due),
            broke_there=bool(view.broke_there),
            lost_ns=view.lost_ns,
            moved=view.moved,
            taken=view.taken,
            end=view.end,
            retransmitted=view.retransmitted,
            kept=view.kept,
            rings=view.rings,
        )

    def sessions(self) -> list[SessionView]:
        """The same of each of its lanes that there is."""
        views = (self.session(lane) for lane in range(1 + self._lanes))
        return [view for view in views if view is not None]

    def retransmitted(self) -> int:
        """Bytes that all sessions of this migration have sent more than once."""
        newest = [view for view in self.sessions() if view.channel == self.attached]
        return self._retransmitted + sum(view.retransmitted for view in newest)

    def session_tell(self, lane: int = 0) -> Positions | None:
        """Our positions, to be told the other end; None where there is no session."""
        at = ffi.new("struct rf_positions *")
        if not lib.rf_relay_session_tell(self._open(), lane, at):
            return None
        return Positions(at.received, at.written, at.first_kept, at.end, at.window)

    def session_rejoin(self, peer: Positions, lane: int = 0) -> bool:
        """Closes the session's connection, for the peer of the next one has told this. False where that is
        not to be believed, or there is no session."""
        return bool(lib.rf_relay_session_rejoin(self._open(), lane, _told(peer)) == lib.RF_RIGHT)

    def session_adopt(self, fd: int, peer: Positions | None = None, lane: int = 0) -> bool:
        """Goes on with a connection, the pump's from now on; `peer`: what its peer has told, where
        `session_rejoin` has not been told so. False as there: it is the caller's then."""
        told = ffi.NULL if peer is None else _told(peer)
        return bool(lib.rf_relay_session_adopt(self._open(), lane, told, fd) == lib.RF_RIGHT)

    def session_withdraw(self, lane: int = 0) -> None:
        """No session comes of the offer: the plain connection goes on alone, if it still does. Of lane 0:
        those of all lanes."""
        lib.rf_relay_session_withdraw(self._open(), lane)

    def session_give_up(self, error: int, lane: int = 0) -> None:
        """The lane's next connection is waited for no longer: its far leg is lost, with `error`, an errno,
        or 0 where it ended in order. Of lane 0: with an error those of all lanes."""
        lib.rf_relay_session_give_up(self._open(), lane, error)

    def session_last_word(self, *, broke: bool, lane: int = 0) -> None:
        """Where that is due: whether the destination's QEMU, which has ended its side without a word, broke,
        and its source is to be told."""
        lib.rf_relay_session_last_word(self._open(), lane, broke)

    # ---- from one process to the next ----

    def hand_over(self) -> bytes | None:
        """What the next process needs to go on with the newest channel, which is its from then on: QEMU must
        hold our end of its leg by then, unless it has ended its own, and sees nothing. None where that cannot
        be (cext/channel.h): then nothing has changed."""
        length = ffi.new("size_t *")
        handed = lib.rf_relay_hand_over(self._open(), length)
        if handed == ffi.NULL:
            return None
        try:
            return bytes(ffi.buffer(handed, length[0]))
        finally:
            lib.rf_relay_handed_free(handed)

    def go_on(self, local_fd: int, handed: bytes | None, *, recovered: bool) -> bool:
        """Goes on with that as the first channel, which was `recovered` or not; None: as one whose far leg
        is lost. `local_fd` is the pump's from then on; -1 where QEMU has ended its side. False where what was
        handed over is not to be believed, or memory is short: then nothing has changed."""
        told = ffi.NULL if handed is None else ffi.from_buffer(handed)
        if lib.rf_relay_go_on(self._open(), local_fd, told, len(handed or b"")) < 0:
            return False
        self._resumed = recovered
        self.attached += 1
        return True

    def close(self, *, keep_local: bool = False) -> None:
        """Ends the thread and closes both legs, within 20 ms or behind this; the object is of no more use.

        `keep_local`: QEMU holds our end of the local leg too by now, and must not see it end.
        """
        if not self.closed:
            lib.rf_relay_stop(self._relay, keep_local)
            self._relay = ffi.NULL
            self._tracker = ffi.NULL
