"""Our ends of the local legs of a channel, as QEMU may have to hold them: with both ends of a pair in its
hands it sees no end of file, though refault ends or is killed."""

from __future__ import annotations

import socket
from collections.abc import Callable

from refault.daemon.near.local import Executes, give_back, has_unread, kept_name, take_back


class KeptEnds:
    """Duplicates of our ends of one channel at a time, the main connection's first."""

    def __init__(self, monitor: Executes) -> None:
        self.by_qemu = False
        """Whether QEMU holds all of them."""
        self._monitor = monitor
        self._ends: list[socket.socket] = []
        self._chosen: list[str] = []
        """By which QEMU knows them, or is to."""
        self._names: list[str] = []
        """By which it may hold some, of earlier channels too."""

    def begin(self, main: socket.socket) -> None:
        """Keeps a duplicate of a new channel's main connection, and of that channel alone."""
        self.drop()
        self._ends.append(main.dup())

    def add(self, lane: socket.socket) -> None:
        """Keeps a duplicate of one more, unless the channel is over: nothing would drop it then."""
        if self._ends:
            self._ends.append(lane.dup())
            self.by_qemu = False

    @property
    def names(self) -> tuple[str, ...]:
        """By which QEMU may hold some."""
        return tuple(self._names)

    @property
    def main(self) -> socket.socket | None:
        """The main connection's; None where no channel is kept."""
        return self._ends[0] if self._ends else None

    @property
    def unread(self) -> bool:
        """Whether QEMU has written what has not been read from the main connection."""
        return self.main is not None and has_unread(self.main)

    def drop(self) -> None:
        """The channel is over."""
        for end in self._ends:
            end.close()
        self._ends.clear()
        self._chosen.clear()
        self.by_qemu = False

    async def give(self, remember: Callable[[], None]) -> None:
        """Has QEMU hold them, as descriptors that it never uses; again, if it has not said that it does.

        `remember` is called before QEMU is given one by a name that is new.
        """
        ours = tuple(self._ends)
        if new := [kept_name() for _ in ours[len(self._chosen) :]]:
            self._chosen += new
            self._names += new
            remember()
        given: list[str | None] = []
        for end, name in zip(ours, tuple(self._chosen), strict=True):
            if end.fileno() < 0:  # dropped while QEMU took the one before
                return
            given.append(await give_back(self._monitor, end, name))
        if None not in given and tuple(self._ends) == ours:  # else one has ended, or has come
            self.by_qemu = True

    async def let_go(self) -> None:
        """QEMU is to hold them no more: the migration has ended, or the channel is to."""
        self.by_qemu = False
        self._chosen.clear()
        names, self._names = self._names, []
        await take_back(self._monitor, *names)
