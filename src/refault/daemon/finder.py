"""VMs found by where their QEMUs' sockets are: fronted as these appear, dropped when the QEMU has ended.

The kernel tells of sockets that come (kernel/inotify.py)."""

from __future__ import annotations

import glob
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence

import trio

from refault.daemon.fleet import Fleet
from refault.daemon.host.own_needs import Troubles
from refault.daemon.host.repeats import repeats
from refault.daemon.kernel.inotify import path_and_entries_watched
from refault.daemon.kernel.unix_diag import listens
from refault.daemon.monitor.presence import Qemu
from refault.daemon.options import VmOptions, Watch
from refault.daemon.vm import Vm

log = logging.getLogger("refault")

GONE_AFTER = 2.0
"""Seconds without a QEMU, while nobody listens, after which it has ended. One that starts makes its socket's
file before it listens there."""
_WILD = re.compile(r"[*?\[]")

_Identity = tuple[int, int, int]


class Finders:
    """One finder for each pattern."""

    def __init__(self, fleet: Fleet, troubles: Troubles) -> None:
        self._fleet = fleet
        self._troubles = troubles
        self._finders: dict[str, tuple[Finder, trio.CancelScope]] = {}
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs them, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def watch(self, watches: Sequence[Watch]) -> None:
        """Looks for these from now on. Returns when what is there now is fronted, or could not be."""
        wanted = {watch.pattern: watch for watch in watches}
        for pattern in self._finders.keys() - wanted.keys():
            _, scope = self._finders.pop(pattern)
            scope.cancel()
            await self._fleet.want({pattern: ()})
            self._fleet.forget([pattern])
        for pattern, watch in wanted.items():
            if pattern in self._finders:
                finder, _ = self._finders[pattern]
                await finder.change(watch)
            else:
                scope = trio.CancelScope()
                finder = Finder(watch, self._fleet)
                self._finders[pattern] = finder, scope
                await self._nursery.start(self._run, pattern, finder, scope)

    async def _run(
        self, pattern: str, finder: Finder, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]
    ) -> None:
        need = f"[[watch]] {pattern}"
        try:
            with scope:
                await self._troubles.keep(need, finder.run, task_status=task_status)
        finally:
            self._troubles.over(need)


class Finder:
    """Of one pattern."""

    def __init__(self, watch: Watch, fleet: Fleet) -> None:
        self._watch = watch
        self._fleet = fleet
        self._found: dict[str, tuple[_Identity, VmOptions]] = {}
        """By the path of the socket: which file it was when it was found, and the VM."""
        self._ended: dict[str, _Identity] = {}
        """What is left of QEMUs that have ended."""
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Looks whenever the kernel tells of something, until cancelled. Started after the first look."""
        base = _base(self._watch.pattern)
        started = False
        async with trio.open_nursery() as self._nursery:
            for path in self._found:  # before it failed
                self._nursery.start_soon(self._follow, path)
            while True:
                directories = sorted(_directories(self._watch.pattern))
                with path_and_entries_watched(base, directories) as changes:
                    if directories != sorted(_directories(self._watch.pattern)):
                        continue
                    await self._look()
                    if not started:
                        started = True
                        task_status.started()
                    await changes.wait()

    async def change(self, watch: Watch) -> None:
        """The same pattern, with other options."""
        if watch == self._watch:
            return
        self._watch = watch
        for path, (identity, _) in list(self._found.items()):
            options = self._vm(path)
            if options is None:
                del self._found[path]
            else:
                self._found[path] = identity, options
        await self._want()

    async def _look(self) -> None:
        there = dict(_sockets(self._watch))
        self._ended = {path: was for path, was in self._ended.items() if there.get(path) == was}
        new = []
        for path in sorted(there.keys() - self._found.keys() - self._ended.keys()):
            options = self._vm(path)
            if options is not None:
                self._found[path] = there[path], options
                new.append(path)
        if new:
            await self._want()
        for path in new:
            self._nursery.start_soon(self._follow, path)

    def _vm(self, path: str) -> VmOptions | None:
        try:
            return self._watch.vm(path)
        except ValueError as error:
            log.error("%s: not fronted: %s", path, error, extra=repeats(path, str(error)))
            return None

    async def _want(self) -> None:
        await self._fleet.want({self._watch.pattern: [options for _, options in self._found.values()]})

    async def _follow(self, path: str) -> None:
        """Drops the VM when its QEMU has ended."""
        while path in self._found:
            identity, options = self._found[path]
            vm = self._fronted(options)
            if vm is None:
                now = _identity(path)
                if now is None or now[:2] != identity[:2]:  # its times change with its mode
                    break
                await trio.sleep(GONE_AFTER)  # it is tried again, or is another's
                continue
            presence = vm.monitor.presence
            await presence.until(lambda qemu: qemu in (Qemu.AWAY, Qemu.WAITING))
            with trio.move_on_after(GONE_AFTER):
                await presence.until(lambda qemu: qemu is Qemu.THERE)
                continue
            if not vm.state.qemu_lives and not _listened(vm):
                log.info("%s: its QEMU has ended: no longer looked for", options.name)
                break
        was = self._found.pop(path, None)
        if was is not None and _identity(path) == was[0]:  # else it is another's, who is looked for
            self._ended[path] = was[0]
        await self._want()
        await self._look()

    def _fronted(self, options: VmOptions) -> Vm | None:
        member = self._fleet.members.get(options.name)
        vm = member.vm if member is not None else None
        return vm if vm is not None and vm.options.qemu == options.qemu else None


def _listened(vm: Vm) -> bool:
    """Whether somebody listens at the VM's monitor, as far as the kernel tells."""
    try:
        return listens(vm.options.qemu.sun_path)
    except OSError:
        return False


def _identity(path: str) -> _Identity | None:
    """Which socket file it is; None where there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_ctime_ns) if stat.S_ISSOCK(status.st_mode) else None


def _base(pattern: str) -> str:
    """The directory in which the looking begins."""
    parts = pattern.split("/")[:-1]
    plain = next((at for at, part in enumerate(parts) if _WILD.search(part)), len(parts))
    return "/".join(parts[:plain]) or "/"


def _directories(pattern: str) -> Iterator[str]:
    """Those in which something could come or go that the pattern finds."""
    base = _base(pattern)  # what may not be looked at counts as not there, as os.path has it
    if not os.path.isdir(base):
        return
    yield base
    rest = pattern.removeprefix(base).lstrip("/").split("/")[:-1]
    for depth in range(1, len(rest) + 1):
        for found in glob.iglob("/".join(rest[:depth]), root_dir=base):
            if os.path.isdir(path := os.path.join(base, found)):
                yield path


def _sockets(watch: Watch) -> Iterator[tuple[str, _Identity]]:
    for directory in _directories(watch.pattern):
        try:
            entries = list(os.scandir(directory))
        except OSError:
            continue
        for entry in entries:
            if watch.matches(entry.path) and (identity := _identity(entry.path)) is not None:
                yield entry.path, identity
