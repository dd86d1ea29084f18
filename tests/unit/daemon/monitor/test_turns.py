"""Who floods, a client or QEMU, has a part of the event loop and no more."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import trio
import trio.testing

from refault.daemon.monitor.address import Address
from refault.daemon.monitor.monitor import Monitor
from refault.daemon.monitor.turns import BURST, LONGEST_WAIT, SHARE, Turns
from refault.qmp.splitter import BATCH

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""},'
    b' "capabilities": []}}\r\n'
)
FLOOD = 1000


@pytest.mark.parametrize("others", [0.0, 0.004])
async def test_a_flood_has_its_share_and_what_is_no_flood_waits_for_nothing(
    others: float, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    used = 0.0
    monkeypatch.setattr(time, "thread_time", lambda: used)
    turns, began = Turns(), trio.current_time()
    for _ in range(100):
        turn = turns.begin()
        used += 0.001
        await turns.end(turn, more=True)
        await trio.sleep(others)
    took = trio.current_time() - began
    assert took == pytest.approx(100 * others or (0.1 - BURST) / SHARE)


async def test_nobody_waits_for_long_for_what_those_had_who_have_left(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Each client that comes begins with a turn, and may be gone before it would have to wait."""
    used = 0.0
    monkeypatch.setattr(time, "thread_time", lambda: used)
    turns = Turns()
    for _ in range(1000):
        turn = turns.begin()
        used += 0.01
        with trio.CancelScope() as scope:
            scope.cancel()
            await turns.end(turn, more=True)
    began = trio.current_time()
    await turns.end(turns.begin(), more=False)
    assert trio.current_time() - began <= LONGEST_WAIT


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
