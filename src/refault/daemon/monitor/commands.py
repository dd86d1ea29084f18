"""Commands that are refault's concern: its own, and those of clients about which it is asked (monitor.py)."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec
import trio

from refault.daemon.kept.recorder import Recorder
from refault.qmp.commands import Answer, Forward
from refault.qmp.decoding import decode_members
from refault.qmp.journal import Kind
from refault.qmp.multiplexer import Multiplexer
from refault.qmp.replay import Called, Verdict
from refault.qmp.session import Request
from refault.qmp.splitter import ERROR, VERB_MASK, Message

log = logging.getLogger("refault.qmp")


class QmpError(Exception):
    """QEMU answered an own command with an error."""

    def __init__(self, class_: str, desc: str) -> None:
        super().__init__(f"{class_}: {desc}")
        self.class_ = class_
        self.desc = desc


class MonitorLost(Exception):  # noqa: N818 - it is no error of the caller's
    """There is no monitor, or it went away while an own command waited."""


def words(error: BaseException) -> str:
    """What `execute` or a connection failed with, as the operator reads it."""
    if isinstance(error, trio.TooSlowError):
        return "QEMU did not answer in time"
    if isinstance(error, MonitorLost):
        return "the monitor was lost"
    return str(error)


@dataclass(frozen=True)
class WatchedCommand:
    """A client's command that a handler is asked about. `raw_arguments`: None if the client sent none."""

    name: str
    oob: bool
    arguments: Mapping[str, object]
    raw_arguments: bytes | None
    client: int


Handler = Callable[[WatchedCommand], Awaitable[Forward | Answer]]


class Commands:
    """Of one core. `flush` sends what the core has to say."""

    def __init__(
        self,
        name: str,
        core: Multiplexer,
        recorder: Recorder,
        watch: Mapping[str, Handler],
        flush: Callable[[], None],
    ) -> None:
        self._name = name
        self._core = core
        self._recorder = recorder
        self._watch = watch
        self._flush = flush

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        *,
        oob: bool,
        fd: int | None,
        timeout: float,  # noqa: ASYNC109 - the reply of a command given up is to be dropped
    ) -> object:
        """As `Monitor.execute`."""
        core = self._core
        if not core.ready or (oob and not (core.greeting and core.greeting.oob)):
            raise MonitorLost(f"{self._name}: no QEMU to send {command} to")
        event = trio.Event()
        replies: list[Message | None] = []

        def done(reply: Message | None) -> None:
            replies.append(reply)
            event.set()

        members = dict(arguments) if arguments is not None else None
        self._recorder.tell(Kind.CALLED, Called(command, members, oob, fd is not None, False))
        request = core.call(command, arguments, oob=oob, fd=-1 if fd is None else os.dup(fd), done=done)
        self._flush()
        try:
            with trio.fail_after(timeout):
                await event.wait()
        except BaseException:
            self._recorder.tell(Kind.FORGOTTEN, request.call)
            core.forget(request)
            raise
        [reply] = replies
        if reply is None:
            raise MonitorLost(f"{self._name}: QEMU went away while {command} waited")
        members = decode_members(reply)
        if reply.shape & VERB_MASK == ERROR:
            error = msgspec.convert(members["error"], dict[str, str])
            raise QmpError(error["class"], error["desc"])
        return members["return"]

    async def handle(self, request: Request) -> None:
        """Asks the handler of a client's command, and has done what it says."""
        name = request.name.decode()
        verdict: Forward | Answer = Forward()
        try:
            command = WatchedCommand(
                name, request.oob, request.arguments(), request.raw_arguments(), request.client.number
            )
            verdict = await self._watch[name](command)
        except MonitorLost:
            pass
        except Exception:
            log.exception("%s: internal error on %s; it goes to QEMU as the client sent it", self._name, name)
        if isinstance(verdict, Forward) and verdict.on_reply is not None:
            verdict = Forward(verdict.arguments, self._guard(name, verdict.on_reply))
        self._recorder.tell(Kind.ANSWERED, _as_told(request, verdict))
        self._core.answer(request, verdict)
        self._flush()

    def _guard(self, name: str, on_reply: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def guarded(reply: bytes) -> bytes:
            try:
                changed = on_reply(reply)
            except Exception:
                log.exception(
                    "%s: internal error on the reply to %s; it goes on as it came", self._name, name
                )
                changed = reply
            self._recorder.note(Kind.CHANGED, 0, changed)
            return changed

        return guarded


def _as_told(request: Request, verdict: Forward | Answer) -> Verdict:
    if isinstance(verdict, Answer):
        return Verdict(request.asked, True, verdict.error, verdict.value)
    arguments = None if verdict.arguments is None else dict(verdict.arguments)
    return Verdict(request.asked, False, None, None, arguments, verdict.on_reply is not None)
