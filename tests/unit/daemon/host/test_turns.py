"""Who floods, a client or QEMU, has a part of the event loop and no more."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from refault.daemon.host import turns as turns_
from refault.daemon.host.turns import (
    AT_WORK,
    BURST,
    COMING,
    LONGEST_WAIT,
    SHARE,
    SHARE_BESIDE_OTHERS,
    Turns,
)
from refault.daemon.monitor import clients
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.monitor import Monitor
from refault.qmp.splitter import BATCH

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""},'
    b' "capabilities": []}}\r\n'
)
FLOOD = 1000


def has_used(
    monkeypatch: pytest.MonkeyPatch,
    used: Callable[[], float],
    clock: Callable[[], float] | None = None,
) -> None:
    """So many seconds has the loop used; so late is it by the `clock`, or the same."""
    monkeypatch.setattr(time, "thread_time", used)
    monkeypatch.setattr(turns_, "_clock", clock or used)


@pytest.mark.parametrize("others", [0.0, 0.004])
async def test_a_flood_has_its_share_and_what_is_no_flood_waits_for_nothing(
    others: float, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    used = 0.0
    has_used(monkeypatch, lambda: used)
    turns, began = Turns("vm"), trio.current_time()
    for _ in range(100):
        turn = turns.begin()
        used += 0.001
        await turns.end(turn, more=True)
        await trio.sleep(others)
    took = trio.current_time() - began
    assert took == pytest.approx(100 * others or (0.1 - BURST) / SHARE)


async def test_nobody_pays_for_a_core_that_the_loop_has_waited_for(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Nor for what others have used since."""
    used = clock = 0.0
    has_used(monkeypatch, lambda: used, lambda: clock)
    turns, began = Turns("vm"), trio.current_time()
    await turns.end(turns.begin(), more=False)
    for waited, others in ((1.0, 0.0), (0.0, 1.0)):
        used += others
        turn = turns.begin()
        used += BURST / 3
        clock += BURST / 3 + waited
        await turns.end(turn, more=False)
    assert trio.current_time() == began


async def test_nobody_waits_for_long_for_what_those_had_who_have_left(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Each client that comes begins with a turn, and may be gone before it would have to wait."""
    used = 0.0
    has_used(monkeypatch, lambda: used)
    turns = Turns("vm")
    for _ in range(1000):
        turn = turns.begin()
        used += 0.01
        with trio.CancelScope() as scope:
            scope.cancel()
            await turns.end(turn, more=True)
    began = trio.current_time()
    await turns.end(turns.begin(), more=False)
    assert trio.current_time() - began <= LONGEST_WAIT


async def test_a_flood_has_less_while_others_have_turns(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    used = 0.0
    has_used(monkeypatch, lambda: used)
    turns, others = Turns("vm"), Turns("other")

    async def flood(count: int) -> float:
        nonlocal used
        began = trio.current_time()
        for _ in range(count):
            turn = turns.begin()
            used += 0.001
            await turns.end(turn, more=True)
        return trio.current_time() - began

    await flood(100)
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            while True:
                await others.end(others.begin(), more=False)
                await trio.sleep(AT_WORK / 2)

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert await flood(100) == pytest.approx(0.1 / SHARE_BESIDE_OTHERS, rel=0.01)
        nursery.cancel_scope.cancel()
    await trio.sleep(AT_WORK)
    assert await flood(100) <= 0.1 / SHARE


async def test_what_others_interrupt_waits_for_nothing_and_is_paid_for_before_the_next(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    used = 0.0
    has_used(monkeypatch, lambda: used)
    turns, began = Turns("status"), trio.current_time()
    await turns.ready()
    turn = turns.begin()
    for _ in range(10):
        used += 0.001
        turn = await turns.go_on(turn)
    assert trio.current_time() == began
    await turns.ready()
    assert trio.current_time() - began == pytest.approx((0.01 - BURST) / SHARE)


async def test_clients_who_come_and_go_have_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs the loop more than what it says."""
    client = Address(str(tmp_path / "client"), server=True)
    monitor = Monitor("vm", Address(str(tmp_path / "qemu")), [client])

    async def come_and_go() -> None:
        while True:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(str(tmp_path / "client"))
            await trio.lowlevel.checkpoint()

    most = 1 + int((BURST + SHARE * 0.3) / COMING)
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        looks: list[float] = []

        def looked_at(*_: object) -> bool:
            looks.append(trio.current_time())
            return True

        monkeypatch.setattr(clients, "may_speak", looked_at)
        nursery.start_soon(come_and_go)
        while not looks or trio.current_time() < looks[0] + 0.3:
            await trio.sleep(0.01)
        assert sum(look <= looks[0] + 0.3 for look in looks) <= most
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("floods", ["QEMU", "client"])
async def test_the_others_have_their_turn_after_each_batch(tmp_path: Path, floods: str) -> None:
    events, begins = 0, trio.Event()

    def count(name: str, data: object) -> None:
        nonlocal events
        events += 1

    async def qemu(stream: trio.SocketStream) -> None:
        await stream.send_all(GREETING)
        negotiation = await stream.receive_some()
        spelling = negotiation[negotiation.index(b'"id": ') + 6 : -1]
        await stream.send_all(b'{"return": {}, "id": ' + spelling + b"}\r\n")
        if floods == "QEMU":
            await begins.wait()
            await stream.send_all(FLOOD * b'{"event": "X"}\r\n')
        await trio.sleep_forever()

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "qemu"))
        sock.listen(1)
        sock.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        client = Address(str(tmp_path / "client"), server=True)
        monitor = Monitor("vm", Address(str(tmp_path / "qemu")), [client], on_event=count)

        def taken() -> int:
            return events + monitor.counters.commands

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, qemu, [listener])
            await nursery.start(monitor.run)
            stream = await trio.open_unix_socket(tmp_path / "client")
            if floods == "client":
                await stream.send_all(FLOOD * b"{]")
            before = taken()
            begins.set()
            with trio.fail_after(10):
                while taken() < FLOOD:
                    await trio.lowlevel.checkpoint()
                    now = taken()
                    assert now - before <= 2 * BATCH  # tasks take turns in any order
                    before = now
            await stream.aclose()
            nursery.cancel_scope.cancel()
