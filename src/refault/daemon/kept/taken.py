"""Takes over what a killed refault has left of a monitor's connections, or ends it where that cannot be."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from refault.daemon.host.errors import OperatorError
from refault.daemon.kept.journal import left
from refault.daemon.kept.left import About, Left, Listening, OtherVersionError, decode
from refault.daemon.kept.lot import Lot
from refault.daemon.kept.sockets import ONE_FD, Held, cookie_of, end_for_all, held, passed_descriptor
from refault.daemon.kernel.process import process_started
from refault.qmp.journal import TornError, before, read
from refault.qmp.multiplexer import Multiplexer
from refault.qmp.replay import Replay

log = logging.getLogger("refault.qmp")

SUFFIX = ".clients"
"""Of a journal's name, behind the VM's."""


@dataclass(frozen=True)
class Taken:
    """Of one monitor: the connection to QEMU, those of its clients by their numbers, and the sockets where
    clients come, by the addresses as they were asked for."""

    left: Left
    upstream: socket.socket
    clients: dict[int, tuple[socket.socket, About]]
    fronts: dict[str, tuple[Listening, tuple[socket.socket, ...]]]
    peeked: dict[int, tuple[int, int]]
    """Descriptors that are in a client's socket yet: its number, and with how many bytes."""
    spent: list[int]
    """Those of them that QEMU has got."""
    lots: list[Lot]
    of_nobody: int
    """How many are kept that are of clients that have left, or of listeners that are wanted no more."""


def take(name: str, path: Path, core: Multiplexer, wanted: Collection[str]) -> Taken | None:
    """Makes `core`, a new one, what that of the last refault was; None where it has left nothing, or nothing
    that can be gone on with: then what it had has been ended, and `core` is of no use if it has a greeting.
    `wanted`: addresses to listen at."""
    try:
        data = left(path)
        if data is None:
            return None
        journal = read(data)
        was = decode(journal.before, records=bool(journal.records))
        if process_started(was.pid) != was.started:
            path.unlink()
            return None
        with held(was.pid, was.started) as holder:
            replay = Replay(core)
            replay.peeked.update({number: each.peeked for number, each in was.clients.items() if each.peeked})
            replay.run(was.core, journal.records)
            with contextlib.ExitStack() as undo:
                found = _found(name, was, holder, core, replay, wanted, undo)
                undo.pop_all()
                return found
    except (OSError, TornError, OtherVersionError, msgspec.MsgspecError) as error:
        why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    except Exception:  # whatever it is, this VM is to be served
        log.exception("%s: internal error in what the last refault has left", name)
        why = "internal error"
    log.warning("%s: cannot go on where the last refault ended: %s; its clients are disconnected", name, why)
    try:
        free(path)
    except OperatorError as error:
        log.warning("%s: %s; if it still runs: refault release %s", name, error, name)
    return None


def free(path: Path) -> None:
    """Ends what QEMU holds by a journal, which stays where that is nothing: QEMU may yet come to read what it
    was told to hold. Raises OperatorError."""
    was = _read(path)
    try:
        if _end_held(was) > 0 or process_started(was.pid) != was.started:
            path.unlink()
    except OSError as error:
        raise _not_freed(was, error) from error


def _found(
    name: str,
    was: Left,
    holder: Held,
    core: Multiplexer,
    replay: Replay,
    wanted: Collection[str],
    undo: contextlib.ExitStack,
) -> Taken:
    """Raises TornError where QEMU does not hold its monitor's connection, or what others are kept in; `undo`
    closes what was taken out of it."""
    upstream = holder.take(was.upstream)
    if upstream is None:
        raise TornError("QEMU does not hold the connection of its monitor")
    undo.enter_context(upstream)
    lots, kept = _kept(was, holder)
    for lot in lots:
        undo.callback(lot.close)
    for sock in kept.values():
        undo.enter_context(sock)
    about = {**was.clients, **{n: msgspec.msgpack.decode(raw, type=About) for n, raw in replay.about.items()}}
    clients: dict[int, tuple[socket.socket, About]] = {}
    for number, known in about.items():
        if number in core.clients and known.cookie in kept:
            clients[number] = kept.pop(known.cookie), known
    spent: dict[int, int] = {}
    peeked: dict[int, tuple[int, int]] = {}
    for number, count in replay.peeked.items():
        if number in clients and (fd := _peek(clients[number][0], count)) >= 0:
            peeked[fd] = number, count
            spent[number] = fd
    replay.finish(lambda number: spent.pop(number, -1))
    gone = [client for client in core.clients.values() if client.number not in clients]
    for client in gone:
        core.leave(client)
    fronts: dict[str, tuple[Listening, tuple[socket.socket, ...]]] = {}
    for listening in was.fronts:
        if listening.key in wanted and all(cookie in kept for cookie in listening.cookies):
            fronts[listening.key] = listening, tuple(kept.pop(cookie) for cookie in listening.cookies)
    of_nobody = len(kept)
    for sock in kept.values():
        with sock:
            end_for_all(sock)
    log.info(
        "%s: going on where the last refault ended: %d clients, %d commands with QEMU%s%s",
        name,
        len(clients),
        len(core.window.pending),
        f"; {len(gone)} clients are gone, which QEMU did not hold" if gone else "",
        f"; {replay.lost_descriptors} descriptors that clients had passed are lost"
        if replay.lost_descriptors
        else "",
    )
    return Taken(was, upstream, clients, fronts, peeked, list(spent.values()), lots, of_nobody)


def _peek(sock: socket.socket, count: int) -> int:
    """A duplicate of the descriptor that comes with the first bytes, or -1."""
    with contextlib.suppress(OSError):
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        _, ancillary, _, _ = sock.recvmsg(count, ONE_FD, flags)
        return passed_descriptor(ancillary)
    return -1


def why_anothers(path: Path, qemu: str) -> str | None:
    """Why a journal is not for the monitor at the address `qemu`: it is of a QEMU at another one, which still
    runs and holds its clients' connections. None where it is, or is of nobody."""
    try:
        was = _read(path)
    except OperatorError:
        return None
    if was.qemu == qemu or process_started(was.pid) != was.started:
        return None
    return (
        f"{path} is of QEMU process {was.pid} at {was.qemu}, which still runs, and whose clients wait for a"
        " refault: the end of this one will disconnect clients. Give this VM another --name or --state-dir,"
        f" or stop this refault and free that QEMU: refault release {was.pid}"
    )


def holder_of(path: Path) -> int | None:
    """The QEMU process that holds what a journal tells of; None where that cannot be read."""
    try:
        return _read(path).pid
    except OperatorError:
        return None


def release(path: Path) -> tuple[int, int]:
    """Ends all that QEMU holds by a journal, and removes that; the process, and how many there were. Raises
    OperatorError. Nobody else may use the journal meanwhile."""
    was = _read(path)
    try:
        ended = _end_held(was)
        path.unlink()
    except OSError as error:
        raise _not_freed(was, error) from error
    return was.pid, ended


def _not_freed(was: Left, error: OSError) -> OperatorError:
    return OperatorError(f"cannot free QEMU, process {was.pid}: {error.strerror or error}")


def _end_held(was: Left) -> int:
    """Raises OSError."""
    if process_started(was.pid) != was.started:
        return 0
    with held(was.pid, was.started) as holder:
        return _end_all(was, holder)


def _read(path: Path) -> Left:
    try:
        data = left(path)
        if data is None:
            raise OperatorError(f"{path} is not there any more")
        was = decode(before(data), records=False)
    except (OSError, TornError, OtherVersionError, msgspec.MsgspecError) as error:
        raise OperatorError(f"{path} cannot be read: {error}") from error
    return was


def _end_all(was: Left, holder: Held) -> int:
    """Raises OSError."""
    kept: dict[bytes | None, socket.socket] = {}
    with contextlib.suppress(TornError):
        lots, kept = _kept(was, holder)
        for sock in kept.values():
            with sock:
                end_for_all(sock)
        for lot in lots:
            lot.empty()
            lot.close()
    upstream = holder.take(was.upstream)
    if upstream is None:
        return 0
    with upstream:
        end_for_all(upstream)
    return 1 + len(kept)


def _kept(was: Left, holder: Held) -> tuple[list[Lot], dict[bytes | None, socket.socket]]:
    """Where connections are kept, and each of them by its cookie. Raises TornError where they are not."""
    ends = [holder.take(identity) for identity in was.lots]
    there = [end for end in ends if end is not None]
    if len(there) < len(ends) or len(ends) % 2:
        for end in there:
            end.close()
        raise TornError("QEMU does not hold what connections are kept in")
    lots = [Lot(there[at : at + 2]) for at in range(0, len(there), 2)]
    kept: dict[bytes | None, socket.socket] = {}
    for lot in lots:
        for sock in lot.look():
            sock.setblocking(False)
            if kept.setdefault(cookie_of(sock), sock) is not sock:
                sock.close()
    return lots, kept
