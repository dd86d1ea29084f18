"""What the kernel holds when an end comes: each of these, again and again.

    source-killed    postcopy; the destination's QEMU is stopped until the source has sent all, and a megabyte
                     and more of it lies in the kernel of the destination's host; then the source's QEMU and
                     refault are killed: the destination completes, and lacks no page
    other-size       precopy without a return path to a destination with more memory, a refault in front of
                     that alone: the source says `failed`, and its guest goes on there
    hundred-lanes    precopy over 100 multifd channels, a refault on both sides: it completes, and the memory
                     is right

Exits with 1 unless all do.

Run: python -m tests.campaign.last_bytes [--qemu QEMU] [--each 20] [--only SCENARIO]
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio
from tests.campaign.hosts import Setting, TwoHosts, on_two_hosts
from tests.campaign.record import commit_of
from tests.campaign.scenarios import tell
from tests.integration.beside import SMALL, end

from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import DEFAULT_BINARY

MUCH = 1 << 20
_RECEIVE_BUFFER = 16 << 20
GUEST = Guest(vcpus=1, log_pages=10, tick_ns=10_000_000)
"""Its memory fits into that buffer, and it takes ten seconds to ask for all of it."""
LARGE, LARGER = (Guest(vcpus=1, log_pages=log_pages, tick_ns=1_000_000) for log_pages in (14, 15))
"""More than the kernels hold on the way: else a source has sent all before it can be refused."""
_STANDS = 0.5


def unread(lab: TwoHosts) -> int:
    """Bytes that lie at the migration's address in the kernel of the destination's host."""
    table = Path(f"/proc/{lab.refaults[1].pid}/net/tcp").read_text()
    return sum(
        int(queues.split(":")[1], 16)
        for _, local, _, state, queues, *_ in map(str.split, table.splitlines()[1:])
        if local.endswith(f":{lab.port:04X}") and state != "0A"
    )


async def _all_is_there(lab: TwoHosts) -> int:
    """Waits until the source has sent all, so that what lies there grows no more; how much it is."""
    source = lab.pair.source.qmp
    while (await source.execute("query-migrate"))["ram"]["remaining"] > 0:
        await trio.sleep(0.01)
    held, since = -1, trio.current_time()
    while trio.current_time() < since + _STANDS:
        if (now := unread(lab)) != held:
            held, since = now, trio.current_time()
        await trio.sleep(0.01)
    return held


async def source_killed(directory: Path, binary: str) -> str:
    async with on_two_hosts(directory, Setting(binary, GUEST)) as lab:
        for host in lab.hosts:
            host.receive_buffer(_RECEIVE_BUFFER)
        await lab.begin(bare.PRECOPY_BANDWIDTH, 64 << 10)
        await lab.postcopy()
        destination = lab.pair.destination
        destination.process.signal(signal.SIGSTOP)
        await lab.pair.source.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        with trio.fail_after(30):
            held = await _all_is_there(lab)
        assert held >= MUCH, f"{held} bytes lie there"
        for process in (lab.pair.source.process, lab.refaults[0]):
            process.kill()
        destination.process.signal(signal.SIGCONT)
        with trio.fail_after(30):
            await destination.qmp.wait_migration("completed")
        await destination.wait_progress()
        verdict = await compare(GUEST, destination.qmp)
        assert verdict.right, verdict
        return f"{held} bytes in the kernel; {verdict}"


async def other_size(directory: Path, binary: str) -> str:
    port = free_port()
    async with (
        end(directory, "src", binary=binary, relayed=False, guest=LARGE) as src,
        end(directory, "dst", binary=binary, incoming="defer", guest=LARGER) as dst,
    ):
        await src.qemu.wait_guest()
        for client in (src.client, dst.client):
            await bare.set_capabilities(client, "events")
        await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
        await src.client.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        with trio.fail_after(30):
            status = (await bare.wait_status(src.client, "failed", "completed"))["status"]
            assert status == "failed", status
            await src.qemu.wait_progress()
        running = (await src.client.execute("query-status"))["running"]
        assert running
        return "failed, and it runs at the source"


async def hundred_lanes(directory: Path, binary: str) -> str:
    port = free_port()
    async with (
        end(directory, "src", binary=binary) as src,
        end(directory, "dst", binary=binary, incoming="defer") as dst,
    ):
        for client in (src.client, dst.client):
            await bare.set_capabilities(client, "events", "multifd")
            await client.execute("migrate-set-parameters", {"multifd-channels": 100, "max-bandwidth": 0})
        await dst.client.execute("migrate-incoming", {"uri": f"tcp:127.0.0.1:{port}"})
        await src.client.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        with trio.fail_after(60):
            status = (await bare.wait_status(src.client, "failed", "completed"))["status"]
            assert status == "completed", status
            await dst.qemu.qmp.wait_migration("completed")
        await dst.qemu.wait_progress()
        verdict = await compare(SMALL, dst.qemu.qmp, src.qemu.qmp)
        assert verdict.right, verdict
        return f"completed; {verdict}"


SCENARIOS: dict[str, Callable[..., Awaitable[str]]] = {
    "source-killed": source_killed,
    "other-size": other_size,
    "hundred-lanes": hundred_lanes,
}


async def measure(binary: str, names: list[str], each: int) -> int:
    """How many did not end as they must."""
    bad = 0
    for name in names:
        well = 0
        for number in range(each):
            well += await tell(name, str(number + 1), partial(SCENARIOS[name], binary=binary))
        print(f"{name}: {well} of {each}", flush=True)
        bad += each - well
    return bad


def main() -> int:
    """The process's beginning."""
    parser = argparse.ArgumentParser(prog="make campaign-last_bytes")
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--each", type=int, default=20, help="how often (default: 20)")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="these alone")
    arguments = parser.parse_args()
    print(f"command  python -m tests.campaign.last_bytes {' '.join(sys.argv[1:])}")
    print(f"commit   {commit_of()}\nQEMU     {arguments.qemu}\n", flush=True)
    return 1 if trio.run(measure, arguments.qemu, arguments.only or list(SCENARIOS), arguments.each) else 0


if __name__ == "__main__":
    sys.exit(main())
