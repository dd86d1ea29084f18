"""The classes of loss, where in a migration's life each belongs, and how each is made."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from typing import Literal

from refault.lab.channel import Cut, Loss
from refault.lab.story import SIDES, Side

# The places in the stream (QEMU: migration/savevm.c, qemu_savevm_command_send; migration.c,
# migrate_send_rp_message). All integers are big-endian.
PING_2 = rb"\x08\x00\x02\x00\x04\x00\x00\x00\x02"
PACKAGED = rb"\x08\x00\x07\x00\x04"
PONG_3 = rb"\x00\x02\x00\x04\x00\x00\x00\x03"
RECV_BITMAP_COMMAND = rb"\x08\x00\x0a"
RECEIVED_BITMAP = rb"\x00\x05..[\x01-\x40]"
RESUME = rb"\x08\x00\x09\x00\x00"
RESUME_ACK = rb"\x00\x06\x00\x04\x00\x00\x00\x01"
# The last frame of the section `ram`, its footer, QEMU_VM_EOF (qemu_savevm_state_complete_postcopy).
EOF = rb"\x00{7}\x10\x7e\x00\x00\x00.\x00"

Broken = Literal[Loss.RESET, Loss.CLOSE]


class Place(enum.Enum):
    """Where in a run a loss can stand."""

    ALONE = "alone: the migration ends with it"
    FIRST = "as postcopy begins"
    MIDDLE = "in postcopy, one after the other"
    LAST = "as the migration completes"


class Phase(enum.Enum):
    """The part of a migration's life in which a refault dies."""

    SETUP = "setup"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    POSTCOPY = "postcopy"
    PAUSED = "paused"
    RECOVERY = "recovery"
    LAST = "the end"


class LossClass(enum.Enum):
    """What is lost, and when."""

    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    RESET = "postcopy, reset"
    CLOSE = "postcopy, close"
    KILL = "postcopy, carrier killed"
    ONE_OF_TWO = "postcopy, one connection of two"
    PAUSE_SOURCE = "postcopy, migrate-pause at the source"
    PAUSE_DESTINATION = "postcopy, migrate-pause at the destination"
    PAUSE_CLIENT = "postcopy, a client's migrate-pause"
    HANDSHAKE_COMMAND = "handshake, RECV_BITMAP command"
    HANDSHAKE_BITMAP = "handshake, received bitmap"
    HANDSHAKE_RESUME = "handshake, RESUME"
    HANDSHAKE_ACK = "handshake, RESUME_ACK"
    REFAULT_SOURCE = "postcopy, the source's refault killed"
    REFAULT_DESTINATION = "postcopy, the destination's refault killed"
    REFAULT_BOTH = "postcopy, both refaults killed"
    REFAULT_AGAIN = "recovery from that, a refault killed again"
    KILLED_SETUP = "setup, a refault killed"
    KILLED_PRECOPY = "precopy, a refault killed"
    KILLED_SWITCHOVER = "switchover, a refault killed"
    KILLED_PAUSED = "paused, a refault killed"
    KILLED_RECOVERY = "recovery, a refault killed"
    KILLED_LAST = "the end, a refault killed"
    HUNG_PRECOPY = "precopy, a refault that hangs killed by its watchdog"
    HUNG_SWITCHOVER = "switchover, a refault that hangs killed by its watchdog"
    REFAULT_HUNG = "postcopy, a refault that hangs killed by its watchdog"
    HUNG_PAUSED = "paused, a refault that hangs killed by its watchdog"
    HUNG_RECOVERY = "recovery, a refault that hangs killed by its watchdog"
    HUNG_LAST = "the end, a refault that hangs killed by its watchdog"
    EOF = "after EOF, before SHUT"

    @property
    def place(self) -> Place:
        """Where in a run it can stand."""
        by_phase = None if self.phase is None else _PLACES_BY_PHASE.get(self.phase)
        return by_phase or _PLACES.get(self, Place.MIDDLE)

    @property
    def in_handshake(self) -> bool:
        """Whether it is a loss during the recovery from another one."""
        return self in HANDSHAKE_POINTS or self.leg_ends_in_handshake

    @property
    def leg_ends_in_handshake(self) -> bool:
        """Whether a QEMU sees its leg end during that recovery, for its refault has died."""
        return self is LossClass.REFAULT_AGAIN or self.phase is Phase.RECOVERY

    @property
    def phase(self) -> Phase | None:
        """In which one of two refaults dies; None for all other losses."""
        return ONE_DIES.get(self)

    @property
    def in_switchover(self) -> bool:
        """Whether it is made as postcopy begins."""
        return self.place is Place.FIRST


def classes(*, preempt: bool) -> list[LossClass]:
    """Those that a migration with or without postcopy-preempt can have."""
    return [kind for kind in LossClass if preempt or kind is not LossClass.ONE_OF_TWO]


# The refaults that are killed in postcopy (0: the source's), and started again by a supervisor.
KILLED: dict[LossClass, tuple[int, ...]] = {
    LossClass.REFAULT_SOURCE: (0,),
    LossClass.REFAULT_DESTINATION: (1,),
    LossClass.REFAULT_BOTH: (0, 1),
    LossClass.REFAULT_AGAIN: (0, 1),
}

# Those in which one of the two is killed (kill -9), or stands still and is killed as systemd does it.
HUNG: dict[LossClass, Phase] = {
    LossClass.HUNG_PRECOPY: Phase.PRECOPY,
    LossClass.HUNG_SWITCHOVER: Phase.SWITCHOVER,
    LossClass.REFAULT_HUNG: Phase.POSTCOPY,
    LossClass.HUNG_PAUSED: Phase.PAUSED,
    LossClass.HUNG_RECOVERY: Phase.RECOVERY,
    LossClass.HUNG_LAST: Phase.LAST,
}
ONE_DIES: dict[LossClass, Phase] = {
    LossClass.KILLED_SETUP: Phase.SETUP,
    LossClass.KILLED_PRECOPY: Phase.PRECOPY,
    LossClass.KILLED_SWITCHOVER: Phase.SWITCHOVER,
    LossClass.KILLED_PAUSED: Phase.PAUSED,
    LossClass.KILLED_RECOVERY: Phase.RECOVERY,
    LossClass.KILLED_LAST: Phase.LAST,
    **HUNG,
}

# Seconds before that, counted from where the phase begins (in precopy: the share of the memory).
_AFTER: dict[Phase, tuple[float, float]] = {
    Phase.SETUP: (0.0005, 0.03),
    Phase.PRECOPY: (0.0, 0.6),
    Phase.SWITCHOVER: (0.0, 0.03),
    Phase.POSTCOPY: (0.1, 0.6),
    Phase.PAUSED: (0.1, 0.6),
    Phase.RECOVERY: (0.0, 0.08),
    Phase.LAST: (0.0, 0.3),
}

_PLACES = {
    LossClass.PRECOPY: Place.ALONE,
    LossClass.SWITCHOVER: Place.FIRST,
    LossClass.EOF: Place.LAST,
}
_PLACES_BY_PHASE = {
    Phase.SETUP: Place.ALONE,
    Phase.PRECOPY: Place.ALONE,
    Phase.SWITCHOVER: Place.FIRST,
    Phase.LAST: Place.LAST,
}

# Way (forward?), pattern, and how many bytes after its first match: half a message, a whole one, some more.
HANDSHAKE_POINTS: dict[LossClass, tuple[bool, bytes, range]] = {
    LossClass.HANDSHAKE_COMMAND: (True, RECV_BITMAP_COMMAND, range(-1, 60)),
    LossClass.HANDSHAKE_BITMAP: (False, RECEIVED_BITMAP, range(-1, 300)),
    LossClass.HANDSHAKE_RESUME: (True, RESUME, range(-2, 1)),
    LossClass.HANDSHAKE_ACK: (False, RESUME_ACK, range(-4, 1)),
}


@dataclass(frozen=True)
class Planned:
    """One loss to be made: its class, and what was drawn for it."""

    kind: LossClass
    how: Loss
    cut: Cut | None = None
    side: Side = "source"
    after: float = 0.0
    """Seconds (in precopy: the share of the memory) that pass before it."""
    down: float = 0.0
    """Seconds until the supervisor starts a killed refault again."""
    again: float = 0.0
    """Seconds until that of ``side`` is killed once more."""
    hangs: float = 0.0
    """Seconds for which a refault has stood still when it is killed."""
    pauses: Side = "source"
    """Where a client has paused the migration in which a refault is killed."""

    def __str__(self) -> str:
        detail = self.how.value
        if self.kind in KILLED:
            detail = f"again after {self.again:.2f} s" if self.again else f"down for {self.down:.2f} s"
        if self.kind.phase is not None:
            detail = f"after {self.hangs:.2f} s" if self.hangs else f"down for {self.down:.2f} s"
        if self.kind.phase is Phase.PAUSED:
            detail += f", paused at the {self.pauses}"
        if self.cut is not None:
            way = "forward stream" if self.cut.forward else "return path"
            detail += f", {way}, {self.cut.extra} bytes after the match"
        return f"{self.kind.value} ({detail}, {self.side}, {self.after:.2f})"


def plan(kind: LossClass, draw: random.Random) -> Planned:
    """Draws the details of a loss."""
    how: Broken = draw.choice((Loss.RESET, Loss.CLOSE))
    side = draw.choice(SIDES)
    after = draw.uniform(0.1, 0.6)
    match kind:
        case LossClass.PRECOPY:
            return Planned(kind, draw.choice(list(Loss)), None, side, draw.uniform(0.0, 0.6))
        case LossClass.SWITCHOVER:
            return Planned(kind, how, _in_switchover(how, draw), side, after)
        case LossClass.RESET:
            return Planned(kind, Loss.RESET, None, side, after)
        case LossClass.CLOSE:
            return Planned(kind, Loss.CLOSE, None, side, after)
        case LossClass.ONE_OF_TWO:
            # Whichever is the next to carry a byte that way; only the main one has any on the return path.
            return Planned(kind, how, Cut(how, draw.random() < 0.7, b".", 0, "now"), side, after)
        case LossClass.KILL:
            return Planned(kind, Loss.KILL, None, side, after)
        case LossClass.EOF:
            # What is kept back is lost for good, for the source has sent it and cannot pause any more.
            kept_back = draw.choice((0, 0, -1, -20_000))
            return Planned(kind, how, Cut(how, True, EOF, kept_back, "now"), side, after)
        case LossClass.REFAULT_AGAIN:
            return Planned(kind, how, None, side, after, again=draw.uniform(0.2, 0.7))
        case kind if kind.phase is not None:
            after = draw.choice((_AFTER[kind.phase][0], draw.uniform(*_AFTER[kind.phase])))
            if kind in HUNG:
                return Planned(kind, how, None, side, after, hangs=draw.uniform(0.1, 2.0), pauses=side)
            where, down = _where_killed(kind.phase, how, draw), _down(draw)
            return Planned(kind, how, where, side, after, down, pauses=draw.choice(SIDES))
        case kind if kind in KILLED:
            return Planned(kind, how, None, side, after, _down(draw))
        case kind if kind in HANDSHAKE_POINTS:
            forward, pattern, places = HANDSHAKE_POINTS[kind]
            extra = draw.choice((0, draw.choice(places)))
            return Planned(kind, how, Cut(how, forward, pattern, extra), side, after)
        case _:
            return Planned(kind, how, None, side, after)


def _down(draw: random.Random) -> float:
    return draw.choice((0.0, draw.uniform(0.0, 1.0)))


def _where_killed(phase: Phase, how: Broken, draw: random.Random) -> Cut | None:
    """The place at which the channel stands still until one is killed, where the phase is a short one."""
    if phase is Phase.SWITCHOVER:
        return _in_switchover(how, draw)
    return Cut(how, True, EOF, 0, "now") if phase is Phase.LAST else None


def _in_switchover(how: Broken, draw: random.Random) -> Cut:
    """Right before the package, inside it, around its end, or when the destination is about to run.

    With the campaign's disks the package has about 200 KiB.
    """
    if draw.random() < 0.4:
        return Cut(how, False, PONG_3, 0, "now")
    if draw.random() < 0.2:
        return Cut(how, True, PING_2, 0, "now")
    bytes_later = draw.choice((0, *(draw.randrange(limit) for limit in (200_000, 200_000, 210_000, 700_000))))
    return Cut(how, True, PACKAGED, bytes_later, "now")
