"""Hears of files that come and go (inotify(7)), so that nobody has to look again and again.

    while True:
        with watched(path) as changes:      # from here on nothing is missed
            if not there(path):
                break
            await changes.wait()

One descriptor serves all of an event loop, for a user has only few of them (fs.inotify.max_user_instances);
it is closed when nothing is watched any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator

import trio

_ACCESSIBLE = os.O_NONBLOCK | os.O_CLOEXEC
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
_OVERFLOW, _IGNORED = 0x4000, 0x8000
_ONLYDIR, _MASK_ADD = 0x01000000, 0x20000000
_ITSELF = _DELETE_SELF | _MOVE_SELF
_ENTRIES = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_EVENT = struct.Struct("iIII")
"""struct inotify_event (sys/inotify.h): wd, mask, cookie, len; a name of `len` bytes follows."""
_READ = 64 << 10
BLIND_LOOK = 1.0
"""Seconds after which something may have changed, where the kernel cannot tell."""

_libc = ctypes.CDLL(None, use_errno=True)


class Changes:
    """What has happened to what is watched."""

    def __init__(self) -> None:
        self._happened = trio.Event()
        self.blind = False
        """Whether the kernel does not tell: too many watches, or no descriptor."""

    async def wait(self) -> None:
        """Returns when something has happened since the watch began, or since the last return."""
        if self.blind:
            await trio.sleep(BLIND_LOOK)
            return
        await self._happened.wait()
        self._happened = trio.Event()

    def tell(self) -> None:
        """Something has happened."""
        self._happened.set()


class _Hub:
    """The inotify descriptor of an event loop."""

    def __init__(self) -> None:
        self._fd = _libc.inotify_init1(_ACCESSIBLE)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        self.users = 0
        """How many `_watch` are open; the last closes it."""
        self.closed = False
        self._watches: dict[int, dict[bytes | None, list[Changes]]] = {}
        """By watch descriptor: who is to hear of a name in that directory; under None of any name."""

    def add(self, directory: str, name: bytes | None, mask: int, changes: Changes) -> int:
        """Has `changes` told, until `drop`. Raises OSError."""
        where = ctypes.c_char_p(os.fsencode(directory))
        number: int = _libc.inotify_add_watch(self._fd, where, mask | _ITSELF | _ONLYDIR | _MASK_ADD)
        if number < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        self._watches.setdefault(number, {}).setdefault(name, []).append(changes)
        return number

    def drop(self, number: int, name: bytes | None, changes: Changes) -> None:
        """Ends what `add` began."""
        names = self._watches.get(number)
        if names is None or changes not in names.get(name, ()):
            return  # the kernel has dropped it, with its directory
        names[name].remove(changes)
        if not names[name]:
            del names[name]
        if not names:
            del self._watches[number]
            if not self.closed:
                _libc.inotify_rm_watch(self._fd, number)

    async def run(self) -> None:
        """Tells, until it is closed or the event loop ends."""
        try:
            with contextlib.suppress(trio.ClosedResourceError):
                while not self.closed:  # or the number may be another file's
                    await trio.lowlevel.wait_readable(self._fd)
                    if not self.closed:
                        self._take_what_is_there()
        finally:
            self.close()

    def _take_what_is_there(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._take(os.read(self._fd, _READ))

    def close(self) -> None:
        """Nothing is told any more."""
        if not self.closed:
            self.closed = True
            trio.lowlevel.notify_closing(self._fd)
            os.close(self._fd)

    def _take(self, events: bytes) -> None:
        at = 0
        while at < len(events):
            number, mask, _, length = _EVENT.unpack_from(events, at)
            at += _EVENT.size
            name = events[at : at + length].rstrip(b"\0")
            at += length
            if mask & _OVERFLOW:
                for names in list(self._watches.values()):
                    _tell(names)
            elif mask & _IGNORED:
                _tell(self._watches.pop(number, {}))
            elif number in self._watches:
                names = self._watches[number]
                _tell(names if not name else {each: names[each] for each in (name, None) if each in names})


def _tell(names: dict[bytes | None, list[Changes]]) -> None:
    for told in names.values():
        for changes in told:
            changes.tell()


_hub: trio.lowlevel.RunVar[_Hub | None] = trio.lowlevel.RunVar("inotify")


def _of_this_loop() -> _Hub:
    hub = _hub.get(None)
    if hub is None or hub.closed:
        hub = _Hub()
        _hub.set(hub)
        trio.lowlevel.spawn_system_task(hub.run)
    return hub


@contextlib.contextmanager
def _used() -> Iterator[_Hub]:
    hub = _of_this_loop()
    hub.users += 1
    try:
        yield hub
    finally:
        hub.users -= 1
        if not hub.users:
            hub.close()


@contextlib.contextmanager
def watched(path: str) -> Iterator[Changes]:
    """Told when what is at `path` may have come, gone or been replaced, or a directory on the way to it."""
    with _watch(_way_to(os.path.abspath(path))) as changes:
        yield changes


async def until_gone(path: str, there: Callable[[], bool]) -> None:
    """Returns when `there` does not say any more that what is at `path` is what was put there."""
    while True:
        with watched(path) as changes:
            if not there():
                return
            await changes.wait()


@contextlib.contextmanager
def path_and_entries_watched(path: str, directories: Iterable[str]) -> Iterator[Changes]:
    """As `watched`, and told when anything may have come or gone in one of `directories`."""
    entries = ((directory, None, _ENTRIES) for directory in directories)
    with _watch(itertools.chain(_way_to(os.path.abspath(path)), entries)) as changes:
        yield changes


def _way_to(path: str) -> Iterator[tuple[str, bytes, int]]:
    """Each directory on the way that is there, what is wanted in it, and what is to be heard of that."""
    directory = "/"
    *parts, last = path.split("/")[1:]
    for part in parts:
        further = os.path.join(directory, part)
        if not os.path.isdir(further):
            yield directory, os.fsencode(part), _ENTRIES
            return
        yield directory, os.fsencode(part), 0
        directory = further
    yield directory, os.fsencode(last), _ENTRIES


@contextlib.contextmanager
def _watch(wanted: Iterable[tuple[str, bytes | None, int]]) -> Iterator[Changes]:
    changes = Changes()
    with contextlib.ExitStack() as stack:
        try:
            hub = stack.enter_context(_used())
            for directory, name, mask in wanted:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    number = hub.add(directory, name, mask, changes)
                    stack.callback(hub.drop, number, name, changes)
        except OSError:
            changes.blind = True
        yield changes
