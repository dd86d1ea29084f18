"""Where a destination QEMU takes a channel in: a private socket at which it listens, for the first one, and
for each where there is more than one connection; else the end of a socketpair that it was handed."""

from __future__ import annotations

import logging
import socket
from typing import Protocol

import trio

from refault.daemon.monitor.monitor import MonitorLost, QmpError, words
from refault.daemon.near.local import Deposits, Executes, LocalLeg, give_back, hand_over, lay
from refault.daemon.near.local_unix import PrivateSockets, QemuListens
from refault.daemon.near.reach import listens
from refault.migration.phase import Role

log = logging.getLogger("refault.migration")

Door = LocalLeg | QemuListens


class Owner(Protocol):
    """What the doors need of the VM whose they are."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def monitor(self) -> Executes:
        """Where QEMU is told of them."""

    @property
    def sockets(self) -> PrivateSockets:
        """Where sockets for this QEMU may lie."""

    async def let_go(self, end: socket.socket) -> bool:
        """Closes our end of a pair on which QEMU may listen, once QEMU holds both; False if it stays open."""


class Doors:
    """Of one migration; `lanes` tells whether a channel of it has further connections, as far as is known."""

    def __init__(self, vm: Owner, *, lanes: bool) -> None:
        self.first: Door | None = None
        """For the migration itself, until it has begun."""
        self.open: Door | None = None
        """For a recovery: QEMU waits there."""
        self.doubtful: Door | None = None
        """Of which QEMU was told and did not answer, in time or before the monitor was lost: it waits there,
        knows nothing of it, has refused it, or is gone."""
        self.wanted = trio.Event()
        """Set whenever one was opened, and replaced."""
        self._vm = vm
        self.lanes = lanes
        self._has_directory = False
        self._deposits = Deposits()
        self._spare: list[Door] = []
        """Those at which QEMU may still wait though another was used: it must never see them end."""

    async def make_first(self) -> str:
        """The door for the migration itself; the address by which QEMU uses it. How many connections will
        come there is not settled before they do, so QEMU is to listen, wherever it can.

        Raises OSError, and what `execute` raises.
        """
        try:
            self.first = await self._where_qemu_can_listen()
        except (QmpError, OSError) as error:
            if self.lanes:
                raise
            log.info(
                "%s: QEMU cannot listen in a private directory (%s): it gets a descriptor, and a migration"
                " for which more than one connection is switched on from now on will not get through",
                self._vm.name,
                words(error),
            )
            self.first = await hand_over(self._vm.monitor, Role.DESTINATION)
        return self.first.uri

    async def _where_qemu_can_listen(self) -> QemuListens:
        self._make_directory()
        await listens(self._vm.monitor, self._vm.sockets)
        return QemuListens(self._vm.sockets.path())

    def _make_directory(self) -> None:
        self._has_directory = True
        self._vm.sockets.make()

    @property
    def laid(self) -> tuple[str, ...]:
        """The names of what QEMU has not been told of yet."""
        return self._deposits.names

    def takes_over(self) -> None:
        """An earlier refault had the doors, and may have left a directory."""
        self._has_directory = True

    def pass_first(self) -> Door | None:
        """The door for the migration itself, for who comes through it now."""
        door, self.first = self.first, None
        return door

    def pass_open(self) -> Door | None:
        """The door for a recovery, for who comes through it now."""
        door, self.open = self.open, None
        return door

    def not_passed(self, door: Door | None, *, recovered: bool) -> None:
        """Nobody came through it after all; None where it is of no use any more."""
        if recovered:
            self.open = door
        else:
            self.first = door

    def learn(self, *, lanes: bool) -> bool:
        """Whether a channel has further connections, by the newest word; whether that is news."""
        before, self.lanes = self.lanes, lanes
        return before is not lanes

    async def next(self) -> Door:
        """What QEMU is to be told of for the next recovery. Raises as `make_first` does."""
        if not self.lanes:
            return self._deposits.take() or await lay(self._vm.monitor)
        if not self._vm.sockets.directory.exists():
            self._make_directory()
        return QemuListens(self._vm.sockets.path())

    def told(self, door: Door) -> None:
        """QEMU is being told of it: should the reply never come, it may wait there all the same."""
        if door not in self._spare:
            self._spare.append(door)

    def doubt(self, door: Door) -> None:
        """QEMU did not answer in time, or before the monitor was lost. Nobody is let in there before QEMU is
        heard of again."""
        self.told(door)
        self.doubtful = door

    def taken(self, door: Door) -> None:
        """QEMU waits there."""
        self._forget(door)
        if door is self.doubtful:
            self.doubtful = None
        if self.open is not None:
            self._spare.append(self.open)
        self.open = door
        self.wanted.set()
        self.wanted = trio.Event()

    def refused(self, door: Door) -> None:
        """QEMU did not take it."""
        if door is self.doubtful:
            self.doubtful = None
            return  # it may wait there all the same, told of it before
        self._forget(door)
        if isinstance(door, LocalLeg):
            self._deposits.put_back(door)

    def _forget(self, door: Door) -> None:
        if door in self._spare:
            self._spare.remove(door)

    async def lay(self) -> None:
        """Lays descriptors with QEMU, so that a recovery needs no in-band command."""
        try:
            await self.refill()
        except (QmpError, MonitorLost, trio.TooSlowError, OSError) as error:
            log.warning(
                "%s: could not lay descriptors with QEMU: %s; the next recovery will need an in-band command",
                self._vm.name,
                words(error),
            )

    async def refill(self) -> None:
        """Lays new ones in place of those that were used. Raises what `execute` raises."""
        if not self.lanes:
            await self._deposits.fill(self._vm.monitor)

    async def give_up_deposits(self) -> None:
        """Takes back from QEMU what was laid: it has no use."""
        await self._deposits.drain(self._vm.monitor)

    async def give_back(self) -> bool:
        """Gives QEMU our ends of those at which it waits for a recovery; False where it did not take one. One
        that a channel has taken meanwhile is none any more."""
        legs = [door for door in (*self._spare, self.open) if isinstance(door, LocalLeg)]
        given = [await give_back(self._vm.monitor, leg.socket) for leg in legs if leg.socket.fileno() >= 0]
        return None not in given

    async def close(self) -> None:
        """Takes back from QEMU what it did not need: the migration has ended."""
        if self._has_directory:  # before anything is waited for, for the next migration makes it anew
            self._has_directory = False
            self._vm.sockets.remove()
        await self.give_up_deposits()
        # QEMU wakes up on an end that it was told of, even long after the migration, and may abort.
        ends = [door for door in (*self._spare, self.open, self.first) if isinstance(door, LocalLeg)]
        self._spare.clear()
        self.open = self.first = self.doubtful = None
        for leg in ends:
            await self._vm.let_go(leg.socket)
