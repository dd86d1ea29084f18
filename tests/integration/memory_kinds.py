"""Migrations of memory of every kind through the relay, with losses; memory compared at the end of each.

tests/integration/test_memory_kinds.py runs them on some QEMUs, tests/campaign/matrix.py on all.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from refault.daemon.telling.snapshot import BlockStatus
from refault.lab import bare
from refault.lab.channel import Channel, Loss, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.guest import PAGE, Guest
from refault.lab.memory import ProcessMemory, compare, dump
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, Qemu, start_pair, start_qemu
from refault.lab.qmp_client import QmpClient

from .waiting import told

MIB = 1 << 20
HUGE = 2 * MIB
DIMM = 32 * MIB
DIMM_ADDRESS = 4 << 30
"""Where the machine `pc` puts the first pc-dimm (hw/i386/pc.c: above 4 GiB, there being no RAM)."""
LOW = 24 * MIB


def nodes(guest: Guest, *backends: str) -> list[str]:
    """NUMA nodes, each a RAM block, and together not less than the guest needs: QEMU's arguments."""
    sizes = [LOW] * (len(backends) - 1)
    sizes.append(-(-(guest.ram_bytes - sum(sizes)) // HUGE) * HUGE)
    words = ["-m", f"{sum(sizes) // MIB}M,slots=1,maxmem=8G"]
    for number, (backend, size) in enumerate(zip(backends, sizes, strict=True)):
        words += ["-object", f"{backend},id=node{number},size={size}"]
        words += ["-numa", f"node,memdev=node{number}"]
    return words


# It takes eight seconds to ask for all of its memory, in which the losses are to fall.
_GUEST = Guest(vcpus=4, log_pages=11, tick_ns=4_000_000)


@dataclass(frozen=True)
class Kind:
    """``extra``: QEMU's arguments, ``blocks``: RAM blocks that it declares, of ``page_size`` bytes a page;
    ``dimm``: there is a pc-dimm, which the guest does not touch; ``bandwidth``: bytes in a second, in
    postcopy; ``pauses_again``: a recovery may be followed by further losses, which are QEMU's own."""

    guest: Guest = _GUEST
    backends: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ("pc.ram",)
    page_size: int = PAGE
    precopy_bandwidth: int = 8 * MIB  # memory that is mostly empty must not have passed whole by then
    precopy_share: float = 0.1
    bandwidth: int = MIB
    losses: tuple[Loss, ...] = (Loss.KILL, Loss.RESET)
    pauses_again: bool = False
    dimm: bool = False

    def arguments(self) -> list[str]:
        """All of QEMU's arguments that make it this kind."""
        words = nodes(self.guest, *self.backends) if self.backends else []
        if self.dimm:
            words += ["-object", f"memory-backend-ram,id=dimm,size={DIMM}", "-device", "pc-dimm,memdev=dimm"]
        return [*words, *self.extra]


_RAM, _MEMFD = "memory-backend-ram", "memory-backend-memfd"
TWO_BLOCKS = Kind(backends=(_RAM, _MEMFD), blocks=("node0", "node1"))
MANY_BLOCKS = Kind(
    backends=(_RAM, _MEMFD, _RAM),
    extra=("-device", "VGA,vgamem_mb=4", "-device", "e1000"),
    blocks=("node0", "node1", "node2", "dimm", "0000:00:02.0/vga.vram", "pc.bios"),
    dimm=True,
)
XBZRLE = Kind(
    Guest(vcpus=4, log_pages=9, tick_ns=200_000), capabilities=("xbzrle",), precopy_bandwidth=4 * MIB
)
# Lost while the source serves a request, which QEMU does not come back from by itself (docs/matrix.md).
HUGE_PAGES = Kind(
    Guest(vcpus=4, log_pages=13, tick_ns=30_000_000),
    backends=(f"{_MEMFD},hugetlb=on,hugetlbsize=2M",) * 2,
    blocks=("node0", "node1"),
    page_size=HUGE,
    precopy_share=0.0,
    bandwidth=32 * MIB,
    losses=(Loss.KILL,),
    pauses_again=True,
)
PAUSES_MOST = 12
"""After one loss: more than requests can stand in the source's queue, and one for each of them."""
_FOR_GOOD = ("postcopy-active", "completed")
_AT_REST = 0.5
"""Seconds of that after which a recovery is taken to hold."""

ZERO_PAGES = Kind(backends=(_RAM,), dimm=True)
_ASKED = 5


@contextlib.contextmanager
def huge_pages(kind: Kind) -> Iterator[None]:
    """Both ends' memory in pages of 2 MiB, for the time of the block. Raises OSError where they cannot be
    had."""
    wanted = 2 * -(-(kind.guest.ram_bytes + HUGE) // HUGE)
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = int(pool.read_text())
    free = int(pool.with_name("free_hugepages").read_text())
    try:
        if free < wanted:
            pool.write_text(str(before + wanted - free))
            if int(pool.with_name("free_hugepages").read_text()) < wanted:
                raise OSError("too little contiguous memory for huge pages")
        yield
    finally:
        pool.write_text(str(before))


async def migrate(directory: Path, kind: Kind, binary: str = DEFAULT_BINARY) -> None:
    """Migrates with losses in postcopy, recovered by refault. Raises AssertionError where anything is not as
    it must be."""
    async with (
        start_pair(kind.guest, directory, PairOptions(binary, binary, kind.arguments())) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory) as driver,
    ):
        if kind.dimm:
            (await _dimm_memory(pair.source)).write(0, random.randbytes(DIMM))
        with trio.fail_after(60):
            since = await bare.begin(
                driver.source,
                driver.destination,
                channel,
                bandwidth=kind.bandwidth,
                precopy_bandwidth=kind.precopy_bandwidth,
                capabilities=(*bare.CAPABILITIES, *kind.capabilities),
            )
            if "xbzrle" in kind.capabilities:
                _prefer(pair.source)
                await _wait_xbzrle(driver.source)
            else:
                await bare.wait_sent(driver.source, kind.precopy_share)
            await bare.switch_to_postcopy(driver.source, driver.destination, since)
        for loss in kind.losses:
            await trio.sleep(0.2)
            await _lose(driver, channel, loss)
            if kind.pauses_again:
                await at_rest(driver)
        losses = len(kind.losses)
        statuses = await told(driver, lambda vms: all(vm.recovery.recoveries >= losses for vm in vms))
        for vm in statuses:
            assert vm.migration.relay == "tracking", vm.migration
            more = vm.recovery.recoveries - len(kind.losses)
            assert 0 <= more <= (len(kind.losses) * PAUSES_MOST if kind.pauses_again else 0)
            assert vm.pages.requested > 0
            sizes = {block.name: block.page_size_bytes for block in vm.pages.blocks}
            assert {name: sizes.get(name) for name in kind.blocks} == dict.fromkeys(
                kind.blocks, kind.page_size
            )
        await _end(kind, pair, driver)


async def _lose(driver: RefaultDriver, channel: Channel, loss: Loss) -> None:
    since = len(driver.destination.events)
    await channel.lose(loss)
    await _recovered(driver, since)


async def _recovered(driver: RefaultDriver, since: int) -> None:
    with trio.fail_after(30):
        await driver.destination.wait_migration("postcopy-active", since=since)
        await bare.wait_status(driver.source, "postcopy-active")


async def at_rest(driver: RefaultDriver, seconds: float = 30.0) -> None:
    """Waits until a recovery holds. Raises trio.TooSlowError after so many seconds."""

    def since_the_last() -> float:
        last = [event for event in driver.destination.events if event.name == "MIGRATION"][-1]
        return time.time() - last.stamp if last.data["status"] in _FOR_GOOD else 0.0

    with trio.fail_after(seconds):
        while since_the_last() < _AT_REST:
            await trio.sleep(0.02)


async def _end(kind: Kind, pair: Pair, driver: RefaultDriver) -> None:
    await pair.destination.wait_progress()
    await bare.finish(driver.source)
    verdict = await compare(kind.guest, pair.destination.qmp, pair.source.qmp)
    assert verdict.right, verdict
    if kind.dimm:
        here, there = await _dimm(pair.destination), await _dimm(pair.source)
        assert here == there, "the dimm's content is not the same"


def _prefer(qemu: Qemu) -> None:
    """Its guest writes on however busy the machine is: else all has passed before anything is lost.

    Nice values count within a session, and those of sessions between them (sched(7), autogroup).
    """
    with contextlib.suppress(FileNotFoundError, PermissionError):
        for thread in Path(f"/proc/{qemu.pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), -10)
        Path(f"/proc/{qemu.pid}/autogroup").write_text("-10")


async def _wait_xbzrle(source: QmpClient) -> None:
    """Until pages have passed as differences to what they were, which is so once all have passed twice.

    Precopy is made slow long before, or it would be over soon: differences are short, and the guest of a busy
    machine writes little meanwhile. Then it is given time to write to what postcopy is to carry.
    """
    await source.execute("migrate-set-parameters", {"downtime-limit": 1})
    twice = 2 * XBZRLE.guest.written_bytes // PAGE
    while (await source.execute("query-migrate")).get("ram", {"normal": 0})["normal"] < twice * 0.85:
        await trio.sleep(0.005)
    await source.execute("migrate-set-parameters", {"max-bandwidth": MIB // 4})
    while not (await source.execute("query-migrate"))["xbzrle-cache"]["pages"]:
        await trio.sleep(0.005)
    await source.execute("migrate-set-parameters", {"max-bandwidth": 64 << 10})
    await trio.sleep(0.5)


async def _dimm_memory(qemu: Qemu) -> ProcessMemory:
    answer = await qemu.qmp.monitor_command(f"gpa2hva {DIMM_ADDRESS:#x}")
    found = re.search(r"\(dimm\) is (0x[0-9a-f]+)", answer)
    assert found is not None, answer
    return ProcessMemory(qemu.pid, int(found[1], 16))


async def _dimm(qemu: Qemu) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        await dump(qemu.qmp, DIMM_ADDRESS, DIMM, Path(file.name))
        return await trio.Path(file.name).read_bytes()


async def ask_for_zero_pages(directory: Path, binary: str = DEFAULT_BINARY) -> None:
    """Has the destination ask for pages of a dimm that nobody has written to, the last of them lost with the
    channel."""
    kind = ZERO_PAGES
    async with (
        start_pair(kind.guest, directory, PairOptions(binary, binary, kind.arguments())) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory) as driver,
    ):
        memory = await _dimm_memory(pair.destination)
        await bare.start_postcopy(
            driver.source,
            driver.destination,
            channel,
            bandwidth=PAGE,
            precopy_bandwidth=8 * MIB,
            precopy_share=0.0,
        )
        # Downwards, for the source goes on upwards from each, and fast: a zero page takes nine bytes.
        *pages, last = sorted(random.sample(range(DIMM // PAGE), _ASKED), reverse=True)
        for page in pages:
            await _read_zeros(memory, page)
        since = len(driver.destination.events)
        channel.freeze()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_zeros, memory, last)
            with trio.fail_after(20):
                while (await _dimm_status(driver)).requested < _ASKED:
                    await trio.sleep(0.01)
            await channel.kill(request_inside=False)
            await _recovered(driver, since)
        dimm = await _dimm_status(driver)
        assert (dimm.requested, dimm.arrived, dimm.outstanding) == (_ASKED, _ASKED, 0)
        await _end(kind, pair, driver)


async def _read_zeros(memory: ProcessMemory, page: int) -> None:
    """Reads a page of the dimm from outside, in a thread that waits until it is there."""
    assert await trio.to_thread.run_sync(memory.fault, page * PAGE, PAGE) == bytes(PAGE)


async def _dimm_status(driver: RefaultDriver) -> BlockStatus:
    """What the destination's refault says about the dimm."""
    statuses = await driver.statuses()
    (pages,) = (vm.pages for vm in statuses if vm.migration.role == "destination")
    (dimm,) = (block for block in pages.blocks if block.name == "dimm")
    return dimm


async def stay_in_shared_memory(directory: Path, binary: str = DEFAULT_BINARY) -> None:
    """Memory that both ends share and do not migrate, in precopy: lost once, the guest goes on at the source,
    and the next migration completes.

    Every QEMU up to 11.1 refuses x-ignore-shared with postcopy-ram. So no page is requested; what is tracked
    is the block list, which has an address in each entry then.
    """
    guest = _GUEST
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as shared:
        extra = nodes(guest, _RAM, f"memory-backend-file,share=on,mem-path={shared.name}")
        async with start_qemu(guest, directory, "src", binary=binary, extra=extra) as source:
            await source.wait_guest()
            await bare.set_capabilities(source.qmp, "events", "x-ignore-shared")
            for name in ("lost", "completed"):
                place = directory / name
                place.mkdir()
                async with (
                    start_qemu(
                        guest, place, "dst", binary=binary, extra=extra, incoming="defer"
                    ) as destination,
                    start_channel(place, free_port()) as channel,
                    refault_driver(Pair(source, destination), channel, place) as driver,
                ):
                    await bare.set_capabilities(driver.destination, "events", "x-ignore-shared")
                    await _precopy(driver, channel, lost=name == "lost")
                    # Of a destination whose QEMU has ended nothing is told any more.
                    for vm in (await driver.statuses())[: 1 if name == "lost" else 2]:
                        relay = vm.migration.relay, vm.migration.relay_reason or ""
                        assert relay[0] == "tracking" or "a precopy migration ends" in relay[1], relay
                    if name == "lost":  # the blocks had been told before
                        await source.wait_progress()
                        continue
                    assert await _blocks_are_told(driver)
                    await destination.wait_progress()
                    verdict = await compare(guest, destination.qmp, source.qmp)
                    assert verdict.right, verdict


async def _blocks_are_told(driver: RefaultDriver) -> bool:
    """Whether both refaults have seen the block list in the stream."""
    blocks = [{block.name for block in vm.pages.blocks} for vm in await driver.statuses()]
    return all(names >= {"node0", "node1"} for names in blocks)


async def _precopy(driver: RefaultDriver, channel: Channel, *, lost: bool) -> None:
    bandwidth = MIB if lost else 64 * MIB
    await driver.source.execute("migrate-set-parameters", {"max-bandwidth": bandwidth})
    since = len(driver.destination.events)
    await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
    await channel.wait_open()
    await driver.source.execute("migrate", {"uri": channel.uri})
    with trio.fail_after(40):
        if lost:
            while not await _blocks_are_told(driver):
                await trio.sleep(0.01)
            await channel.reset()
            await bare.wait_status(driver.source, "failed")
        else:
            await driver.destination.wait_migration("completed", since=since)
            await bare.wait_status(driver.source, "completed")
