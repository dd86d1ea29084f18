"""The daemon: one VM served until a signal ends it."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator
from functools import partial

import trio

from refault.daemon.host.log import lines_dropped
from refault.daemon.host.notify import Notifier
from refault.daemon.host.own_needs import Troubles
from refault.daemon.host.repeats import repeats
from refault.daemon.options import RunOptions
from refault.daemon.record.state_lock import StateLock
from refault.daemon.telling.control import serve_control
from refault.daemon.telling.picture import picture
from refault.daemon.telling.snapshot import Status
from refault.daemon.vm import Vm

log = logging.getLogger("refault")

PUBLISH_INTERVAL = 0.5
STOP_PATIENCE = 60.0
"""Seconds that a stop may take where it would harm a guest; after that it happens all the same."""
PHASE_PATIENCE = 2.0
EXTENSION = 15.0
STOP_POLL = 0.05


_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_NOT_FOR_US = frozenset(
    {
        signal.SIGHUP,  # a terminal that closed, a habit of log rotation
        signal.SIGTSTP,  # a stopped refault is a lost channel
        signal.SIGUSR1,
        signal.SIGUSR2,
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
    """Holds the last picture of all VMs, for readers in any thread."""

    def __init__(self, vms: list[Vm], troubles: Troubles) -> None:
        self._vms = vms
        self._troubles = troubles
        self._status = Status(vms=())
        self.publish()

    def publish(self) -> Status:
        """Makes a new picture, or keeps the last where that fails; call it in the trio thread."""
        try:
            vms = self._vms
            self._status = Status(
                log_lines_dropped=lines_dropped(),
                troubles=self._troubles.tell(),
                vms=tuple(picture(vm) for vm in vms),
            )
        except Exception as error:  # a picture is not worth the end of every leg
            log.exception(
                "internal error in the status: the last one is told", extra=repeats("status", repr(error))
            )
        return self._status

    def status(self) -> Status:
        """The last picture; from any thread."""
        return self._status

    async def run(self) -> None:
        """Publishes at intervals until cancelled."""
        while True:
            self.publish()
            await trio.sleep(PUBLISH_INTERVAL)


async def serve(options: RunOptions) -> None:
    """Serves until SIGTERM, SIGINT or SIGQUIT.

    Raises OperatorError where clients or QEMU cannot be listened to, or another refault has the VM's state.
    What else cannot be had is told, and tried again.
    """
    for number in (signal.SIGTTIN, signal.SIGTTOU):  # a terminal that it is in the background of
        signal.signal(number, signal.SIG_IGN)
    with trio.open_signal_receiver(*_ENDS) as ends, trio.open_signal_receiver(*_NOT_FOR_US) as others:
        lock = StateLock(options.state_dir, options.name)
        await lock.claim()
        try:
            await _serve(options, lock, ends, others)
        finally:
            lock.release()


async def _serve(
    options: RunOptions, lock: StateLock, ends: AsyncIterator[int], others: AsyncIterator[int]
) -> None:
    vm = Vm(options, lock)
    troubles = Troubles()
    publisher = Publisher([vm], troubles)
    notifier = Notifier()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_say_not_for_us, options.name, others)
        await nursery.start(vm.run)
        await nursery.start(troubles.keep, f"{options.name}: state", lock.keep)
        control = partial(serve_control, options.control, publisher.publish)
        await nursery.start(troubles.keep, f"{options.name}: control socket", control)
        if options.metrics is not None:
            from refault.daemon.telling.metrics import serve_metrics  # what is not needed delays a restart

            metrics = partial(serve_metrics, options.metrics, publisher.status)
            nursery.start_soon(troubles.keep, f"{options.name}: metrics", metrics)
        nursery.start_soon(publisher.run)
        notifier.ready(f"serving {options.qemu}")
        at = ", ".join(map(str, vm.monitor.clients_come_to))
        log.info("%s: serving %s on %s", options.name, options.qemu, at)
        async for number in ends:
            log.info("%s: %s, ending", options.name, signal.Signals(number).name)
            notifier.stopping("ending")
            break
        vm.stopping = True
        with trio.move_on_after(STOP_PATIENCE):
            nursery.start_soon(_second_signal, ends, nursery.cancel_scope)
            await _until_stopping_is_safe(vm, notifier)
        nursery.cancel_scope.cancel()


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


async def _until_stopping_is_safe(vm: Vm, notifier: Notifier) -> None:
    """Waits while our end would kill or double a guest (migration/legs.py); a second signal ends it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_ask_for_time, notifier)
        # Switchover, handshake and completion are short where all goes well.
        with trio.move_on_after(PHASE_PATIENCE):
            while not vm.may_stop:  # noqa: ASYNC110 - nothing tells of it
                await trio.sleep(STOP_POLL)
        while not await vm.prepare_to_stop():
            log.warning(
                "%s: not ending yet: a leg may not be closed now, and QEMU does not hold it; a second signal"
                " ends refault all the same",
                vm.name,
            )
            await trio.sleep(1)
        nursery.cancel_scope.cancel()


async def _ask_for_time(notifier: Notifier) -> None:
    """QEMU may take long over each answer."""
    while True:
        notifier.extend_timeout(EXTENSION)
        await trio.sleep(EXTENSION / 3)
