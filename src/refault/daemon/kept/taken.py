"""Takes over what a killed refault has left of a monitor's connections, or ends it where that cannot be."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from refault.daemon.host.errors import OperatorError
from refault.daemon.host.fd_store import FdStore
from refault.daemon.host.handed import claim_stored, spare_stored, stored, unclaimed
from refault.daemon.kept.journal import forget_unfinished, left, remove
from refault.daemon.kept.left import About, Left, Listening, OtherVersionError, decode
from refault.daemon.kept.lot import Lot
from refault.daemon.kept.sockets import (
    ONE_FD,
    Held,
    Stored,
    cookie_of,
    end_for_all,
    held,
    passed_descriptor,
)
from refault.daemon.kernel.polled import hung_up
from refault.daemon.kernel.process import start_of
from refault.daemon.kernel.unix_diag import exists
from refault.qmp.journal import Record, TornError, before, read
from refault.qmp.multiplexer import Multiplexer
from refault.qmp.replay import Replay

log = logging.getLogger("refault.qmp")

_NAMED = 10
"""Commands, in one line of the log."""

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
    came: list[tuple[socket.socket, str]]
    """Clients that were accepted and not served yet, and where they came, as that was asked for."""
    of_nobody: int
    """How many are kept that are of clients that have left, or of listeners that are wanted no more."""


def take(name: str, path: Path, core: Multiplexer, wanted: Collection[str]) -> Taken | None:
    """Makes `core`, a new one, what that of the last refault was; None where it has left nothing, or nothing
    that can be gone on with: then what it had has been ended, and `core` is of no use if it has a greeting.
    `wanted`: addresses to listen at. Raises OperatorError where QEMU holds it all and nobody may look."""
    forget_unfinished(path)
    try:
        data = left(path)
        if data is None:
            return None
        was, records = read_whole(data)
        if _has_ended(was):
            remove(path)
            return None
        if (told := _out_of_reach(was)) is not None:
            raise OperatorError(f"{told}, or free that QEMU as root: refault release {name}")
        with _holder(was) as holder:
            replay = replayed(was, records, core)
            with contextlib.ExitStack() as undo:
                found = _found(name, was, holder, core, replay, wanted, undo)
                undo.pop_all()
                return found
    except OperatorError:
        raise
    except (OSError, TornError, OtherVersionError, msgspec.MsgspecError) as error:
        why = _why(error)
    except Exception:  # whatever it is, this VM is to be served
        log.exception("%s: internal error in what the last refault has left", name)
        why = "internal error"
    core.leave_undecided(1)
    log.warning("%s: cannot go on where the last refault ended: %s; its clients are disconnected", name, why)
    try:
        free(path)
    except OperatorError as error:
        log.warning("%s: %s; if it still runs: refault release %s", name, error, name)
    return None


def read_whole(data: bytes) -> tuple[Left, list[Record]]:
    """Of a journal. Raises TornError, OtherVersionError, msgspec.MsgspecError."""
    journal = read(data)
    return decode(journal.before, records=bool(journal.records)), journal.records


def replayed(was: Left, records: Sequence[Record], core: Multiplexer) -> Replay:
    """Makes `core`, a new one, what the last refault's was. Raises TornError."""
    replay = Replay(core)
    replay.peeked.update({number: each.peeked for number, each in was.clients.items() if each.peeked})
    replay.run(was.core, records)
    return replay


def _holder(was: Left) -> contextlib.AbstractContextManager[Held | Stored]:
    """Of what was left. Raises OSError, also where that has ended."""
    return contextlib.nullcontext(Stored()) if was.stored else held(was.pid, was.started)


def free(path: Path) -> None:
    """Ends what QEMU holds by a journal, and removes that, unless QEMU may yet come to hold it. Raises
    OperatorError."""
    was = _read(path)
    try:
        if _end_held(was) > 0 or not _may_come_to_hold(was):
            remove(path)
    except OSError as error:
        raise _not_freed(was, error) from error


def _found(
    name: str,
    was: Left,
    holder: Held | Stored,
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
    joined = {known.cookie for known in about.values()}
    came: list[tuple[socket.socket, str]] = []
    for cookie, address in {**was.came, **replay.came}.items():
        if cookie in kept and cookie not in joined and address in wanted and not hung_up(kept[cookie]):
            came.append((kept.pop(cookie), address))
    of_nobody = len(kept)
    for sock in kept.values():
        with sock:
            end_for_all(sock)
    log.info(
        "%s: going on where the last refault ended: %d clients, %d commands with QEMU%s",
        name,
        len(clients),
        len(core.window.pending),
        f"; {len(gone)} clients are gone, which QEMU did not hold" if gone else "",
    )
    if lost := replay.lost_descriptors:
        core.leave_undecided(len(lost))
        log.warning(
            "%s: %d descriptors that clients had passed are lost with the last refault, and their commands"
            " answered with an error: %s",
            name,
            len(lost),
            ", ".join(lost[:_NAMED]) + (", ..." if len(lost) > _NAMED else ""),
        )
    return Taken(was, upstream, clients, fronts, peeked, list(spent.values()), lots, came, of_nobody)


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
    if was.qemu == qemu:
        return None
    if was.stored:
        if not _is_stored(was):
            with contextlib.suppress(OperatorError):
                free(path)
            return None
        spare_stored(was.held)
        return (
            f"{path} is of a QEMU at {was.qemu}, which still runs, and whose clients wait for a refault: the"
            " end of this one will disconnect clients. Give this VM another --name or --state-dir, or stop"
            " this refault for good and free that QEMU: systemctl stop"
        )
    if _has_ended(was):
        return None
    return (
        f"{path} is of QEMU process {was.pid} at {was.qemu}, which still runs, and whose clients wait for a"
        " refault: the end of this one will disconnect clients. Give this VM another --name or --state-dir,"
        f" or stop this refault and free that QEMU: refault release {was.pid}"
    )


def _is_stored(was: Left) -> bool:
    """Whether the service manager has kept its monitor's connection, at whose other end somebody is yet."""
    sock = Stored().take(was.upstream)
    if sock is None:
        return False
    with sock:
        return not hung_up(sock)


def holder_of(path: Path) -> int | None:
    """The QEMU process that holds what a journal tells of; None where that cannot be read."""
    try:
        return _read(path).pid
    except OperatorError:
        return None


def release(path: Path) -> tuple[int, int]:
    """Ends all that QEMU holds by a journal, and removes that; the process, and how many there were. Raises
    OperatorError, also where QEMU is yet to read what it was told to hold. Nobody else may use the journal
    meanwhile."""
    was = _read(path)
    try:
        if was.stored and exists(was.upstream.inode, was.upstream.cookie):
            raise OperatorError(
                "the service manager holds these connections, and lets go of them when its unit is stopped:"
                " systemctl stop"
            )
        ended = _end_held(was)
        if ended == 0 and _may_come_to_hold(was):
            raise OperatorError(
                f"QEMU, process {was.pid}, has not read yet what it was told to hold, and will hold it then:"
                " its main thread is busy or stopped; try again when its monitor answers"
            )
        remove(path)
    except OSError as error:
        raise _not_freed(was, error) from error
    return was.pid, ended


def _has_ended(was: Left) -> bool:
    """Whether the QEMU that holds it is gone, and with it all that it held."""
    if was.stored:
        return False
    try:
        return start_of(was.pid) != was.started
    except OSError:  # it may be another's number by now
        return not _is_somewhere(was)


def _out_of_reach(was: Left) -> str | None:
    """Why nothing can be had of it, though QEMU holds it: nobody may look at QEMU's process; None else."""
    if was.stored:
        return None
    try:
        start_of(was.pid)
    except PermissionError:
        if _is_somewhere(was):
            return (
                f"QEMU, process {was.pid}, holds its monitor and its clients for the next refault, and this"
                " one may not look at that process: give it CAP_SYS_PTRACE, or QEMU's user"
            )
    except OSError:
        pass
    return None


def _may_come_to_hold(was: Left) -> bool:
    """Whether the connection of its monitor is still somewhere, though QEMU does not hold it: it was passed,
    and QEMU has not read that."""
    return not was.stored and not _has_ended(was) and _is_somewhere(was)


def _is_somewhere(was: Left) -> bool:
    """Whether the connection of its monitor is, in a process or in flight, as far as the kernel tells."""
    try:
        return exists(was.upstream.inode, was.upstream.cookie)
    except OSError:
        return True


def _not_freed(was: Left, error: OSError) -> OperatorError:
    return OperatorError(f"cannot free QEMU, process {was.pid}: {error.strerror or error}")


def _end_held(was: Left) -> int:
    """Raises OSError, and OperatorError where nobody may look."""
    if was.stored:
        ended = _end_all(was, Stored())
        forget_stored(was.held)
        return ended
    if _has_ended(was):
        return 0
    if (told := _out_of_reach(was)) is not None:
        raise OperatorError(told)
    with held(was.pid, was.started) as holder:
        return _end_all(was, holder)


def forget_stored(names: Sequence[str]) -> None:
    """They are over: the service manager keeps them no more."""
    claim_stored(names)
    store = FdStore()
    if store.offered:
        for name in names:
            with contextlib.suppress(OSError):
                store.remove(name)


def end_unclaimed() -> int:
    """Ends what the service manager has kept and nobody has come for; how many connections and listeners."""
    ended = 0
    names = unclaimed()
    for name in names:
        if (sock := stored(name)) is not None:
            with sock:
                if sock.type == socket.SOCK_SEQPACKET:
                    ended += Lot((sock, sock)).end()
                else:
                    end_for_all(sock)
                    ended += 1
    forget_stored(names)
    return ended


def _read(path: Path) -> Left:
    try:
        data = left(path)
        if data is None:
            raise OperatorError(f"{path} is not there any more")
        was = decode(before(data), records=False)
    except (OSError, TornError, OtherVersionError, msgspec.MsgspecError) as error:
        raise OperatorError(f"{path} cannot be read: {_why(error)}") from error
    return was


def _why(error: Exception) -> str:
    """Without the path, which is told already."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _end_all(was: Left, holder: Held | Stored) -> int:
    """Raises OSError."""
    ended = 0
    with contextlib.suppress(TornError), contextlib.ExitStack() as stack:
        lots = _lots(was, holder)
        for lot in lots:
            stack.callback(lot.close)
        for lot in lots:
            ended += lot.end()
    upstream = holder.take(was.upstream)
    if upstream is None:
        return 0
    with upstream:
        end_for_all(upstream)
    return 1 + ended


def _kept(was: Left, holder: Held | Stored) -> tuple[list[Lot], dict[bytes | None, socket.socket]]:
    """Where connections are kept, the lot that has all of them first, and each of them by its cookie. Raises
    TornError where they are not, and OSError."""
    lots = _lots(was, holder)
    kept: dict[bytes | None, socket.socket] = {}
    has: dict[Lot, set[bytes | None]] = {}
    with contextlib.ExitStack() as undo:
        for lot in lots:
            undo.callback(lot.close)
        for lot in lots:
            has[lot] = set()
            for sock in lot.look():
                sock.setblocking(False)
                has[lot].add(cookie := cookie_of(sock))
                if kept.setdefault(cookie, sock) is not sock:
                    sock.close()
                else:
                    undo.callback(sock.close)
        lots.sort(key=lambda lot: len(has[lot]), reverse=True)
        with contextlib.suppress(BlockingIOError):  # it is full, and will be tidied
            lots[0].put([kept[cookie] for cookie in kept.keys() - has[lots[0]]])
        undo.pop_all()
    return lots, kept


def _lots(was: Left, holder: Held | Stored) -> list[Lot]:
    """Raises TornError where QEMU does not hold them."""
    ends = [holder.take(identity) for identity in was.lots]
    there = [end for end in ends if end is not None]
    if len(there) < len(ends) or len(ends) % 2:
        for end in there:
            end.close()
        raise TornError("QEMU does not hold what connections are kept in")
    return [Lot(there[at : at + 2]) for at in range(0, len(there), 2)]
