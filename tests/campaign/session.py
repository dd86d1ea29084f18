"""Migrations between two refaults whose connections are lost again and again, over the whole life: with
sessions no QEMU notices one.

Connections are lost after a random number of bytes: few where the device state passes, and at the end; many
in the session's own handshake. By a reset, by a close, or with old bytes that come later.

Run: python -m tests.campaign.session [--qemu BINARY] [--losses 1000] [--seed N] [--off N]
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import trio
import trio.lowlevel
from tests.campaign.invariants import Watch
from tests.campaign.record import commit_of
from tests.support.breaking_proxy import BreakingProxy

from refault.lab import bare
from refault.lab.channel import Channel, free_port
from refault.lab.driver import Driver, refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.process import ProcessFailed
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair
from refault.lab.qmp_client import QmpClosed, QmpError

SEEN = {"setup", "active", "device", "postcopy-device", "postcopy-active", "completed"}
"""What a QEMU says that notices no loss."""
_TAIL = 2 << 20
"""Bytes left when the losses of the end begin."""
_MIB = 1 << 20


@dataclass
class Outcome:
    """What became of one migration."""

    losses: int = 0
    resumed: Counter[float] = field(default_factory=Counter)
    """From losses until bytes ran again, at the source: how many within so many seconds and not less."""
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Between:
    """The way of the channel, through the proxy, as `refault_driver` asks for it."""

    uri: str
    target_uri: str
    host: str = "127.0.0.1"


async def migrate(
    directory: Path, binary: str, seed: int, losses: int, *, session: bool, memory: int = 96 * _MIB
) -> Outcome:
    """One migration that loses so many connections, spread over its phases."""
    draw = random.Random(seed)
    outcome = Outcome()
    guest = Guest.of_size(memory, 2, 5_000_000)
    options = ("--session", "auto" if session else "off")
    port = free_port()
    with BreakingProxy(port, seed, losses=0, most=1) as proxy:
        way = cast("Channel", Between(f"tcp:127.0.0.1:{proxy.port}", f"tcp:127.0.0.1:{port}"))
        async with (
            start_pair(guest, directory, PairOptions(binary, binary)) as pair,
            refault_driver(pair, way, directory, options=(options, options)) as driver,
            trio.open_nursery() as nursery,
        ):
            watch = Watch(pair)
            nursery.start_soon(watch.run)
            try:
                with trio.fail_after(45):
                    await _course(driver, proxy, draw, losses, way, directory, session=session)
                    outcome.resumed = await _resumptions(driver)
                    verdict = await compare(guest, pair.destination.qmp, pair.source.qmp)
                if not verdict.right:
                    outcome.wrong.append(f"memory: {verdict}")
            except (trio.TooSlowError, QmpError, QmpClosed, ProcessFailed, AssertionError) as error:
                outcome.wrong.append(f"{type(error).__name__}: {error}")
            watch.look_at_processes()
            outcome.wrong += watch.broken + _statuses(pair)
            outcome.losses = proxy.lost
            nursery.cancel_scope.cancel()
    for side in ("source", "destination"):
        text = (directory / f"refault-{side}.log").read_text()
        outcome.wrong += [line for line in text.splitlines() if "internal error" in line or "ALERT" in line]
    return outcome


async def _course(
    driver: Driver,
    proxy: BreakingProxy,
    draw: random.Random,
    losses: int,
    way: Channel,
    directory: Path,
    *,
    session: bool,
) -> None:
    source, destination = driver.source, driver.destination
    for qmp in (source, destination):
        await bare.set_capabilities(qmp, *bare.CAPABILITIES)
    limits = {
        "max-bandwidth": 30 * _MIB,
        "max-postcopy-bandwidth": 20 * _MIB,
        "downtime-limit": bare.DOWNTIME_LIMIT,
    }
    await source.execute("migrate-set-parameters", limits)
    await destination.execute("migrate-incoming", {"uri": way.target_uri})
    await source.execute("migrate", {"uri": way.uri})
    await bare.wait_sent(source, 0.02)
    if session:
        await _began(directory)
    quarter = max(losses // 4, 1)
    size = int((await source.execute("query-migrate"))["ram"]["total"])
    await _lose(proxy, quarter, size // 3 // quarter)
    await _lost(proxy)
    await _lose(proxy, quarter, draw.choice((2_000, 20_000, 100_000)))
    await source.execute("migrate-start-postcopy")
    await source.wait_migration("postcopy-active")
    await destination.wait_event(lambda event: event.name == "RESUME")
    await _lost(proxy)
    await _lose(proxy, quarter, size // 4 // quarter)
    while await _remaining(driver) > 3 * _TAIL:
        await trio.sleep(0.01)
    await source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 4 * _MIB})
    while await _remaining(driver) > _TAIL:
        await trio.sleep(0.01)
    await _lose(proxy, quarter, draw.choice((1_000, 20_000, 2 * _TAIL // quarter)))
    await source.wait_migration("completed")
    await destination.wait_migration("completed")


async def _began(directory: Path) -> None:
    """Until the channel is a session: before the offer has come a loss is one as ever."""
    log = directory / "refault-source.log"
    while "the channel is a session" not in log.read_text():
        await trio.sleep(0.005)


async def _lose(proxy: BreakingProxy, losses: int, most: int) -> None:
    proxy.lose(losses, most)
    await trio.lowlevel.checkpoint()


async def _lost(proxy: BreakingProxy) -> None:
    """Until all that are to be lost are, but for those that nothing passes on."""
    with trio.move_on_after(15):
        while proxy.busy:
            await trio.sleep(0.01)


async def _resumptions(driver: Driver) -> Counter[float]:
    [status] = [vm for vm in await driver.statuses() if vm.migration.role == "source"]
    found: Counter[float] = Counter()
    before = 0
    for bound, upto in (*status.session.resumptions.buckets, (math.inf, status.session.resumptions.count)):
        found[bound] = upto - before
        before = upto
    return found


async def _remaining(driver: Driver) -> int:
    answer = await driver.source.execute("query-migrate")
    return int(answer.get("ram", {}).get("remaining", 0))


def _statuses(pair: Pair) -> list[str]:
    wrong = []
    for qemu in (pair.source, pair.destination):
        told = [str(event.data["status"]) for event in qemu.qmp.events if event.name == "MIGRATION"]
        if more := [status for status in told if status not in SEEN]:
            wrong.append(f"{qemu.name}: {', '.join(dict.fromkeys(more))}")
    return wrong


async def campaign(binary: str, losses: int, each: int, seed: int, off: int) -> int:
    """Runs it, prints what became of each migration that noticed something, and the table."""
    made, wrong, number = 0, 0, 0
    resumed: Counter[float] = Counter()
    while made < losses:
        outcome = await _one(binary, seed + number, each, session=True)
        made += outcome.losses
        resumed += outcome.resumed
        number += 1
        if outcome.wrong:
            wrong += 1
            print(f"seed {seed + number - 1}: {'; '.join(outcome.wrong)}", flush=True)
    print(f"{binary}: {made} connections lost in {number} migrations, {number - wrong} noticed by no QEMU")
    print(f"{resumed.total()} resumptions: {_quantiles(resumed)}", flush=True)
    became: Counter[str] = Counter()
    for i in range(off):
        outcome = await _one(binary, seed + i, 4, session=False)
        became["; ".join(outcome.wrong) or "noticed by no QEMU"] += 1
    for what, count in became.most_common():
        print(f"without sessions, 4 losses: {count} x {what}")
    return 1 if wrong else 0


def _quantiles(resumed: Counter[float]) -> str:
    told = []
    for share in (0.5, 0.9, 0.99, 1.0):
        upto = 0
        for bound, count in sorted(resumed.items()):
            upto += count
            if upto >= share * resumed.total():
                told.append(f"{share:.0%} within {bound * 1000:g} ms")
                break
    return ", ".join(told)


async def _one(binary: str, seed: int, losses: int, *, session: bool) -> Outcome:
    with tempfile.TemporaryDirectory() as directory:
        return await migrate(Path(directory), binary, seed, losses, session=session)


def main(arguments: list[str]) -> int:
    """Runs it once and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--losses", type=int, default=1000)
    parser.add_argument("--each", type=int, default=60, help="losses of one migration (60)")
    parser.add_argument("--off", type=int, default=5, help="the same seeds, without sessions (5)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args(arguments)
    print(f"commit {commit_of()}: python -m tests.campaign.session {' '.join(arguments)}"
          f" (seed {options.seed})", flush=True)  # fmt: skip
    return trio.run(campaign, options.qemu, options.losses, options.each, options.seed, options.off)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
