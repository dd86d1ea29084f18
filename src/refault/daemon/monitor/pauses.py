"""A pause that refault recovers, kept from the clients that asked for that: when it is told all the same.
`refault.qmp.hiding` has the rules."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

import trio

from refault.daemon.kept.recorder import Recorder
from refault.qmp.hiding import State, Word
from refault.qmp.journal import Kind
from refault.qmp.multiplexer import Multiplexer
from refault.qmp.replay import Said

log = logging.getLogger("refault.qmp")


class Pauses:
    """Of one monitor. `flush` sends what the core has to say; it calls `look` first. `start_soon` starts a
    task that ends with the monitor's run."""

    def __init__(
        self,
        name: str,
        core: Multiplexer,
        recorder: Recorder,
        flush: Callable[[], None],
        start_soon: Callable[..., object],
    ) -> None:
        self._name = name
        self._core = core
        self._recorder = recorder
        self._flush = flush
        self._start_soon = start_soon
        self._words: deque[tuple[Word, float, str]] = deque()
        """What is to be said, once all is taken that QEMU has said."""
        self._timers: dict[float, trio.CancelScope] = {}
        """By how long a pause is to be hidden."""

    @property
    def since(self) -> float | None:
        """Since when a pause is kept from clients, in Unix time; None where none is."""
        began = self._core.hiding.began
        if began is None or not self._lengths():
            return None
        return time.time() - max(0.0, time.monotonic() - began)

    def may(self, may: bool, why: str) -> None:
        """Whether refault would recover a pause; where not, one that is hidden is told, and `why` logged."""
        words = [word for word, _, _ in self._words if word in (Word.MAY, Word.MAY_NOT)]
        last = words[-1] is Word.MAY if words else self._core.hiding.may
        if may is not last:
            self._say(Word.MAY if may else Word.MAY_NOT, 0.0, why)

    def tell(self, why: str) -> None:
        """One that is hidden is told."""
        self._say(Word.TELL, 0.0, why)

    def _say(self, word: Word, value: float, why: str) -> None:
        self._words.append((word, value, why))
        if not self._core.taking:  # else the journal would have it in the midst of what it has not
            self._flush()

    def look(self) -> None:
        """Says what is to be said, and has time run for a pause that is hidden."""
        words, hiding = self._words, self._core.hiding
        while words:
            word, value, why = words.popleft()
            if self._put(word, value):
                log.warning("%s: clients are told of the pause: %s", self._name, why)
        if hiding.began is None and self._timers:
            for scope in self._timers.values():
                scope.cancel()
            self._timers.clear()
        if hiding.hidden and (lengths := self._lengths()):
            if hiding.began is None:
                self._put(Word.BEGAN, time.monotonic())
                if (
                    hiding.state is State.HIDDEN or not hiding.events
                ):  # else an event is to come, if it is one
                    self._core.counters.pause_hidden()
            for seconds in lengths - self._timers.keys():
                scope = self._timers[seconds] = trio.CancelScope()
                self._start_soon(self._time, seconds, scope)

    def _put(self, word: Word, value: float) -> int:
        self._recorder.tell(Kind.HIDING, Said(word, value))
        return self._core.hide(word, value)

    def _lengths(self) -> set[float]:
        """For how long it is hidden from clients, of which each has its own length of time."""
        hiding = self._core.hiding
        rules = (client.rule for client in self._core.clients.values())
        return {rule.hide_pause for rule in rules if rule.hide_pause and hiding.hides_from(rule.hide_pause)}

    async def _time(self, seconds: float, scope: trio.CancelScope) -> None:
        with scope:
            ago = time.monotonic() - (self._core.hiding.began or 0.0)
            await trio.sleep(seconds - min(max(ago, 0.0), seconds))
            self._say(Word.OVER, seconds, f"it has been kept from them for {seconds:g} s (hide-pause)")
