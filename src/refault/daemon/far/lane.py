"""One end of a lane: what has been said and heard, what the local side is told of it, and who is woken."""

from __future__ import annotations

from typing import Protocol

import trio

from refault.daemon.far.bell import Bell
from refault.session.course import Action, Course, Event, Role, State
from refault.session.memory import FIRST, Memory
from refault.session.stream import Stream


class Local(Protocol):
    """Who is relayed, as its lane sees it."""

    def wake(self) -> None:
        """There may be bytes to take, or room for what is to be said."""

    def close(self) -> None:
        """All is said and taken: end the connection in order."""

    def reset(self) -> None:
        """Give what is taken at once, and break the connection."""

    def say_no_more(self) -> None:
        """Nobody takes what this side says any more."""


class LaneEnd:
    """A stream with its course. `name` is what the log calls it."""

    def __init__(self, role: Role, name: str, memory: Memory) -> None:
        """Takes the memory for its rings. Raises MemoryError where there is none."""
        if not memory.begin():
            raise MemoryError
        self.name = name
        try:
            self.stream = Stream(FIRST, FIRST)
        except MemoryError:
            memory.end(2 * FIRST)
            raise
        self.local: Local | None = None
        self.to_far = Bell()
        self.first_heard = trio.Event()
        """A frame has come: the other end is there, and means this lane."""
        self.over = trio.Event()
        self._course = Course(role)
        self._memory = memory
        self.done_at = 0
        """Where the peer's stream ended, when both streams were over in order; else 0."""
        self._widened_at = 0
        self._stopped = False

    @property
    def is_done(self) -> bool:
        """Both streams were over in order."""
        return self.done_at > 0

    def position(self) -> tuple[int, int]:
        """How far both streams have come."""
        facts = self.stream.facts()
        return facts.here.received, facts.acknowledged

    def attach(self, local: Local) -> None:
        """There is a local side, which is told what has happened before it was there."""
        self.local = local
        if self._stopped:
            local.say_no_more()
        if self._course.state is not State.OPEN:
            local.reset()

    def heard(self) -> None:
        """Frames have come, and the stream has taken them."""
        self.first_heard.set()
        self._widen()
        self._look()
        if self.local is not None:
            self.local.wake()
        self.to_far.ring()

    def said(self) -> None:
        """The local side has said or taken something."""
        self._look()
        self.to_far.ring()

    def tell(self, event: Event) -> None:
        """What the stream does not know has happened."""
        actions = self._course.take(event)
        if event is Event.DONE and actions:
            self.done_at = self.stream.facts().here.written
        self._do(actions)

    def grow(self) -> bool:
        """Makes room for what the local side says, where the peer has room for it; False where there is none
        to be had now."""
        facts = self.stream.facts()
        size = facts.out_size
        if facts.limit - facts.acknowledged <= size or not self._memory.double(size):
            return False
        if self.stream.grow(2 * size):
            return True
        self._memory.end(size)
        return False

    def release(self) -> None:
        """Gives the memory back: nobody uses the stream any more."""
        facts = self.stream.facts()
        self._memory.end(facts.out_size + facts.in_size)
        self.stream.free()

    def _widen(self) -> None:
        """Where the peer has been kept from speaking by our limit alone, and the local side takes what comes.

        Once for each promise, however often the peer asks on the way."""
        facts = self.stream.facts()
        here, size = facts.here, facts.in_size
        if here.received < facts.wanted:  # who has filled its room has sent that before it asks for more
            return
        if not facts.wanted or facts.wanted < self._widened_at or here.received - here.written > size // 2:
            return
        if self._memory.double(size):
            if self.stream.widen(2 * size):
                self._widened_at = here.written + 2 * size
            else:
                self._memory.end(size)

    def _look(self) -> None:
        facts = self.stream.facts()
        if facts.stopped_there and not self._stopped:
            self._stopped = True
            if self.local is not None:
                self.local.say_no_more()
        if facts.reset_there:
            self.tell(Event.BROKE_THERE)
        if facts.delivered and facts.taken:
            self.tell(Event.DONE)
        if facts.end_there:
            self.tell(Event.TOLD_END)

    def _do(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if action is Action.SEND_RESET:
                self.stream.reset()
            elif action is Action.SEND_END:
                self.stream.end()
            elif self.local is not None:
                if action is Action.CLOSE_LOCAL:
                    self.local.close()
                else:
                    self.local.reset()
        if self._course.state is State.OVER:
            self.over.set()
        if actions:
            self.to_far.ring()
