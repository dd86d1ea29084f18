"""Which VMs are fronted: those that are wanted, each with a nursery and an end of its own.

A VM that is not wanted any more leaves when that harms nothing (`Vm.may_leave`); one that is wanted otherwise
is changed in place where that can be done, and else leaves and comes anew.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import trio

from refault.daemon.host.errors import OperatorError, operator_errors
from refault.daemon.host.own_needs import Troubles
from refault.daemon.host.paths import make_again, make_if_default
from refault.daemon.host.repeats import repeats
from refault.daemon.kernel.inotify import watched
from refault.daemon.options import VmOptions, changes_in_place
from refault.daemon.record.state_lock import StateLock, StateTaken
from refault.daemon.vm import Vm
from refault.daemon.wanted import judge

log = logging.getLogger("refault")

RETRY = (0.5, 2.0)
"""Seconds: the first and the longest pause before a VM is tried again that could not be fronted."""
START_PATIENCE = 5.0
"""Seconds that a start or a reload waits for what is new; it goes on to come after that."""
LEAVE_LOOK = 0.5
"""Seconds between two looks whether a VM may leave."""
NOT_WANTED = "it is wanted no more"
CHANGED = "it is configured otherwise: it comes anew"


class Member:
    """One VM that is wanted, or was."""

    def __init__(self, options: VmOptions, troubles: Troubles) -> None:
        self.name = options.name
        self.wanted: VmOptions | None = options
        self.vm: Vm | None = None
        """While it is fronted."""
        self._begins: VmOptions | None = None
        self._troubles = troubles
        self._news = trio.Event()
        self.settled = trio.Event()
        """Set when it is as it is wanted, or cannot be now."""

    @property
    def has(self) -> VmOptions | None:
        """Whose addresses it has, or is about to."""
        return self.vm.options if self.vm is not None else self._begins

    def want(self, options: VmOptions | None) -> None:
        """From now on it is to be like this, or to leave."""
        if options != self.wanted:
            self.wanted = options
            self.settled = trio.Event()
            self._news.set()

    async def run(self) -> None:
        """Fronts it for as long as it is wanted. What keeps it from that is told, and tried again."""
        pause, longest = RETRY
        while (options := self.wanted) is not None:
            self._news = trio.Event()
            self._begins = options
            made = False
            try:
                made = _make_state_dir(options)
                async with trio.open_nursery() as nursery:
                    await nursery.start(partial(self.front, wait=False), options)
                    self._troubles.over(self.name)
                    pause = RETRY[0]
            except Exception as error:
                self._begins = None
                expected = operator_errors(error)
                why = _why(error)
                self._troubles.add(self.name, f"{self.name}: not fronted: {why}")
                log.error(
                    "%s: not fronted: %s; trying again",
                    self.name,
                    why,
                    exc_info=None if expected else error,
                    extra=repeats((self.name, "fronted"), why),
                )
                self.settled.set()
                with trio.move_on_after(pause):
                    if len(expected) == 1 and isinstance(expected[0], StateTaken):
                        await self._news_or_change_of(StateLock(options.state_dir, self.name).path)
                    else:
                        await self._news.wait()
                pause = min(2 * pause, longest)
            if made:
                with contextlib.suppress(OSError):  # there may be something in it
                    options.state_dir.rmdir()
        self._troubles.over(self.name)

    async def _news_or_change_of(self, path: Path) -> None:
        with watched(str(path)) as changes:
            async with trio.open_nursery() as nursery:

                async def either(wait: Callable[[], Awaitable[object]]) -> None:
                    await wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(either, changes.wait)
                nursery.start_soon(either, self._news.wait)

    async def front(
        self,
        options: VmOptions,
        *,
        wait: bool = True,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Fronts it until it has left. Started when clients can come. `wait`: as for `StateLock.claim`.

        Raises OperatorError where another refault has it, or what ListenError says.
        """
        lock = StateLock(options.state_dir, options.name)
        need = f"{options.name}: state"
        await lock.claim(wait=wait)
        try:
            vm = Vm(options, lock)
            async with trio.open_nursery() as nursery:
                await nursery.start(vm.run)
                self.vm = vm
                await nursery.start(self._troubles.keep, need, lock.keep)
                at = ", ".join(map(str, vm.monitor.clients_come_to))
                log.info("%s: serving %s on %s", options.name, options.qemu, at)
                task_status.started()
                await self._until_left(vm)
                nursery.cancel_scope.cancel()
        finally:
            self.vm = None
            self._troubles.over(need)
            self._troubles.over(f"{options.name}: options")
            lock.release()

    async def _until_left(self, vm: Vm) -> None:
        done = True
        """Whether its options are as they were wanted."""
        while True:
            wanted = self.wanted
            if wanted is not None and changes_in_place(vm.options, wanted):
                vm.leaves(None)
                if wanted != vm.options or not done:
                    done = await self._change(vm, wanted)
                if self.wanted is wanted:
                    self.settled.set()
                with trio.move_on_after(math.inf if done else RETRY[1]):
                    await self._news.wait()
                self._news = trio.Event()
                continue
            leaving = NOT_WANTED if wanted is None else CHANGED
            if vm.leaving != leaving:
                log.info("%s: %s", self.name, leaving)
                if not vm.may_leave:
                    log.warning("%s: leaving when its migration has ended, which needs refault", self.name)
            vm.leaves(leaving)
            # What was so before QEMU was asked need not be so after it.
            if vm.may_leave and await self._prepared(vm) and vm.may_leave and self.wanted is wanted:
                vm.ends_soon()
                return
            if self.wanted is wanted:
                self.settled.set()
            with trio.move_on_after(LEAVE_LOOK):
                await self._news.wait()
            self._news = trio.Event()

    async def _prepared(self, vm: Vm) -> bool:
        try:
            if not await vm.prepare_to_stop():
                return False
            await vm.let_go_of_clients()  # no refault follows
            return True
        except Exception as error:
            log.error(
                "%s: internal error as it leaves; trying again",
                self.name,
                exc_info=error,
                extra=repeats((self.name, "leaves"), repr(error)),
            )
            return False

    async def _change(self, vm: Vm, options: VmOptions) -> bool:
        """Whether it is all as `options` say; else that is told, and is to be tried again."""
        need = f"{self.name}: options"
        try:
            await vm.change(options)
        except Exception as error:
            why = _why(error)
            self._troubles.add(need, f"{self.name}: {why}")
            log.error(
                "%s: %s; trying again",
                self.name,
                why,
                exc_info=None if operator_errors(error) else error,
                extra=repeats(need, why),
            )
            return False
        self._troubles.over(need)
        log.info("%s: its options have changed", self.name)
        return True


def _why(error: Exception) -> str:
    expected = operator_errors(error)
    return "; ".join(map(str, expected)) if expected else f"internal error: {error!r}"


def _make_state_dir(options: VmOptions) -> bool:
    """Makes the directory of a VM below that of all; whether it was not there. What comes to nothing is told
    by who writes there."""
    with contextlib.suppress(OperatorError):
        make_if_default(options.state_dir.parent)
    if os.path.exists(options.state_dir):
        return False
    make_again(options.state_dir)
    return True


class Fleet:
    """All members, by their names."""

    def __init__(self, troubles: Troubles) -> None:
        self.members: dict[str, Member] = {}
        self._troubles = troubles
        self._sources: dict[str, tuple[VmOptions, ...]] = {}
        self._expected: dict[str, tuple[str, VmOptions]] = {}
        """Those that are about to be wanted, and by what, by their names."""
        self._refused: dict[tuple[str, str], str] = {}
        self._nursery: trio.Nursery

    @property
    def vms(self) -> list[Vm]:
        """Those that are fronted now, in the order in which they came."""
        return [member.vm for member in self.members.values() if member.vm is not None]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs what is wanted, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def want(self, sources: Mapping[str, Sequence[VmOptions]]) -> None:
        """What each source wants from now on; sources that are not named want what they wanted.

        A VM whose name or address another has is left out, and said (`refault.daemon.wanted`). Returns when
        all is as it is wanted, or cannot be now, or takes long. Where it is cancelled, what is wanted is
        wanted.
        """
        before = [options for source in sources for options in self._sources.get(source, ())]
        self._sources.update({source: tuple(vms) for source, vms in sources.items()})
        names = {options.name for vms in (before, *sources.values()) for options in vms}
        self._apply()
        with trio.move_on_after(START_PATIENCE):
            while unsettled := [each for each in self._of(names) if not each.settled.is_set()]:
                await unsettled[0].settled.wait()

    def why_not(self, source: str, options: VmOptions) -> str | None:
        """Why one more VM of this source would not be fronted; None where it would."""
        sources = self._with_expected()
        verdict = judge({**sources, source: (*sources.get(source, ()), options)}, self._held())
        return {**verdict.refused, **verdict.waiting}.get((source, options.name))

    @property
    def refuses(self) -> bool:
        """Whether a VM is left out for what another has, or is expected to have."""
        return bool(self._refused)

    @contextlib.contextmanager
    def expects(self, source: str, options: VmOptions) -> Iterator[None]:
        """One that may be wanted by `source` soon: meanwhile nobody else gets its name or addresses."""
        self._expected[options.name] = source, options
        try:
            yield
        finally:
            del self._expected[options.name]

    def _with_expected(self) -> dict[str, tuple[VmOptions, ...]]:
        sources = dict(self._sources)
        for name, (source, options) in self._expected.items():
            wanted = sources.get(source, ())
            if all(vm.name != name for vm in wanted):
                sources[source] = (*wanted, options)
        return sources

    def _held(self) -> dict[str, VmOptions]:
        held = {name: member.has for name, member in self.members.items()}
        return {name: has for name, has in held.items() if has is not None}

    def _apply(self) -> None:
        """Has each VM be as it is wanted, as far as its name and addresses are not another's."""
        verdict = judge(self._with_expected(), self._held())
        self._tell({**verdict.refused, **verdict.waiting})
        wanted = {(source, vm.name) for source, vms in self._sources.items() for vm in vms}
        for name, member in self.members.items():
            member.want(verdict.wanted.get(name))
        for name, options in verdict.wanted.items():
            expected, _ = self._expected.get(name, (None, options))
            if name not in self.members and (expected is None or (expected, name) in wanted):
                self._start(options)

    def _of(self, names: Collection[str]) -> list[Member]:
        return [member for name, member in self.members.items() if name in names]

    def _start(self, options: VmOptions) -> None:
        member = self.members[options.name] = Member(options, self._troubles)
        self._nursery.start_soon(self._run, member)

    def forget(self, sources: Iterable[str]) -> None:
        """These sources want nothing any more, with the next `want`."""
        for source in sources:
            self._sources.pop(source, None)

    async def _run(self, member: Member) -> None:
        try:
            await member.run()
        except Exception:  # it is that VM's trouble alone
            log.exception("%s: internal error: not fronted for %g s", member.name, RETRY[1])
            await trio.sleep(RETRY[1])
        finally:
            del self.members[member.name]
            member.settled.set()
        self._apply()  # it may be wanted again by now, and others want what it had

    def _tell(self, refused: Mapping[tuple[str, str], str]) -> None:
        """Of VMs that are left out."""
        for need in self._refused.keys() - refused.keys():
            self._troubles.over(" ".join(need))
        for (source, name), why in refused.items():
            text = f"{name} of {source}: not fronted: {why}"
            self._troubles.add(f"{source} {name}", text)
            if self._refused.get((source, name)) != why:
                log.error("%s", text)
        self._refused = dict(refused)
