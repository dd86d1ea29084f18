"""The descriptors that are laid with a destination QEMU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from refault.daemon.near.local import Deposits


class Qemu:
    """Takes descriptors; the migration ends while it takes the second one, our end of the first pair."""

    name = "vm1"

    def __init__(self, deposits: Deposits) -> None:
        self.deposits = deposits
        self.known: list[object] = []
        self.ours: list[int] = []

    async def execute(
        self, command: str, arguments: Any = None, *, fd: int | None = None, **_: Any
    ) -> object:
        name = arguments["fdname"]
        if command == "closefd":
            self.known.remove(name)
            return {}
        self.known.append(name)
        if len(self.known) == 2 and not self.ours:
            self.ours.append(fd or 0)
            await self.deposits.drain(self)
        return {}


async def test_what_is_laid_while_the_migration_ends_is_closed_at_both_ends() -> None:
    deposits = Deposits()
    qemu = Qemu(deposits)
    await deposits.fill(qemu)
    assert deposits.take() is None
    assert len(qemu.ours) == 1
    assert qemu.known == []
    await deposits.fill(qemu)
    assert deposits.take() is None


async def test_all_that_were_laid_are_closed_at_the_end() -> None:
    deposits = Deposits()
    qemu = Qemu(Deposits())
    await deposits.fill(qemu)
    assert len(qemu.known) == 2 * Deposits.WANTED
    await deposits.drain(qemu)
    assert qemu.known == []
    assert deposits.take() is None


NAMES = """
import os, socket, trio
os.getpid = lambda: 1
from refault.daemon.near.local import give_back, hand_connection
class Qemu:
    name = "vm1"
    async def execute(self, command, arguments=None, **_):
        print(arguments["fdname"])
async def main():
    for _ in range(2):
        await hand_connection(Qemu(), 0)
        await give_back(Qemu(), socket.socket())
trio.run(main)
"""


def test_no_name_is_used_twice_with_a_qemu_though_every_refault_has_the_same_pid() -> None:
    """As in a container. A getfd of the same name would close what QEMU keeps from the last one."""
    said = [
        subprocess.run([sys.executable, "-c", NAMES], capture_output=True, check=True).stdout for _ in "12"
    ]
    names = b"".join(said).split()
    assert len(set(names)) == len(names) == 8
    assert all(name.startswith(b"refault-") and len(name.rpartition(b"-")[2]) == 16 for name in names)
