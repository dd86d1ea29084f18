"""QEMU's wait=on: a QEMU that was started with it stands still until its monitor has been connected to. It is
not connected to before a client has come at each listener that has wait=on.

A QEMU that refault was connected to before has gone on: it is connected to at once, for it may have to be
recovered. It is the same one while its socket file is; where there is no file to tell by, any is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import trio

from refault.daemon.kernel.unix_diag import listens
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.dial import BACKOFF
from refault.daemon.monitor.presence import Presence, Qemu

log = logging.getLogger("refault.qmp")

_Identity = tuple[int, int, int] | str | None


class FirstClient:
    """Whether enough clients have come. `over`: the QEMU that is there has gone on already."""

    def __init__(
        self,
        name: str,
        qemu: Address,
        listeners: Iterable[Address],
        presence: Presence,
        *,
        over: bool,
    ) -> None:
        self._name = name
        self._qemu = qemu
        self._awaited = {address for address in listeners if address.wait}
        self._presence = presence
        self._came: set[Address] = set()
        self._news = trio.Event()
        self._gone_on: _Identity = self._identity() if over else None
        self._seen = over and self._listens()
        """Whether the kernel tells of the one that has gone on."""

    @property
    def holds(self) -> bool:
        """Whether who came stays though nobody is there: the first QEMU of all is waited for."""
        return bool(self._awaited) and self._gone_on is None

    def listen_at(self, listeners: Iterable[Address]) -> None:
        """Clients come at these from now on."""
        self._awaited = {address for address in listeners if address.wait}
        self._news.set()

    def came(self, listener: Address) -> None:
        """A client has come at `listener`."""
        self._came.add(listener)
        self._news.set()

    def connected(self) -> None:
        """QEMU has greeted: it has gone on."""
        self._gone_on, self._seen = self._identity(), self._listens()
        self._came.clear()

    async def wait(self) -> None:
        """Returns when QEMU may be connected to."""
        delay, longest = BACKOFF
        while self._awaited and self._is_new():
            if not self.holds and not self._may_be_there():
                self._came.clear()
                self._presence.set(Qemu.AWAY)
            elif self._came >= self._awaited:
                return
            elif self._presence.qemu is not Qemu.WAITING:
                log.info("%s: a client is to come before QEMU is connected to (wait=on)", self._name)
                self._presence.set(Qemu.WAITING)
            self._news = trio.Event()
            with trio.move_on_after(delay):
                await self._news.wait()
            delay = min(2 * delay, longest)

    def _is_new(self) -> bool:
        """Whether the QEMU that is there, or will be, is another than the one that has gone on."""
        if self._gone_on is None or self._identity() != self._gone_on:
            return True
        return self._seen and not self._listens()

    def _may_be_there(self) -> bool:
        """Whether a new QEMU listens, as far as can be found out without connecting to it."""
        if self._listens():
            return True
        # In another network namespace the kernel does not tell of it.
        return self._identity() not in (None, self._gone_on)

    def _listens(self) -> bool:
        if self._qemu.path is None or self._qemu.server:
            return False
        try:
            return listens(self._qemu.sun_path)
        except OSError:
            return False

    def _identity(self) -> _Identity:
        if self._qemu.path is None or self._qemu.server or self._qemu.abstract:
            return str(self._qemu)
        try:
            status = os.stat(self._qemu.sun_path)
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_mtime_ns
