"""VMs that libvirt starts: their <emulator> (wrapper/) hands libvirt's monitor socket over, gets another for
its QEMU, and becomes that. wrapper/hand_over.h has the packets.

Nothing is done with libvirt's socket before the wrapper has become QEMU with the socket that it was given.
One that had no patience, as with a daemon that was stopped meanwhile, leaves QEMU with libvirt's own, and the
hand-over is nobody's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from refault.daemon.fleet import Fleet
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.paths import make_again, make_if_default
from refault.daemon.host.repeats import repeats
from refault.daemon.host.turns import Turns
from refault.daemon.kept.taken import SUFFIX
from refault.daemon.kernel.inotify import until_gone
from refault.daemon.kernel.passing import receive_with, send_with
from refault.daemon.kernel.peer import peer_of
from refault.daemon.kernel.polled import readable
from refault.daemon.kernel.process import borrowed, process_started, socket_at, still_runs
from refault.daemon.monitor.accept import accepted
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.caller import caller_of, may_speak
from refault.daemon.monitor.listener import ListenError, bind_unix, check
from refault.daemon.options import Handed, VmOptions
from refault.daemon.record import hand_over as record
from refault.daemon.record.hand_over import HandOver
from refault.daemon.record.state_lock import StateLock

log = logging.getLogger("refault")

SOURCE = "libvirt"
"""What the VMs are wanted by."""
OFFERED_WITHIN = 3.0
NAME_FREE_WITHIN = 1.0
TAKEN_WITHIN = 10.0
_LOOK = 0.02
_MOST_AT_ONCE = 32
"""Hand-overs of one user that are not done yet."""
_MOST = 4096
"""VMs."""
_MAGIC = b"refault-exec 1"
_HIDDEN = -1
"""No inode."""
_PACKET = 4096
_FDS = socket.CMSG_SPACE(8 * 4)


class Refused(Exception):  # noqa: N818 - the other side reads it
    """A hand-over comes to nothing, and why."""


@dataclass(frozen=True)
class Offer:
    """What a wrapper says, read from its packet."""

    name: str
    uuid: str
    number: int

    @staticmethod
    def read(packet: bytes) -> Offer:
        """Raises Refused."""
        try:
            magic, name, uuid, number, rest = packet.split(b"\0")
            if magic != _MAGIC or rest or not (number.isascii() and number.isdigit() and len(number) < 10):
                raise ValueError
            return Offer(name.decode(), uuid.decode(), int(number))
        except ValueError as error:
            raise Refused("this is another release of refault: what is offered is not understood") from error


class HandOvers:
    """All of a host."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._vms: dict[str, VmOptions] = {}
        self._begun: set[str] = set()
        """Names of hand-overs that are not done yet."""
        self._leaving: set[str] = set()
        """Names of VMs whose QEMU has ended, and of which something is left yet."""
        self._at_once: Counter[int | None] = Counter()
        self._turns = Turns("hand-over")
        self._restored = False
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs the VMs, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def serve(
        self, handed: Handed, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Takes monitors, until cancelled. Raises OperatorError where it cannot listen any more."""
        path = Path(handed.address.path or "")
        make_if_default(path.parent)
        try:
            bound = bind_unix(handed.address, kind=socket.SOCK_SEQPACKET)
        except ListenError as error:
            raise OperatorError(f"{error} (exec of [daemon])") from error
        try:
            if not self._restored:
                self._restored = True
                self._restore(handed)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept, handed, bound.sock)
                task_status.started()
                await until_gone(str(path), lambda: bound.in_place)
                raise OperatorError(f"{path} was removed or replaced; leave it, libvirt's QEMUs come there")
        finally:
            bound.close()

    async def _accept(self, handed: Handed, listening: socket.socket) -> None:
        def tell(error: OSError) -> None:
            log.error("hand-over: cannot accept: %s", error.strerror, extra=repeats("hand-over", error.errno))

        while True:
            connection = await accepted(listening, tell)
            await self._turns.come()
            connection.setblocking(False)
            self._nursery.start_soon(self._take, handed, connection)

    async def _take(self, handed: Handed, connection: socket.socket) -> None:
        """One that has come, until it is done. What goes wrong with it is its own."""
        with connection, contextlib.ExitStack() as stack:
            caller = caller_of(connection)
            try:
                if not _may_hand_over(connection, caller.uid, handed.address):
                    raise Refused(f"user {caller.uid} may not hand monitors over (exec of [daemon])")
                if self._at_once[caller.uid] >= _MOST_AT_ONCE or len(self._vms) >= _MOST:
                    raise Refused("there are too many")
                self._at_once[caller.uid] += 1
                stack.callback(self._at_once.subtract, (caller.uid,))
                await self._take_offered(handed, connection, stack)
            except (Refused, OperatorError, OSError, ValueError, trio.TooSlowError) as error:
                why = str(error) or "it says nothing"
                log.warning("hand-over of %s: none: %s", caller, why, extra=repeats(("hand-over", why), ""))
                with contextlib.suppress(OSError):  # what is not read would have the end hide why
                    connection.recv(1, socket.MSG_DONTWAIT)
                with contextlib.suppress(OSError):
                    connection.send(f"no {why}".encode()[:200], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except Exception:
                log.exception("hand-over of %s: internal error", caller)
        if self._fleet.refuses:  # others may have what it would have had
            await self._want()

    async def _take_offered(
        self, handed: Handed, connection: socket.socket, stack: contextlib.ExitStack
    ) -> None:
        pid = peer_of(connection).pid
        started = process_started(pid)
        if pid is None or started is None:
            raise Refused("its process is not known here: a pid namespace of its own, perhaps")
        ends = os.pidfd_open(pid)
        kept, undo, coming = (stack.enter_context(contextlib.ExitStack()) for _ in range(3))
        kept.callback(os.close, ends)
        with trio.fail_after(OFFERED_WITHIN):
            offer, monitor = await _offered(connection)
        kept.callback(monitor.close)
        path = _must_listen(monitor)
        name = await self._name(handed.names(offer.name, offer.uuid))
        self._begun.add(name)
        stack.callback(self._begun.discard, name)
        vm = handed.vm(name, Address(path, server=True, fd=monitor.fileno()))
        if (why := self._fleet.why_not(SOURCE, vm)) is not None:
            raise Refused(why)
        coming.enter_context(self._fleet.expects(SOURCE, vm))
        make_if_default(handed.state_dir)
        make_again(vm.state_dir)
        await _must_be_free(vm)
        undo.callback(_clear, vm)
        with _bound(vm) as fresh:
            hand_over = HandOver(
                name=name,
                pid=pid,
                started=started,
                number=offer.number,
                given=os.fstat(fresh.fileno()).st_ino,
                libvirt=os.fstat(monitor.fileno()).st_ino,
                path=path,
            )
            if _socket_of(hand_over) != hand_over.libvirt:
                raise Refused(f"descriptor {offer.number} of its process cannot be seen, or is another")
            hand_over.save(vm.state_dir)
            send_with(connection, b"ok", [fresh.fileno()], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        with trio.move_on_after(TAKEN_WITHIN):
            # Nothing comes but its end, of an exec or a process.
            await trio.lowlevel.wait_readable(connection)
        if _socket_of(hand_over) not in (hand_over.given, _HIDDEN) or readable(ends):
            log.warning("%s: its QEMU went its own way, without refault", name)
            return
        undo.pop_all()
        self._vms[name] = vm
        self._nursery.start_soon(self._front, name, vm, ends, kept.pop_all(), coming.pop_all())

    async def _name(self, possible: list[str]) -> str:
        """The first that nobody has; one whose QEMU has just ended is free in a moment. Raises Refused."""
        for name in possible:
            with trio.move_on_after(NAME_FREE_WITHIN):
                while self._is_leaving(name):  # noqa: ASYNC110 - nothing tells of it
                    await trio.sleep(_LOOK)
            if name not in self._fleet.members and name not in self._begun | self._leaving | self._vms.keys():
                return name
        raise Refused(f"there is a VM of the name {possible[0]} already" if possible else "it has no name")

    def _is_leaving(self, name: str) -> bool:
        member = self._fleet.members.get(name)
        return name in self._leaving | self._vms.keys() or (member is not None and member.wanted is None)

    async def _front(
        self, name: str, vm: VmOptions, ends: int, kept: contextlib.ExitStack, coming: contextlib.ExitStack
    ) -> None:
        """Fronts one for as long as its QEMU runs. What is on record of it outlives this process."""
        with kept:
            log.info("%s: libvirt's monitor is handed over, clients come to %s too", name, vm.listen[1])
            with coming:
                await self._want()
            await trio.lowlevel.wait_readable(ends)
            log.info("%s: its QEMU has ended", name)
            del self._vms[name]
            self._leaving.add(name)
            try:
                await self._want()
            finally:
                _clear(vm)
                self._leaving.discard(name)

    async def _want(self) -> None:
        await self._fleet.want({SOURCE: list(self._vms.values())})

    def _restore(self, handed: Handed) -> None:
        """Takes what an earlier refault was given, of QEMUs that run with what it gave."""
        for hand_over in record.load_all(handed.state_dir):
            name, pid = hand_over.name, hand_over.pid
            kept = contextlib.ExitStack()
            try:
                if _is_over(hand_over):
                    _clear(handed.vm(name, Address(hand_over.path, server=True)))
                    continue
                ends = os.pidfd_open(pid)
                kept.callback(os.close, ends)
                monitor = kept.enter_context(borrowed(pid, hand_over.libvirt))
                vm = handed.vm(name, Address(hand_over.path, server=True, fd=monitor.fileno()))
            except (OSError, ValueError) as error:
                kept.close()
                log.error("%s: libvirt's monitor cannot be taken back from its QEMU: %s", name, error)
                continue
            self._vms[name] = vm
            self._nursery.start_soon(self._front, name, vm, ends, kept, contextlib.ExitStack())


def _may_hand_over(connection: socket.socket, uid: int | None, address: Address) -> bool:
    return uid in (0, os.geteuid()) or (bool(address.callers) and may_speak(connection, address.callers))


def _socket_of(hand_over: HandOver) -> int | None:
    """The inode of what its process has where it was given a socket. _HIDDEN where one may not look: that is
    taken for what was given, for nobody else would answer libvirt.
    """
    try:
        return socket_at(hand_over.pid, hand_over.number)
    except OSError as error:
        log.warning("%s: its process cannot be looked at: %s", hand_over.name, error.strerror)
        return _HIDDEN


def _is_over(hand_over: HandOver) -> bool:
    """Whether its process has ended for certain, or has not what it was given."""
    if not still_runs(hand_over.pid, hand_over.started):
        return True
    return _socket_of(hand_over) not in (hand_over.given, _HIDDEN)


async def _offered(connection: socket.socket) -> tuple[Offer, socket.socket]:
    """What the wrapper says, and libvirt's socket. Raises Refused."""
    await trio.lowlevel.wait_readable(connection)
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    packet, fds = receive_with(connection, _PACKET, 8, flags)
    offer = None
    try:
        offer = Offer.read(packet)
        if len(fds) != 1 or not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
            raise Refused("it comes without a socket")
        return offer, socket.socket(fileno=fds.pop())
    finally:
        for fd in fds:
            os.close(fd)


def _must_listen(monitor: socket.socket) -> str:
    """The path of libvirt's socket. Raises Refused."""
    if monitor.family != socket.AF_UNIX or monitor.type != socket.SOCK_STREAM:
        raise Refused("what it offers is no unix socket")
    path = monitor.getsockname()
    listens = monitor.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens or not isinstance(path, str) or not os.path.isabs(path):
        raise Refused("what it offers does not listen at a path")
    return path


async def _must_be_free(vm: VmOptions) -> None:
    """Raises OperatorError where it could not be fronted: libvirt would wait for an answer for ever."""
    check(vm.listen[1])
    lock = StateLock(vm.state_dir, vm.name)
    await lock.claim(wait=False)
    lock.release()


@contextlib.contextmanager
def _bound(vm: VmOptions) -> Iterator[socket.socket]:
    """The socket for its QEMU, for that to listen at: so the kernel tells us its process. Raises OSError."""
    path = vm.qemu.path or ""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as fresh:
        os.fchmod(fresh.fileno(), 0o600)  # its file's mode, in the same step
        fresh.bind(path)
        yield fresh


def _clear(vm: VmOptions) -> None:
    """Leaves nothing of one that is over."""
    record.remove(vm.state_dir)
    with contextlib.suppress(OSError):
        (vm.state_dir / f"{vm.name}{SUFFIX}").unlink()
    with contextlib.suppress(OSError):
        os.unlink(vm.qemu.path or "")
    with contextlib.suppress(OSError):
        vm.state_dir.rmdir()
