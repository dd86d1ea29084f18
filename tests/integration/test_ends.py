"""How a precopy that comes to nothing ends: at both QEMUs as where there is nothing between them."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from tests.integration.beside import End, end, listens
from tests.integration.qemus import BINARIES

from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.guest import Guest
from refault.lab.qmp_client import QmpClosed

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

CAPABILITIES = {
    "one": ("events",),
    "multifd": ("events", "multifd"),
    "return path": ("events", "return-path"),
    "multifd and return path": ("events", "multifd", "return-path"),
}
GUEST, BIGGER = (Guest(vcpus=1, log_pages=log_pages, tick_ns=1_000_000) for log_pages in (12, 13))
"""Multifd sends half a mebibyte at once: of less it would have sent all before a busy machine looks."""


async def cancel(src: End, _: End) -> None:
    await src.client.execute("migrate_cancel")


async def kill_source(src: End, _: End) -> None:
    src.qemu.process.kill()


async def quit_source(src: End, _: End) -> None:
    with contextlib.suppress(QmpClosed):
        await src.client.execute("quit")


async def kill_destination(_: End, dst: End) -> None:
    dst.qemu.process.kill()


WAYS: dict[str, Callable[[End, End], Awaitable[None]]] = {
    "cancelled": cancel,
    "source killed": kill_source,
    "source quits": quit_source,
    "destination killed": kill_destination,
}


async def end_of(directory: Path, binary: str, what: str, how: str, relayed: bool) -> list[object]:
    """The exit of the destination's QEMU, the source's status, and whether the guest goes on there."""
    port = free_port()
    refuses = how == "refused"
    async with (
        end(directory, "src", binary=binary, relayed=False, guest=GUEST) as src,
        end(
            directory,
            "dst",
            binary=binary,
            incoming="defer",
            relayed=relayed,
            guest=BIGGER if refuses else GUEST,
        ) as dst,
    ):
        for client in (src.client, dst.client):
            await bare.set_capabilities(client, *CAPABILITIES[what])
            await client.execute("migrate-set-parameters", {"multifd-channels": 16})
        slow = {"max-bandwidth": 128 << 10, "downtime-limit": 1}
        await src.client.execute("migrate-set-parameters", slow)
        await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
        await src.client.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        with trio.fail_after(40):
            if not refuses:
                await dst.client.wait_migration("active")
                await WAYS[how](src, dst)
            code = await dst.qemu.process.wait()
            while listens(port):
                await trio.sleep(0.01)
            if how in ("source killed", "source quits"):
                return [code]
            status = (await bare.wait_status(src.client, "failed", "cancelled", "completed"))["status"]
            await src.qemu.wait_progress()
        return [code, status]


CASES = [(BINARIES[0], what, how) for what in CAPABILITIES for how in (*WAYS, "refused")]
CASES += [
    (binary, what, how)
    for binary in BINARIES[1:]
    for what in CAPABILITIES
    for how in ("cancelled", "refused")
]


@pytest.mark.parametrize(("binary", "what", "how"), CASES)
async def test_a_precopy_ends_as_without_a_relay(tmp_path: Path, binary: str, what: str, how: str) -> None:
    ends = []
    for relayed in (False, True):
        directory = tmp_path / str(relayed)
        directory.mkdir()
        ends.append(await end_of(directory, binary, what, how, relayed))
    if how == "cancelled":
        # migrate_cancel shuts the socket before it says so: a bare one that writes just then fails instead
        # (migration/migration.c, migrate_fd_cancel).
        for end_ in ends:
            assert end_.pop() in ("cancelled", "failed")
    assert ends[1] == ends[0]


@pytest.mark.parametrize("relayed", [False, True])
async def test_a_source_learns_that_it_is_refused_before_it_has_sent_all_of_a_small_guest(
    tmp_path: Path, relayed: bool
) -> None:
    """Without a return path it would have completed, and the guest run nowhere."""
    port = free_port()
    async with (
        end(tmp_path, "src", relayed=relayed) as src,
        end(tmp_path, "dst", incoming="defer", relayed=relayed, guest=BIGGER) as dst,
    ):
        await src.client.execute("migrate-set-parameters", {"max-bandwidth": 0})
        await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
        await src.client.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        with trio.fail_after(20):
            assert await dst.qemu.process.wait() == 1
            # A bare one that is refused late, on a busy machine, has completed.
            ends = ("failed",) if relayed else ("failed", "completed")
            if (await bare.wait_status(src.client, *ends))["status"] == "failed":
                await src.qemu.wait_progress()


@pytest.mark.parametrize("relayed", [False, True])
async def test_a_source_that_has_gone_with_its_preempt_channel_is_no_stranger(
    tmp_path: Path, relayed: bool
) -> None:
    """QEMU up to 7.2 begins when both connections are there, and so learns of the source's end."""
    port = free_port()
    async with end(tmp_path, "dst", incoming="defer", relayed=relayed) as dst:
        await bare.set_capabilities(dst.client, "events", "postcopy-ram", "postcopy-preempt")
        await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
        main, lane = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
        await main.send_all(b"QEVM\0\0\0\3")
        await lane.aclose()
        await main.aclose()
        with trio.fail_after(9):  # refault waits ten seconds for a lane
            assert await dst.qemu.process.wait() == 1
