"""What the campaign waits for before it makes a loss."""

from __future__ import annotations

import itertools
import random
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from tests.campaign.life import both_paused, compose
from tests.campaign.losses import HUNG, LossClass, classes
from tests.campaign.steady import Steady

from refault.lab.qmp_client import Event, QmpClient

ROOT = Path(__file__).parents[2]


async def wait(*ends: list[str], since: list[int]) -> None:
    """For a pause of QEMUs that have told of these statuses, and answer no command."""
    with trio.socket.socket() as nobody:
        clients = [QmpClient("qemu", trio.SocketStream(nobody)) for _ in ends]
        for client, statuses in zip(clients, ends, strict=True):
            client.events += [Event("MIGRATION", {"status": status}, 0.0, 0.0) for status in statuses]
        await both_paused(clients, since)


async def test_a_source_that_is_being_resumed_already_has_paused() -> None:
    source = ["postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"]
    await wait(source, ["postcopy-active", "postcopy-paused"], since=[1, 1])


async def test_an_earlier_pause_does_not_count(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(trio.TooSlowError):
        await wait(["postcopy-paused", "postcopy-active"], since=[1])


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("preempt", [True, False])
def test_each_class_of_loss_is_drawn_as_often_as_it_is_to_be_made(ends: bool, preempt: bool) -> None:
    left = dict.fromkeys(classes(preempt=preempt), 3)
    draw = random.Random(1)
    for _ in range(100):
        for kind in compose(draw, left, 7, handshake_ends_it=ends):
            left[kind] -= 1
    assert {kind.name for kind, count in left.items() if count > 0} == set()
    assert set(LossClass) - left.keys() == (set() if preempt else {LossClass.ONE_OF_TWO})


def test_the_campaign_of_kills_has_each_class_in_which_a_refault_hangs() -> None:
    [named] = re.findall(r"^HUNG := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named.split() == [kind.name.lower() for kind in HUNG]


def serving(nursery: trio.Nursery, path: Path, serve: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    """Has who connects there served, until the nursery is cancelled."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    nursery.start_soon(trio.serve_listeners, serve, [listener])


@pytest.mark.parametrize(
    ("says", "ends", "noticed"),
    [
        (b"", False, "the client at the src: disconnected after 1 answers"),
        (b"", True, None),  # with its QEMU
        (b'{"return": {}, "id": 2}\n', False, "the client at the src: a reply twice, after 2"),
    ],
)
async def test_a_client_tells_what_a_kill_of_refault_has_done_to_it(
    tmp_path: Path, says: bytes, ends: bool, noticed: str | None, autojump_clock: trio.testing.MockClock
) -> None:
    async def monitor(stream: trio.SocketStream) -> None:
        await stream.send_all(b'{"QMP": {"capabilities": []}}\n')
        for number in range(1, 4):
            await stream.receive_some()
            if number == 3:
                break
            await stream.send_all(b'{"return": {}, "id": %d}\n' % number)
        if says:
            await stream.send_all(says + b'{"return": {}, "id": 3}\n')
            await trio.sleep_forever()

    async def wait() -> int:
        return 0 if ends else await trio.sleep_forever()

    qemu = SimpleNamespace(name="src", process=SimpleNamespace(wait=wait))
    steady = Steady(cast(Any, qemu))
    async with trio.open_nursery() as nursery:
        serving(nursery, tmp_path / "s", monitor)
        await steady.run(str(tmp_path / "s"))
        nursery.cancel_scope.cancel()
    assert steady.noticed == ([noticed] if noticed else [])


@pytest.mark.parametrize(("refault_answers", "qemu_answers"), [(True, True), (False, True), (False, False)])
async def test_a_client_that_is_answered_no_more_tells_so_where_its_qemu_answers(
    tmp_path: Path, refault_answers: bool, qemu_answers: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async def monitor(stream: trio.SocketStream) -> None:
        await stream.send_all(b'{"QMP": {"capabilities": []}}\n')
        for number in itertools.count(1):
            await stream.receive_some()
            if number > 3 and not refault_answers:
                await trio.sleep_forever()
            await stream.send_all(b'{"return": {}, "id": %d}\n' % number)

    async def execute(_: str) -> object:
        if not qemu_answers:
            raise trio.TooSlowError
        return {}

    steady = Steady(cast(Any, SimpleNamespace(name="src", qmp=SimpleNamespace(execute=execute))))
    async with trio.open_nursery() as nursery:
        serving(nursery, tmp_path / "s", monitor)
        nursery.start_soon(steady.run, str(tmp_path / "s"))
        await trio.sleep(1)
        await steady.settle()
        nursery.cancel_scope.cancel()
    told = "the client at the src: no answer after 2, though QEMU gives one"
    assert steady.noticed == ([told] if qemu_answers and not refault_answers else [])
