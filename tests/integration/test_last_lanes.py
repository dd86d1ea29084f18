"""What a source's QEMU has opened, written and closed reaches the destination though the other host takes the
connections only then: its end, or the migration's, takes none of it away."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from tests.integration.beside import end
from tests.integration.qemus import BINARIES
from tests.integration.test_incoming import carry

from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.guest import Guest
from refault.lab.qmp_client import QmpClosed

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

# So that a socket between QEMU and refault holds all that is sent on it.
TINY = Guest(vcpus=1, log_pages=4, tick_ns=1_000_000)


@contextlib.asynccontextmanager
async def takes_one(port: int) -> AsyncIterator[tuple[int, trio.Event]]:
    """A port that leads to `port`: the first connection at once, the others when the event is set."""
    takes_all = trio.Event()

    async def through(near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", port)
        async with far, near, trio.open_nursery() as nursery:
            nursery.start_soon(carry, near, far)
            nursery.start_soon(carry, far, near)

    async def serve(listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        first, _ = await listener.accept()
        nursery.start_soon(through, trio.SocketStream(first))
        await takes_all.wait()
        listener.listen(128)
        await trio.serve_listeners(through, [trio.SocketListener(listener)])

    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen(0)  # the kernel answers one more, and none behind it
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, listener, nursery)
            yield listener.getsockname()[1], takes_all
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("quits", [False, True], ids=["stays", "quits"])
@pytest.mark.parametrize("binary", BINARIES)
async def test_what_qemu_had_opened_when_it_completed_is_delivered(
    tmp_path: Path, binary: str, quits: bool
) -> None:
    port = free_port()
    async with (
        end(tmp_path, "src", binary=binary, guest=TINY) as src,
        end(tmp_path, "dst", binary=binary, incoming="defer", guest=TINY) as dst,
        takes_one(port) as (way, takes_all),
    ):
        for client in (src.client, dst.client):
            await bare.set_capabilities(client, "events", "multifd")
            await client.execute("migrate-set-parameters", {"multifd-channels": 100})
        await src.client.execute("migrate-set-parameters", {"max-bandwidth": 0})
        await src.qemu.wait_guest()
        await src.client.execute("stop")  # or it sends more than fits
        await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
        await src.client.execute("migrate", {"uri": f"tcp:127.0.0.1:{way}"})
        with trio.fail_after(30):
            await bare.wait_status(src.qemu.qmp, "completed")
            if quits:
                with contextlib.suppress(QmpClosed):
                    await src.client.execute("quit")
                await src.qemu.process.wait()
            takes_all.set()
            await bare.wait_status(dst.client, "completed")
            await dst.client.execute("cont")
            await dst.qemu.wait_progress()
