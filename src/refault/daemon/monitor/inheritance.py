"""What one refault leaves of a monitor's connections to the next: written down, handed over, taken over, and
ended where there is nothing to go on by."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from refault import __version__
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.repeats import repeats
from refault.daemon.kept import orphans
from refault.daemon.kept.left import FORMAT, About, Left, Listening, encode
from refault.daemon.kept.recorder import Recorder
from refault.daemon.kept.sockets import cookie_of
from refault.daemon.kept.taken import free, take, why_anothers
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.clients import Clients
from refault.daemon.monitor.front import Front
from refault.daemon.monitor.keeper import Keeper
from refault.daemon.monitor.listener import Bound
from refault.daemon.monitor.socket_file import Access
from refault.daemon.monitor.upstream import Upstream
from refault.qmp.multiplexer import Multiplexer
from refault.qmp.saved import save

log = logging.getLogger("refault.qmp")


class Inheritance:
    """Of one monitor, for one run of it."""

    def __init__(
        self,
        name: str,
        qemu: Address,
        journal: Path | None,
        core: Multiplexer,
        recorder: Recorder,
        keeper: Keeper,
        clients: Clients,
        upstream: Upstream,
        *,
        fronts: Callable[[], Sequence[Front]],
        addresses: Callable[[], Sequence[Address]],
    ) -> None:
        """`journal`: the file by which the next refault goes on; None: it does not. `fronts`: where clients
        come; `addresses`: the same as they were asked for, and the managers that are dialled."""
        self._name = name
        self._qemu = qemu
        self._journal = journal
        self._core = core
        self._recorder = recorder
        self._keeper = keeper
        self._clients = clients
        self._upstream = upstream
        self._fronts = fronts
        self._addresses = addresses
        self._anothers: str | None = None
        """Why the journal is left alone."""

    def before(self) -> bytes:
        """All that is so far, for the journal."""
        keeper, clients = self._keeper, self._clients
        assert keeper.upstream is not None  # noqa: S101 - nothing is written down before
        fronts = []
        for front in self._fronts():
            cookies = [keeper.cookie(sock) for sock in ending_with_us(front)]
            held = [cookie for cookie in cookies if cookie is not None]
            if front.bound is not None and held and len(held) == len(cookies):
                plain = front.bound.plain
                access = (plain.mode, plain.uid, plain.gid, plain.acl) if plain is not None else None
                port = front.bound.address.port
                fronts.append(Listening(front.key, port, held, front.bound.inode, access))
        about = {
            number: About(str(address), keeper.cookie(sock), self._recorder.peeked_bytes(sock))
            for number, (sock, address) in clients.connections().items()
        }
        core = save(self._core, clients.unsent, self._upstream.unsent, self._recorder.peeked)
        return encode(
            Left(
                FORMAT,
                __version__,
                str(self._qemu),
                keeper.pid,
                keeper.started,
                keeper.upstream,
                keeper.lots_held,
                fronts,
                about,
                core,
                keeper.came,
                keeper.stored,
            )
        )

    def take_over(self, renew: Callable[[], None]) -> None:
        """Goes on where the last refault ended, if it has left this monitor's connections to us. `renew`
        makes all anew where that was begun and cannot be."""
        if self._journal is None or self._is_anothers():
            return
        taken = take(self._name, self._journal, self._core, {front.key for front in self._fronts()})
        if taken is None:
            if self._core.greeting is not None:
                renew()
            if self._journal.exists():  # it could not be read, or QEMU is yet to hold what it tells of
                self.end_orphans()
            return
        known = {str(address): address for address in self._addresses()}
        fronts = {front.key: front.address for front in self._fronts()}
        held: dict[socket.socket, bytes] = {}
        for client in list(self._core.clients.values()):
            sock, about = taken.clients[client.number]
            address = known.get(about.address) or Address(about.address, server=True)
            if about.cookie is not None:
                held[sock] = about.cookie
            self._clients.take_over(client, sock, address)
        for front in self._fronts():
            if (found := taken.fronts.get(front.key)) is not None:
                listening, socks = found
                plain = Access(*listening.access) if listening.access is not None else None
                address = replace(front.address, port=listening.port)
                front.take_over(Bound(socks, address, listening.inode, plain))
                held.update(zip(socks, listening.cookies, strict=True))
        came: dict[socket.socket, str] = {}
        for sock, where in taken.came:
            held[sock], came[sock] = cookie_of(sock), where
            self._clients.comes_again(sock, fronts[where])
        self._keeper.resume(taken.left, taken.lots, held, came)
        self._upstream.take_over(taken.upstream)
        for fd, (number, count) in taken.peeked.items():
            self._recorder.recovered(fd, taken.clients[number][0], number, count)
        self._recorder.go_on()
        for fd in taken.spent:
            self._recorder.close(fd)
        if taken.of_nobody:
            self._keeper.tidy_if_possible()

    def keep(self) -> None:
        """Has QEMU hold what it does not hold yet, where the next refault could find it."""
        if self._journal is None or self._keeper.on or not self._core.ready:
            return
        if not self._is_anothers():
            self._upstream.keep()

    def _is_anothers(self) -> bool:
        """Whether it is left of a QEMU that is at another address and runs yet: it is not touched."""
        assert self._journal is not None  # noqa: S101 - the callers have looked
        told = self._anothers = why_anothers(self._journal, str(self._qemu))
        if told is not None:
            log.error("%s: %s", self._name, told, extra=repeats((self._name, "another's clients"), told))
        return told is not None

    def free_left(self) -> None:
        """QEMU may have read behind the end of the last refault what that had told it to hold."""
        if self._journal is not None and not self._recorder.on and not self._is_anothers():
            with contextlib.suppress(OperatorError):
                free(self._journal)
            self.end_orphans()

    def end_orphans(self) -> int:
        """Ends what QEMU holds of a refault that has left nothing by which to go on; how many."""
        qemu = self._qemu
        if qemu.path is None:
            return 0
        try:
            ended = orphans.end_orphans(qemu.sun_path)
        except OSError as error:
            log.info(
                "%s: whether QEMU holds its monitor for a refault that is gone cannot be told: %s",
                self._name,
                error.strerror,
                extra=repeats((self._name, "orphans"), error.errno),
            )
            return 0
        if ended:
            log.warning(
                "%s: QEMU held %d connections and listeners for a refault that has left no record here to"
                " go on by: they are ended, and those clients disconnected",
                self._name,
                ended,
            )
        return ended

    def hand_over(self) -> None:
        """The next refault goes on from this moment, in which this process ends."""
        if self._recorder.leave():
            self._keeper.hand_over()
            self._clients.hand_over()
            for front in self._fronts():
                front.hand_over()

    @property
    def kept(self) -> tuple[bool, str | None]:
        """Whether clients outlive refault, and if it is known, why not."""
        if self._journal is None:
            return False, "the state directory is not this refault's"
        return self._keeper.on, self._anothers or self._keeper.trouble


def ending_with_us(front: Front) -> tuple[socket.socket, ...]:
    """Those that end with us, if they are not kept. One that is somebody else's is neither kept nor ended."""
    bound = front.bound
    return bound.socks if bound is not None and not bound.given and front.address.fd is None else ()
