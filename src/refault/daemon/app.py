"""The daemon: one VM, or all of a host's, served until a signal ends it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial

import trio

from refault.daemon.finder import Finders
from refault.daemon.fleet import Fleet, Member
from refault.daemon.hand_overs import HandOvers
from refault.daemon.host import handed
from refault.daemon.host.descriptors import raise_limit, why_few
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.log import level_of, lines_dropped, set_level
from refault.daemon.host.notify import Notifier
from refault.daemon.host.own_needs import Troubles
from refault.daemon.host.repeats import repeats
from refault.daemon.kept.taken import end_unclaimed
from refault.daemon.options import Configuration, HostOptions
from refault.daemon.telling.control import serve_control
from refault.daemon.telling.picture import picture
from refault.daemon.telling.snapshot import Status, VmStatus
from refault.daemon.vm import Vm

log = logging.getLogger("refault")

PICTURE_PATIENCE = 1.0
SLICE = 4
"""VMs of which pictures are made in one go: what clients of others wait for."""
CONFIGURED = "the configuration"
METRICS = "refault.daemon.telling.metrics"
STOP_PATIENCE = 60.0
"""Seconds that a stop may take where it would harm a guest; after that it happens all the same."""
PHASE_PATIENCE = 2.0
EXTENSION = 15.0
STOP_POLL = 0.05


CLAIMED_WITHIN = 60.0
"""Seconds from the start, in which VMs come for what the service manager has kept of their connections."""
RESTARTS = signal.SIGUSR2
"""Another refault follows: what QEMU holds for us is left to it."""
_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, RESTARTS)
_NOT_FOR_US = frozenset(
    {
        signal.SIGHUP,  # a terminal that closed, a habit of log rotation
        signal.SIGTSTP,  # a stopped refault is a lost channel
        signal.SIGUSR1,
        signal.SIGALRM,
        signal.SIGVTALRM,
        signal.SIGPROF,
        signal.SIGIO,
        signal.SIGPWR,
        signal.SIGSTKFLT,
        *(number for number in signal.valid_signals() if number >= signal.SIGRTMIN),
    }
)
"""Signals whose default is the end, or to stand still, without care for any guest."""


class Publisher:
    """Makes pictures of all VMs, for readers in any thread."""

    def __init__(self, vms: Callable[[], Sequence[Vm]], troubles: Troubles) -> None:
        self._vms = vms
        self._troubles = troubles
        self._token = trio.lowlevel.current_trio_token()
        self._status = Status(vms=())
        self.publish()

    def publish(self) -> Status:
        """Makes new pictures, or keeps a VM's last where that fails; call it in the trio thread."""
        for _ in self.slices():
            pass
        return self._status

    @property
    def last(self) -> Status:
        """The pictures that were made last."""
        return self._status

    def slices(self) -> Iterator[None]:
        """The same as `publish`, a few VMs at a time."""
        last = {vm.name: vm for vm in self._status.vms}
        told = []
        for at, vm in enumerate(self._vms(), 1):
            told.append(self._of(vm, last.get(vm.name)))
            if at % SLICE == 0:
                yield
        few = why_few()
        self._status = Status(
            log_lines_dropped=lines_dropped(),
            troubles=(*self._troubles.tell(), *((f"refault: {few}",) if few is not None else ())),
            vms=tuple(status for status in told if status is not None),
        )

    @staticmethod
    def _of(vm: Vm, last: VmStatus | None) -> VmStatus | None:
        try:
            return picture(vm)
        except Exception as error:  # a picture is not worth the end of every leg
            log.exception(
                "%s: internal error in the status: the last one is told",
                vm.name,
                extra=repeats((vm.name, "status"), repr(error)),
            )
            return last

    def status(self) -> Status:
        """A new picture, or the last one where the event loop is busy; from any other thread."""
        made = threading.Event()

        def make() -> None:
            self.publish()
            made.set()

        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(make)
            made.wait(PICTURE_PATIENCE)
        return self._status


class _Services:
    """What the daemon itself serves, each at one address at a time."""

    def __init__(self, name: str, troubles: Troubles) -> None:
        self._name = name
        self._troubles = troubles
        self._running: dict[str, tuple[object, trio.CancelScope, trio.Event]] = {}
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs them, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def set(self, what: str, where: object, serve: Callable[..., Awaitable[object]] | None) -> None:
        """Has `what` served by `serve`, if it was not at the same place already; None: not at all."""
        need = f"{self._name}: {what}"
        if what in self._running:
            last, scope, ended = self._running[what]
            if last == where:
                return
            scope.cancel()
            await ended.wait()
            self._troubles.over(need)
            del self._running[what]
        if serve is not None:
            self._running[what] = where, trio.CancelScope(), trio.Event()
            await self._nursery.start(self._keep, what, need, serve)

    async def _keep(
        self,
        what: str,
        need: str,
        serve: Callable[..., Awaitable[object]],
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        _, scope, ended = self._running[what]
        try:
            with scope:
                await self._troubles.keep(need, serve, task_status=task_status)
        finally:
            ended.set()


async def serve(wanted: Configuration, name: str, reload: Callable[[], Configuration] | None = None) -> None:
    """Serves until SIGTERM, SIGINT or SIGQUIT; `name` is what its own lines of the log begin with.

    With `reload`, which raises OperatorError, SIGHUP has it called, and what it returns is wanted from then
    on; a VM that cannot be fronted is told, and tried again. Without, the one VM is the daemon's purpose:
    raises OperatorError where clients or QEMU cannot be listened to, or another refault has the VM's state.
    What else cannot be had is told, and tried again.
    """
    raise_limit()
    handed.adopt()
    for number in (signal.SIGTTIN, signal.SIGTTOU):  # a terminal that it is in the background of
        signal.signal(number, signal.SIG_IGN)
    not_for_us = _NOT_FOR_US - ({signal.SIGHUP} if reload is not None else set())
    with (
        trio.open_signal_receiver(*_ENDS) as ends,
        trio.open_signal_receiver(*not_for_us) as others,
    ):
        if reload is None:
            await _serve(wanted, name, ends, others)
            return
        with trio.open_signal_receiver(signal.SIGHUP) as reloads:
            await _serve_host(wanted, name, reload, reloads, ends, others)


async def _serve(
    wanted: Configuration, name: str, ends: AsyncIterator[int], others: AsyncIterator[int]
) -> None:
    [options] = wanted.vms
    troubles, notifier = Troubles(), Notifier()
    member = Member(options, troubles)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_say_not_for_us, name, others)
        nursery.start_soon(_end_unclaimed, name)
        nursery.start_soon(notifier.keep_watchdog)
        await nursery.start(member.front, options)
        vms = partial(_fronted, [member])
        services = _Services(name, troubles)
        await nursery.start(services.run)
        await _set_services(services, wanted.host, Publisher(vms, troubles))
        notifier.ready(f"serving {options.qemu}")
        restarts = await _until_end(name, ends, notifier)
        await _stop(vms, ends, notifier, nursery.cancel_scope, restarts=restarts)


async def _serve_host(
    wanted: Configuration,
    name: str,
    reload: Callable[[], Configuration],
    reloads: AsyncIterator[int],
    ends: AsyncIterator[int],
    others: AsyncIterator[int],
) -> None:
    troubles, notifier = Troubles(), Notifier()
    fleet = Fleet(troubles)
    finders = Finders(fleet, troubles)
    hand_overs = HandOvers(fleet)
    services = _Services(name, troubles)

    async def apply(wanted: Configuration) -> None:
        set_level(level_of(wanted.log_level))
        await _set_services(services, wanted.host, publisher)
        await fleet.want({CONFIGURED: wanted.vms})
        await finders.watch(wanted.watches)
        take = partial(hand_overs.serve, wanted.handed) if wanted.handed is not None else None
        await services.set("hand-overs", wanted.handed, take)
        notifier.ready(f"serving {len(fleet.vms)} VMs")

    def tell_internal(error: Exception, at: str) -> None:
        log.error("%s: internal error in the configuration, %s; all goes on", name, at, exc_info=error)
        troubles.add(CONFIGURED, f"{name}: internal error in the configuration, {at}: {error!r}")
        notifier.ready("internal error: see the log")

    async def follow() -> None:
        await apply(wanted)
        log.info("%s: serving %d VMs", name, len(fleet.vms))
        importlib.import_module(METRICS)  # while it is of the same release as what runs
        async for _ in reloads:
            notifier.reloading()
            log.info("%s: SIGHUP, reading the configuration anew", name)
            try:
                now = await trio.to_thread.run_sync(reload, abandon_on_cancel=True)
            except OperatorError as error:
                why = "; ".join(str(error).splitlines())
                log.error("%s: the configuration is wrong, so nothing is changed: %s", name, why)
                troubles.add(CONFIGURED, f"{name}: the configuration is wrong, and the last one holds: {why}")
                notifier.ready("the configuration is wrong: see the log")
                continue
            except Exception as error:  # the legs of all VMs are worth more than a reload
                tell_internal(error, "reading it")
                continue
            troubles.over(CONFIGURED)
            try:
                await apply(now)
            except Exception as error:
                tell_internal(error, "applying it")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_say_not_for_us, name, others)
        nursery.start_soon(_end_unclaimed, name)
        await nursery.start(fleet.run)
        await nursery.start(hand_overs.run)
        await nursery.start(services.run)
        publisher = Publisher(lambda: fleet.vms, troubles)
        nursery.start_soon(notifier.keep_watchdog)
        async with trio.open_nursery() as following:
            await following.start(finders.run)
            following.start_soon(follow)
            restarts = await _until_end(name, ends, notifier)
            following.cancel_scope.cancel()
        await services.set("hand-overs", None, None)  # what starts now is not to end with this one
        await _stop(lambda: fleet.vms, ends, notifier, nursery.cancel_scope, restarts=restarts)


def _fronted(members: Sequence[Member]) -> list[Vm]:
    return [member.vm for member in members if member.vm is not None]


async def _set_services(services: _Services, host: HostOptions, publisher: Publisher) -> None:
    control = partial(serve_control, host.control, lambda: publisher.last, publisher.slices)
    await services.set("control socket", host.control, control)
    metrics = None
    if host.metrics is not None:
        from refault.daemon.telling.metrics import serve_metrics  # what is not needed delays a restart

        metrics = partial(serve_metrics, host.metrics, publisher.status)
    await services.set("metrics", host.metrics, metrics)


async def _until_end(name: str, ends: AsyncIterator[int], notifier: Notifier) -> bool:
    """Whether another refault is to follow."""
    async for number in ends:
        restarts = number == RESTARTS
        log.info(
            "%s: %s, ending%s", name, signal.Signals(number).name, " for the next refault" if restarts else ""
        )
        notifier.stopping("ending")
        return restarts
    return False


async def _stop(
    vms: Callable[[], Sequence[Vm]],
    ends: AsyncIterator[int],
    notifier: Notifier,
    all_of_it: trio.CancelScope,
    *,
    restarts: bool = False,
) -> None:
    """Cancels all when all VMs may end in the same moment, or after a time, or at a second signal. What QEMUs
    hold of their clients' connections they keep where refault `restarts`.
    """
    with trio.move_on_after(STOP_PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_second_signal, ends, nursery.cancel_scope)
            nursery.start_soon(_ask_for_time, notifier)
            while True:
                asked = list(vms())
                for vm in asked:
                    vm.ends_soon()
                async with trio.open_nursery() as stopping:
                    for vm in asked:
                        stopping.start_soon(partial(_until_stopping_is_safe, vm, restarts=restarts))
                # While one was waited for, another may have come to where its end does harm.
                if all(vm in asked and vm.safe_now for vm in vms()):
                    break
                await trio.sleep(STOP_POLL)
            nursery.cancel_scope.cancel()
    if restarts:
        for vm in vms():
            vm.hand_over()
    all_of_it.cancel()


async def _end_unclaimed(name: str) -> None:
    """What nobody comes for holds a QEMU's monitor, and keeps clients waiting."""
    await trio.sleep(CLAIMED_WITHIN)
    if ended := end_unclaimed():
        log.warning(
            "%s: the service manager held %d connections and listeners of which there is no record: they are"
            " ended, and those clients disconnected",
            name,
            ended,
        )


async def _say_not_for_us(name: str, signals: AsyncIterator[int]) -> None:
    async for number in signals:
        said = signal.strsignal(number) or "?"
        log.warning(
            "%s: signal %d (%s) is nothing that refault knows: it goes on, and SIGTERM ends it",
            name,
            number,
            said,
            extra=repeats((name, "signal"), number),
        )


async def _second_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


async def _until_stopping_is_safe(vm: Vm, *, restarts: bool) -> None:
    """Waits while our end would kill or double a guest (migration/legs.py)."""
    # Switchover, handshake and completion are short where all goes well.
    with trio.move_on_after(PHASE_PATIENCE):
        while not vm.may_stop:  # noqa: ASYNC110 - nothing tells of it
            await trio.sleep(STOP_POLL)
    while not await _prepared_to_stop(vm, restarts=restarts):
        log.warning(
            "%s: not ending yet: a leg may not be closed now, and QEMU does not hold it; a second signal"
            " ends refault all the same",
            vm.name,
        )
        await trio.sleep(1)
    if not restarts:
        await vm.let_go_of_clients()


async def _prepared_to_stop(vm: Vm, *, restarts: bool) -> bool:
    try:
        return await vm.prepare_to_stop(restarts=restarts)
    except Exception:  # the others are to end without harm all the same
        log.exception("%s: internal error before the end", vm.name)
        return False


async def _ask_for_time(notifier: Notifier) -> None:
    """QEMU may take long over each answer."""
    while True:
        notifier.extend_timeout(EXTENSION)
        await trio.sleep(EXTENSION / 3)
