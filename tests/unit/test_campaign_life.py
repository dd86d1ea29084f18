"""What the campaign waits for before it makes a loss."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from tests.campaign.life import both_paused
from tests.campaign.steady import Steady

from refault.lab.qmp_client import Event, QmpClient


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
    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(tmp_path / "s"))
        sock.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, monitor, [trio.SocketListener(sock)])
            await steady.run(str(tmp_path / "s"))
            nursery.cancel_scope.cancel()
    assert steady.noticed == ([noticed] if noticed else [])
