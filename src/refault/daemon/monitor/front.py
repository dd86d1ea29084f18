"""Where others connect to us: one address, over the comings and goings of its file."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from refault.daemon.host.repeats import repeats
from refault.daemon.kernel.inotify import until_gone
from refault.daemon.monitor.accept import accepted
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.listener import Bound, ListenError, NoDirectoryError, bind_tcp, bind_unix, check
from refault.daemon.monitor.socket_file import Access

log = logging.getLogger("refault.qmp")

LOOK = 1.0
"""Seconds between two looks whether a socket file can be made."""
SETTLES = 0.2
"""Seconds that whoever has removed a socket file is left to put something else there."""


class Front:
    """One address at which we listen. `take` gets each connection, and has it closed."""

    def __init__(
        self,
        name: str,
        address: Address,
        take: Callable[[socket.socket], Awaitable[None]],
        when: Callable[[], Awaitable[None]] | None = None,
        *,
        why_not: Callable[[], str | None] = lambda: None,
        bound: Callable[[], None] = lambda: None,
        end: Callable[[socket.socket], None] = lambda _: None,
    ) -> None:
        """`when`: who connects waits until this returns, and while `why_not` says why. `bound` is called when
        it has new sockets, `end` of each of them, and of a connection that `take` has not taken, before it is
        closed."""
        self.key = str(address)
        """The address as it was asked for."""
        self.address = address
        """With the port that TCP really has."""
        self.trouble: str | None = None
        """Why nobody can come, though somebody should."""
        self.settled = trio.Event()
        """Set as soon as it listens for the first time, or has had trouble with that."""
        self._name = name
        self._take = take
        self._when = when
        self._why_not = why_not
        self._handed_over = False
        self._tell_bound = bound
        self._end = end
        self._bound: Bound | None = None
        self._access: Access | None = None

    @property
    def listening(self) -> bool:
        """Whether who connects now reaches us."""
        return self._bound is not None

    @property
    def bound(self) -> Bound | None:
        """What it listens with."""
        return self._bound

    def hand_over(self) -> None:
        """Its sockets and their file are the next refault's, which this process ends for."""
        self._handed_over = True

    def take_over(self, bound: Bound) -> None:
        """Listens with what an earlier refault has bound."""
        self._bound = bound
        self.address = replace(self.address, port=bound.address.port)

    async def prepare(self, *, must: bool = True) -> None:
        """Binds what stays bound; of a socket file checks that it will be possible. Raises ListenError, but
        not where only the directory is not there yet; and not at all unless it `must` be had now.
        """
        try:
            await self._prepare()
        except ListenError as error:
            if must and not isinstance(error, NoDirectoryError):
                raise
            self._tell(error)

    async def _prepare(self) -> None:
        if self._bound is not None:
            return
        if self.address.path is None:
            self._bound = await bind_tcp(self.address)
            if self.address.port == 0 or self.address.to:
                log.info("%s: %s is %s", self._name, self.address, self._bound.address)
            self.address = replace(self.address, port=self._bound.address.port)
            return
        if self.address.fd is None:
            check(self.address)

    async def run(self) -> None:
        """Listens, and again when its file is gone, until cancelled; after `prepare`."""
        try:
            while True:
                bound = self._bound = self._bound or await self._bind()
                self._tell_bound()
                self.settled.set()
                async with trio.open_nursery() as nursery:
                    for sock in bound.socks:
                        nursery.start_soon(self._accept, sock)
                    await self._until_removed(bound)
                    nursery.cancel_scope.cancel()
                self.close()
                log.warning("%s: %s was removed or replaced: making it again", self._name, self.address)
        finally:
            self.close()

    def close(self) -> None:
        """Listens no more."""
        bound, self._bound = self._bound, None
        if bound is None:
            return
        if not self._handed_over:
            self._access = bound.remove() or self._access
        for sock in bound.socks:
            if not self._handed_over:
                self._end(sock)
            sock.close()

    async def _bind(self) -> Bound:
        while True:
            try:
                if self.address.path is None:
                    bound = await bind_tcp(self.address)
                else:
                    bound = bind_unix(self.address, self._access)
            except ListenError as error:
                self._tell(error)
                self.settled.set()
            else:
                if self.trouble is not None:
                    log.info("%s: clients are served at %s again", self._name, self.address)
                self.trouble = None
                return bound
            await trio.sleep(LOOK)

    def _tell(self, error: ListenError) -> None:
        """Once for each trouble, not for each attempt."""
        if str(error) != self.trouble:
            self.trouble = str(error)
            log.error("%s: %s; trying again", self._name, error)

    async def _until_removed(self, bound: Bound) -> None:
        if bound.inode is None or self.address.path is None:
            await trio.sleep_forever()
        await until_gone(self.address.path, lambda: bound.in_place)
        await trio.sleep(SETTLES)

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            if self._when is not None:
                await trio.lowlevel.wait_readable(listening)
                await self._when()
            sock = await accepted(listening, self._tell_not_accepted, why_not=self._why_not)
            try:
                await self._take(sock)
            except BaseException:
                self._end(sock)  # whoever waits there has an end
                sock.close()
                raise

    def _tell_not_accepted(self, error: OSError) -> None:
        log.error(
            "%s: cannot accept a connection at %s: %s",
            self._name,
            self.address,
            error.strerror,
            extra=repeats((self._name, "accept"), error.errno),
        )
