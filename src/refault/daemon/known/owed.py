"""What refault owes its QEMU: a parameter that it has set is to be as it was, and a connection whose place it
has taken is to be closed. Both are on record before it comes to that, so that the next refault sees to it.

The parameter is `tls-hostname`. A QEMU that is told none takes the host of a `tcp:` address for the name in
the other host's certificate (migration/socket.c, migration/tls.c); it is given an address of ours, so it is
told the name. Clients see nothing of that.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

import msgspec
import trio

from refault.daemon.kernel.process import may_be_same
from refault.daemon.monitor.keeper import RELEASE_TIMEOUT
from refault.daemon.monitor.monitor import Forward, MonitorLost, QmpError, words
from refault.daemon.record.owed_file import OwedFile, OwedRecord
from refault.qmp.replies import is_error

if TYPE_CHECKING:
    from refault.daemon.monitor.monitor import Monitor

log = logging.getLogger("refault.migration")

PAID_WITHIN = 5.0
_NAME = "tls-hostname"
_TRIES = 3
_PAUSES = (1.0, 60.0)
"""Seconds between a try to set it back and the next: the first, and the longest of those that double."""


class Owed:
    """To the QEMU behind one monitor. `start_soon` runs a task for as long as the VM is served."""

    def __init__(
        self,
        name: str,
        monitor: Callable[[], Monitor],
        file: OwedFile,
        start_soon: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        self._vm = name
        self._monitor = monitor
        self._file = file
        self._start_soon = start_soon
        self._now = OwedRecord(qemu_pid=None, qemu_started=None)
        self._owner: object = None
        """Whose the name is; None: an earlier refault's, or nobody's."""
        self._needed = False
        """Whether a migration may need it yet; else it is to be set back, and what clients set passes."""
        self._hidden = ""
        """The name that clients are not shown, as long as none of them has set one."""
        self._asking = False
        """Whether a task tries to set it back."""
        self._turn = trio.Lock()

    def met(self, pid: int | None, started: int | None) -> None:
        """A QEMU was connected to, the process `pid`."""
        if not may_be_same((self._now.qemu_pid, self._now.qemu_started), (pid, started)):
            self._now, self._owner = self._file.load(pid, started), None
            self._hidden, self._needed = self._now.tls_hostname, True
        if started is not None:  # it may not have been told before
            self._now = msgspec.structs.replace(self._now, qemu_started=started)

    def over(self) -> None:
        """That QEMU has ended."""
        self._hidden = ""
        if self._now.anything:
            self._change(tls_hostname="", descriptors=())

    async def pay(self) -> None:
        """Has QEMU close what it is to close."""
        for name in self._now.descriptors:
            await self.close(name)

    async def pay_all(self) -> None:
        """No refault follows, or not at once: what it does not answer for in time stays on record."""
        with trio.move_on_after(RELEASE_TIMEOUT):
            await self.pay()
            await self.put_back(self._owner)

    def _change(self, **changed: object) -> None:
        self._now = msgspec.structs.replace(self._now, **changed)
        self._file.save(self._now)

    # ---- connections that clients have passed ----

    def will_close(self, name: str) -> None:
        """QEMU is about to be told of another connection in place of this one."""
        self._change(descriptors=(*self._now.descriptors, name))

    def keeps(self, name: str) -> None:
        """It was not told."""
        self._change(descriptors=tuple(each for each in self._now.descriptors if each != name))

    async def close(self, name: str) -> None:
        """Has QEMU close one. Where it does not answer that is done when it is connected to again."""
        monitor = self._monitor()
        monitor.passed.forget(name)
        try:
            await monitor.execute("closefd", {"fdname": name}, timeout=PAID_WITHIN)
        except QmpError as error:
            log.debug("%s: QEMU has closed %s already: %s", self._vm, name, error)
        except (MonitorLost, trio.TooSlowError):
            return
        self.keeps(name)

    # ---- the name of the other host ----

    @property
    def tls_hostname(self) -> str:
        """The name that refault has set; empty: none."""
        return self._now.tls_hostname

    async def name_other_host(self, owner: object, name: str) -> None:
        """Sets it where the client has set none, for a migration of `owner`'s. Raises what `execute` raises;
        then it is to be put back all the same."""
        async with self._turn:
            if self._owner is owner and self.tls_hostname == name:
                return
            if self.tls_hostname not in ("", name):
                await self._unset()
            self._owner, self._needed, self._hidden = owner, True, name
            self._change(tls_hostname=name)
            await self._set(name)

    async def put_back(self, owner: object = None) -> None:
        """It is as the client had it, unless it is set for another owner by now. A QEMU that does not do it
        at once is asked again from a task."""
        async with self._turn:
            if not self.tls_hostname or self._owner not in (None, owner):
                return
            self._owner, self._needed = None, False
            try:
                await self._unset()
            except MonitorLost:
                pass  # whoever is connected to it next
            except (QmpError, trio.TooSlowError) as error:
                told = "%s: QEMU keeps %s %s, which refault has set: %s; asking again"
                log.warning(told, self._vm, _NAME, self._hidden, words(error))
                self._start_soon(self._ask_again)

    async def _ask_again(self) -> None:
        """Until it is as it was, a migration needs it anew, or the monitor is lost."""
        if self._asking:
            return
        self._asking = True
        try:
            pause, longest = _PAUSES
            while True:
                await trio.sleep(pause)
                async with self._turn:
                    if not self.tls_hostname or self._needed:
                        return
                    try:
                        await self._unset()
                    except MonitorLost:
                        return  # whoever is connected to it next
                    except (QmpError, trio.TooSlowError) as error:
                        log.debug("%s: QEMU keeps %s yet: %s", self._vm, _NAME, words(error))
                    else:
                        log.info("%s: QEMU has %s as it was", self._vm, _NAME)
                        return
                pause = min(pause * 2, longest)
        finally:
            self._asking = False

    async def _unset(self) -> None:
        """Once more where a client's command was on its way that kept it (`set_by_client`)."""
        for _ in range(_TRIES):
            parameters = await self._monitor().execute("query-migrate-parameters", timeout=PAID_WITHIN)
            if not self.tls_hostname:
                return  # what is set by now is a client's
            if not isinstance(parameters, Mapping) or parameters.get(_NAME) != self.tls_hostname:
                break
            await self._set("")
        self._forget_name()

    def _forget_name(self) -> None:
        """What is set is no name of refault's."""
        self._hidden = ""
        self._change(tls_hostname="")

    async def _set(self, name: str) -> None:
        await self._monitor().execute("migrate-set-parameters", {_NAME: name}, timeout=PAID_WITHIN)

    def set_by_client(self, arguments: Mapping[str, object]) -> Forward:
        """What becomes of a client's `migrate-set-parameters`: while a migration needs the name, none is what
        a client may go on to want."""
        if _NAME not in arguments or not self._hidden:
            return Forward()
        none = arguments[_NAME] in ("", None)
        if none and self._needed:
            return Forward({**arguments, _NAME: self.tls_hostname})

        def watch(reply: bytes) -> bytes:
            if not is_error(reply) and not (none and self._needed):  # a migration may have set it after that
                self._forget_name()
            return reply

        return Forward(on_reply=watch)

    def hide(self, reply: bytes) -> bytes:
        """What a client is shown of `query-migrate-parameters`."""
        if not self._hidden:
            return reply
        decoded = msgspec.json.decode(reply)
        match decoded:
            case {"return": {"tls-hostname": self._hidden} as parameters}:
                return msgspec.json.encode({**decoded, "return": {**parameters, _NAME: ""}})
        return reply
