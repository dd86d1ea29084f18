"""The control socket: whoever connects and may is sent the status, one JSON document, and disconnected.

The socket has mode 0600, and besides the peer's credentials decide: root and the daemon's user are answered.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import trio

from refault.daemon import snapshot as status_document
from refault.daemon.address import Address
from refault.daemon.dial import peer_of
from refault.daemon.errors import OperatorError
from refault.daemon.listener import ListenError, bind_unix
from refault.daemon.snapshot import Snapshot, Status

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
"""How long a peer may take to read the document."""


async def serve_control(
    path: Path,
    snapshot: Snapshot,
    *,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers on the unix socket `path` until cancelled, then removes it; started when it listens.

    A socket file that nobody listens on is replaced. Raises `OperatorError` where the path cannot be bound.
    """
    try:
        bound = bind_unix(Address(str(path)))
    except ListenError as error:
        raise OperatorError(f"{error} (--control)") from error

    async def answer(stream: trio.SocketStream) -> None:
        await _answer(stream, snapshot)

    try:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound.sock))
        await trio.serve_listeners(answer, [listener], task_status=task_status)
    finally:
        bound.close()


async def _answer(stream: trio.SocketStream, snapshot: Snapshot) -> None:
    async with stream:
        peer = peer_of(stream.socket)
        if peer.uid not in (0, os.getuid()):
            _log.warning("control: refused process %s of user %s: not root's, nor ours", peer.pid, peer.uid)
            return
        with trio.move_on_after(_ANSWER_SECONDS):
            try:
                await stream.send_all(status_document.encode(snapshot()))
            except trio.BrokenResourceError:
                _log.debug("control: process %s went away before it had read the status", peer.pid)


def query(path: Path, timeout: float) -> Status:
    """The status that the daemon behind `path` tells; each read takes at most `timeout` seconds.

    Raises `OperatorError` where none answers, or something else does.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            document = bytearray()
            while chunk := connection.recv(65536):
                document += chunk
    except TimeoutError as error:
        raise OperatorError(f"{path} gave no answer in {timeout:g} s; look at the daemon's log") from error
    except OSError as error:
        raise OperatorError(
            f"no daemon answers at {path}: {error.strerror or error}; is `refault run` running?"
        ) from error
    if not document:
        raise OperatorError(f"{path} told nothing; be root or the daemon's user")
    try:
        return status_document.decode(bytes(document))
    except status_document.DecodeError as error:
        raise OperatorError(f"{path} told no status ({error}); is it a refault's?") from error
