"""fd sets (add-fd) that clients leave behind: which of them nobody can use any more.

A set is QEMU's, not a client's. 7.2 closes what a set holds when the last monitor's client has gone and the
guest runs (monitor/misc.c, monitor_fdset_cleanup); 10.0 never does (monitor/fds.c). refault does not go, so
it takes sets back. QMP does not tell whether one is in use, and what uses one may open it again much later
without naming it (a commit opens its backing file for writing). So a set is taken back only if

- all that QEMU says is in it was added by clients of this connection, and all of these have left;
- no command of anybody's has named it since: /dev/fdset/N in any string, fdset-id of all but add-fd;
- the guest runs, as with 7.2, and no migration comes in: files are opened once more when it is complete.

add-fd with an fdset-id may make a set or add to one: who sends it has a share in the set. A set made so stays
if its number was in use, or has been named, at any time before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from refault.qmp.decoding import decode_members
from refault.qmp.session import Request
from refault.qmp.splitter import NOT_OBJECT

MAX_NAMED = 4096
"""Numbers of sets kept as named. With more of them all sets count as named."""
MAX_READ = 1 << 20
"""Bytes of a command that is looked through. With a longer one, if it may name a set, all count as named."""

_NUMBER = re.compile("0*([0-9]{1,18})")


class Call(Protocol):
    """Sends QEMU an in-band command. What it returns, None for an error, is told (`FdSets.told`), unless QEMU
    goes away."""

    def __call__(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        purpose: str,
        *,
        at_once: bool = False,
    ) -> None:
        """`at_once`: ahead of all that waits, where another command of the caller's was just answered."""


OLDER, LOOK, TAKEN_BACK = "older", "look", "taken back"
"""What commands are for: to know which sets there are, which may be taken back, and to take one back."""


@dataclass
class _Set:
    since: int
    """How many commands had been read when its add-fd was; 0 for a set that may be older than that."""
    fds: set[int] = field(default_factory=set)
    """As QEMU numbers them."""
    clients: set[int] = field(default_factory=set)
    """Those who have a share in it and are still there."""


class FdSets:
    """The fd sets of one connection to QEMU. Clients are numbers. `free` is called when `may_add` is set."""

    def __init__(self, call: Call, free: Callable[[], None]) -> None:
        self.may_add = False
        """Whether add-fd may go to QEMU: once `ask_older` has its answer."""
        self._call = call
        self._free = free
        self.older: frozenset[int] | None = None
        self.sets: dict[int, _Set] = {}
        self.named: dict[int, int] = {}
        self.all_named = 0
        self.commands_read = 0
        self.asked_older = False
        self.looks = False
        self.returned: list[object] = []
        """What QEMU has said so far of what is asked when looking."""

    def restore(
        self,
        *,
        may_add: bool,
        older: frozenset[int] | None,
        sets: Iterable[tuple[int, int, Iterable[int], Iterable[int]]],
        named: dict[int, int],
        all_named: int,
        commands_read: int,
        asked_older: bool,
        looks: bool,
        returned: list[object],
    ) -> None:
        """Goes on as those of another core do; `sets`: number, since, descriptors, clients of each."""
        self.may_add, self.older, self.asked_older = may_add, older, asked_older
        self.sets = {number: _Set(since, set(fds), set(clients)) for number, since, fds, clients in sets}
        self.named, self.all_named, self.commands_read = named, all_named, commands_read
        self.looks, self.returned = looks, returned

    def ask_older(self) -> None:
        """Has QEMU say which sets it has already."""
        if not self.asked_older:
            self.asked_older = True
            self._call("query-fdsets", None, OLDER)

    def told(self, purpose: str, value: object) -> None:
        """What QEMU returned to a command of ours."""
        if purpose == OLDER:
            self.older = None if value is None else frozenset(_contents(value))
            self.may_add = True
            self._free()
        elif purpose == TAKEN_BACK:
            self.look()
        else:
            self.returned.append(value)
            if len(self.returned) == len(_QUESTIONS):
                (status, migration, sets), self.returned = self.returned, []
                self.looks = False
                if _guest_runs(status) and not _migration_comes_in(migration):
                    self._take_one_back(_contents(sets))

    def read(self, request: Request) -> None:
        """A command was read from a client: the sets that it names stay."""
        self.commands_read += 1
        request.read = self.commands_read
        message = request.message
        raw = message.raw
        if (b"fdset" not in raw and b"\\" not in raw) or message.problem or message.shape & NOT_OBJECT:
            return
        adds = request.name == b"add-fd"
        if len(raw) > MAX_READ:
            self.all_named = self.commands_read
        else:
            self.named.update(dict.fromkeys(_numbers(decode_members(message), adds=adds), self.commands_read))
            if len(self.named) > MAX_NAMED:
                self.named.clear()
                self.all_named = self.commands_read
        if adds and (mine := self.sets.get(_chosen_number(request))):
            mine.clients.add(request.client.number)

    def added(self, request: Request, result: object) -> None:
        """QEMU answered an add-fd, None being an error. Its client may have left."""
        match result:
            case {"fdset-id": int(number), "fd": int(fd)}:
                pass
            case _:
                return
        if _chosen_number(request) < 0:
            mine = self.sets[number] = _Set(request.read)  # QEMU takes a number that is free
        elif self.older is None or number in self.older:
            return
        else:
            mine = self.sets.setdefault(number, _Set(0))
        mine.fds.add(fd)
        if request.client.connected:
            mine.clients.add(request.client.number)
        else:
            self.look()

    def left(self, client: int) -> None:
        """A client has gone."""
        for mine in self.sets.values():
            mine.clients.discard(client)
        self.look()

    def look(self) -> None:
        """Takes back what can be: when a client has left, the guest goes on, or a migration has ended."""
        if self.looks or not self._deserted():
            return
        self.looks = True
        for question in _QUESTIONS:
            self._call(question, None, LOOK)

    def _take_one_back(self, there: Mapping[int, set[int]]) -> None:
        """Before anything goes to QEMU that was not read yet, and might name the set."""
        for number in self._deserted():
            fds = self.sets.pop(number).fds
            if number in there and there[number] <= fds:
                self._call("remove-fd", {"fdset-id": number}, TAKEN_BACK, at_once=True)
                return

    def _deserted(self) -> list[int]:
        """Those that nobody has a share in. What was named is forgotten: it stays for good."""
        deserted = [number for number, mine in self.sets.items() if not mine.clients]
        for number in deserted:
            if max(self.named.get(number, 0), self.all_named) > self.sets[number].since:
                del self.sets[number]
        return [number for number in deserted if number in self.sets]


_QUESTIONS = ("query-status", "query-migrate", "query-fdsets")


def _guest_runs(query_status: object) -> bool:
    return isinstance(query_status, Mapping) and query_status.get("running") is True


def _migration_comes_in(query_migrate: object) -> bool:
    """Whether one is under way whose source is elsewhere: only a source counts RAM."""
    if not isinstance(query_migrate, Mapping):
        return True
    status = query_migrate.get("status")
    return status not in (None, "none", "completed", "failed", "cancelled") and "ram" not in query_migrate


def _chosen_number(request: Request) -> int:
    """The fdset-id of an add-fd; -1 where QEMU is to choose, or refuses it."""
    number = request.arguments().get("fdset-id")
    return number if isinstance(number, int) else -1


def _contents(query_fdsets: object) -> dict[int, set[int]]:
    """The descriptors' numbers by set."""
    there: dict[int, set[int]] = {}
    for item in query_fdsets if isinstance(query_fdsets, list) else ():
        match item:
            case {"fdset-id": int(number), "fds": list(fds)}:
                there[number] = {fd["fd"] for fd in fds}
    return there


def _numbers(command: Mapping[str, object], *, adds: bool) -> Iterable[int]:
    """Of all sets that a command may name, at any depth: rather too many, for a string may be a command line
    or JSON with escapes of its own. add-fd uses no set, whatever its fdset-id.
    """
    left: list[object] = [command]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            number = value.get("fdset-id")
            if isinstance(number, int) and not adds:
                yield number
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
        elif isinstance(value, str):
            if "\\" in value:
                yield from map(int, _NUMBER.findall(value))
            else:
                for rest in value.split("fdset")[1:]:
                    if found := _NUMBER.search(rest):
                        yield int(found[1])
