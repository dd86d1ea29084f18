"""A client that asks for the migration's status throughout, as libvirt does: nothing that befalls refault may
reach it."""

from __future__ import annotations

import math

import trio

from refault.lab import qmp_client
from refault.lab.qemu import Qemu
from refault.lab.qmp_client import QmpClosed, QmpError

_PACE = 0.05
_ENDS = 5.0  # seconds within which a QEMU has ended whose connection has
_ANSWERED = 30.0  # seconds within which one is answered whose QEMU answers others


class Steady:
    """At the refault of `qemu`. `noticed`: what it saw that a client of QEMU's own would not."""

    def __init__(self, qemu: Qemu) -> None:
        self.noticed: list[str] = []
        self._qemu = qemu
        self._answers = 0
        self._asks = True
        """Whether it does yet."""

    async def run(self, address: str) -> None:
        """Connects once, and asks until it is cancelled. A destination whose main thread waits for a page
        answers when the page comes; `settle` tells of an answer that never does."""
        try:
            async with qmp_client.connect(address, name=self._qemu.name) as client:
                while not client.unasked:
                    await client.execute("query-migrate", timeout=math.inf)
                    self._answers += 1
                    await trio.sleep(_PACE)
            self._say(f"a reply twice, after {self._answers}")
        except QmpError as error:
            self._say(str(error))
        except QmpClosed:
            with trio.move_on_after(_ENDS):
                await self._qemu.process.wait()
                return
            self._say(f"disconnected after {self._answers} answers")
        finally:
            self._asks = False

    async def settle(self) -> None:
        """The migration is over: waits until it is answered, where QEMU answers whoever asks without refault
        between."""
        try:
            await self._qemu.qmp.execute("query-migrate")
        except (QmpError, QmpClosed, trio.TooSlowError):
            return
        before = self._answers
        with trio.move_on_after(_ANSWERED):
            while self._asks and self._answers < before + 1:
                await trio.sleep(_PACE)
            return
        self._say(f"no answer after {before}, though QEMU gives one")

    def _say(self, text: str) -> None:
        self.noticed.append(f"the client at the {self._qemu.name}: {text}")
