"""The control socket: whoever connects and may is sent the status, one JSON document, and disconnected.

The socket has mode 0600, and besides the peer's credentials decide: root and the daemon's user are answered.
Where its address has users or groups these are answered too; where it has but a mode, an owner or a group of
the socket file, whoever that lets in.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import trio

from refault.daemon.host.descriptors import Spare
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.paths import make_if_default
from refault.daemon.host.repeats import repeats
from refault.daemon.host.turns import Turns
from refault.daemon.kernel.inotify import until_gone
from refault.daemon.kernel.polled import hung_up
from refault.daemon.monitor.accept import accepted
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.caller import caller_of, may_speak
from refault.daemon.monitor.listener import ListenError, bind_unix
from refault.daemon.telling import snapshot as status_document
from refault.daemon.telling.snapshot import Snapshot, Status

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
"""How long a peer may take to read the document."""
_WHOSE = "status"
"""Turns of the loop."""
_SLICE = 16
"""VMs that are written into it in one go."""


async def serve_control(
    address: Address,
    snapshot: Snapshot,
    slices: Callable[[], Iterable[object]] = tuple,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers on the socket file at `address` until cancelled, then removes it; started when it listens.

    `snapshot` is called when `slices` has been gone through, in which the work is done a part at a time.

    A socket file that nobody listens on is replaced. Raises `OperatorError` where the path cannot be bound,
    or its file has been removed.
    """
    path = Path(address.path or "")
    make_if_default(path.parent)
    try:
        bound = bind_unix(address)
    except ListenError as error:
        raise OperatorError(f"{error} (--control)") from error

    documents, spare = _Documents(snapshot, slices), Spare()

    async def answer(stream: trio.SocketStream) -> None:
        await _answer(stream, address, documents)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_take, bound.sock, answer, spare)
            task_status.started()
            await until_gone(str(path), lambda: bound.in_place)
            raise OperatorError(f"{path} was removed or replaced; leave it, `refault status` asks there")
    finally:
        bound.close()
        spare.close()


async def _take(
    listening: socket.socket, answer: Callable[[trio.SocketStream], Awaitable[None]], spare: Spare
) -> None:
    """Has all answered who connect and wait; one by one where there are no descriptors but its own."""
    turns = Turns(_WHOSE)
    async with trio.open_nursery() as nursery:
        while True:
            sock = await accepted(listening, _tell_not_accepted, spare=spare)
            try:
                await turns.come()
            except BaseException:
                sock.close()
                raise
            if hung_up(sock):
                sock.close()
            else:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
                if not spare.lent:
                    nursery.start_soon(answer, stream)
                    continue
                await answer(stream)
            spare.take_back()


def _tell_not_accepted(error: OSError) -> None:
    told = "control: cannot accept a connection: %s"
    _log.error(told, error.strerror, extra=repeats(("control", "accept"), error.errno))


def _may_ask(sock: trio.socket.SocketType, uid: int | None, address: Address) -> bool:
    if uid in (0, os.getuid()):
        return True
    if address.callers:
        return may_speak(sock, address.callers)
    return (address.mode, address.owner, address.group) != (None, None, None)


class _Documents:
    """The status, made once for all who have asked by then: a picture of many VMs takes the event loop its
    time, of which who asks without end has a share."""

    def __init__(self, snapshot: Snapshot, slices: Callable[[], Iterable[object]]) -> None:
        self._turns = Turns(_WHOSE)
        self._snapshot = snapshot
        self._slices = slices
        self._making = trio.Lock()
        self._begun = 0
        """How many."""
        self._last = 0, b""
        """Which of them it is."""

    async def get(self) -> bytes:
        """One that is begun after this is called."""
        before = self._begun
        async with self._making:
            if self._last[0] <= before:
                await self._turns.ready()  # who asks meanwhile is told the same
                number = self._begun = self._begun + 1
                turn = self._turns.begin()
                for _ in self._slices():
                    turn = await self._turns.go_on(turn)
                status = self._snapshot()
                vms = []
                for at, vm in enumerate(status.vms, 1):
                    vms.append(status_document.part(vm))
                    if at % _SLICE == 0:
                        turn = await self._turns.go_on(turn)
                self._last = number, status_document.encode(status_document.of_parts(status, vms))
                await self._turns.go_on(turn)
            return self._last[1]


async def _answer(stream: trio.SocketStream, address: Address, documents: _Documents) -> None:
    async with stream:
        peer = caller_of(stream.socket)
        if not _may_ask(stream.socket, peer.uid, address):
            _log.warning(
                "control: refused a process (%s): its user is not root, nor ours, nor allowed",
                peer,
                extra=repeats(("control", peer.uid), "refused"),
            )
            return
        document = await documents.get()  # on a busy host it takes as long as it takes, and is then for all
        with trio.move_on_after(_ANSWER_SECONDS):
            try:
                await stream.send_all(document)
            except trio.BrokenResourceError:
                _log.debug("control: process %s went away before it had read the status", peer.pid)


class NoDaemon(OperatorError):  # noqa: N818 - it says what is
    """Nobody listens."""


class NotPermitted(OperatorError):  # noqa: N818
    """The daemon, or the directory of its socket, is not for this user."""


class NoAnswer(OperatorError):  # noqa: N818
    """There is a daemon, which does not answer."""


def query(path: Path, timeout: float) -> Status:
    """The status that the daemon behind `path` tells, within `timeout` seconds.

    Raises NoDaemon, NotPermitted, NoAnswer, and OperatorError where something else answers.
    """
    until = time.monotonic() + timeout
    document = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            while chunk := connection.recv(65536):
                document += chunk
                connection.settimeout(max(until - time.monotonic(), 0.001))
    except (TimeoutError, BlockingIOError) as error:  # a stopped one, or one whose queue is full
        raise NoAnswer(
            f"the daemon at {path} gave no answer in {timeout:g} s: it is stopped, or hangs; look at its"
            " process and its log"
        ) from error
    except PermissionError as error:
        raise NotPermitted(f"{path}: {error.strerror}; be root or the daemon's user") from error
    except ConnectionResetError as error:
        raise NoAnswer(f"the daemon at {path} went away before it had answered; ask again") from error
    except OSError as error:
        raise NoDaemon(f"no daemon answers at {path}: {_why_not(path, error)}") from error
    if not document:
        raise NotPermitted(f"the daemon at {path} told nothing; be root, the daemon's user, or one it allows")
    try:
        return status_document.decode(bytes(document))
    except status_document.DecodeError as error:
        raise OperatorError(f"{path} told no status ({error}); is it a refault's?") from error


def _why_not(path: Path, error: OSError) -> str:
    if os.path.exists(path) and not path.is_socket():
        return "it is no socket; name a daemon's with --control"
    return f"{error.strerror or error}; is `refault run` running?"
