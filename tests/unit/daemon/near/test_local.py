"""The descriptors that are laid with a destination QEMU."""

from __future__ import annotations

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
