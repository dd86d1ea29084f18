"""Migrations between two refaults whose connections are lost again and again, over the whole life: with
sessions no QEMU notices one.

Connections are lost after a random number of bytes: few where the device state passes, and at the end; many
in the session's own handshake. By a reset, by a close, or with old bytes that come later. With --preempt a
migration has two connections, with --multifd many, of which one is lost, or several; the latter in precopy
alone. With --tls it is encrypted.

Run: python -m tests.campaign.session [--qemu BINARY] [--preempt | --multifd N | --tls x509|psk]
[--losses 1000] [--seed N] [--off N]
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
from tests.support.certificates import make_certificates, make_key, set_tls

from refault.lab import bare
from refault.lab.channel import Channel, free_port
from refault.lab.driver import Driver, refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.process import ProcessFailed
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair
from refault.lab.qmp_client import QmpClient, QmpClosed, QmpError

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
class Lanes:
    """The connections of a migration beside its main one."""

    preempt: bool = False
    multifd: int = 0
    """In precopy, which completes."""
    tls: str = ""
    """Encrypted, by x509 or psk; then there is no connection beside."""

    @property
    def capabilities(self) -> tuple[str, ...]:
        """That both ends switch on."""
        if self.multifd:
            return ("events", "return-path", "multifd")
        return (*bare.CAPABILITIES, "postcopy-preempt") if self.preempt else bare.CAPABILITIES


NO_LANES = Lanes()


@dataclass(frozen=True)
class Between:
    """The way of the channel, through the proxy, as `refault_driver` asks for it."""

    uri: str
    target_uri: str
    host: str = "127.0.0.1"


async def migrate(
    directory: Path,
    binary: str,
    seed: int,
    losses: int,
    *,
    session: bool,
    memory: int = 96 * _MIB,
    lanes: Lanes = NO_LANES,
) -> Outcome:
    """One migration that loses so many connections, spread over its phases."""
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
                with trio.fail_after(90):
                    for qmp in (driver.source, driver.destination):
                        await bare.set_capabilities(qmp, *lanes.capabilities)
                        if lanes.multifd:
                            await qmp.execute("migrate-set-parameters", {"multifd-channels": lanes.multifd})
                    if lanes.tls:
                        await encrypt(driver.source, driver.destination, lanes.tls, directory)
                    course = Course(driver, proxy, way, random.Random(seed), losses)
                    logs = directory if session else None
                    await (course.precopy if lanes.multifd else course.postcopy)(logs)
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


async def encrypt(source: QmpClient, destination: QmpClient, kind: str, place: Path) -> None:
    """Has the migrations of both speak TLS."""
    if kind == "psk":
        make_key(place)
    else:
        make_certificates(place, "IP:127.0.0.1")
    await set_tls(source, destination, kind, place)
    await source.execute("migrate-set-parameters", {"tls-hostname": "127.0.0.1"})


@dataclass(frozen=True)
class Course:
    """A migration over `way` that loses so many connections, at moments that are drawn."""

    driver: Driver
    proxy: BreakingProxy
    way: Channel
    draw: random.Random
    losses: int

    async def precopy(self, logs: Path | None) -> None:
        """As `_begin`, to its end in precopy."""
        source = self.driver.source
        await self._begin(logs, max(self.losses // 2, 1))
        await source.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 2000})
        await self._completed()

    async def postcopy(self, logs: Path | None) -> None:
        """As `_begin`, and then by postcopy to its end."""
        source, destination, proxy = self.driver.source, self.driver.destination, self.proxy
        quarter = max(self.losses // 4, 1)
        size = await self._begin(logs, quarter)
        await source.execute("migrate-start-postcopy")
        await source.wait_migration("postcopy-active")
        await destination.wait_event(lambda event: event.name == "RESUME")
        await _lost(proxy)
        await _lose(proxy, quarter, size // 4 // quarter)
        while await self._remaining() > 3 * _TAIL:
            await trio.sleep(0.01)
        await source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 4 * _MIB})
        while await self._remaining() > _TAIL:
            await trio.sleep(0.01)
        await _lose(proxy, quarter, self.draw.choice((1_000, 20_000, 2 * _TAIL // quarter)))
        await self._completed()

    async def _begin(self, logs: Path | None, part: int) -> int:
        """Precopy, with that many losses in its midst, and as many that come as it ends. `logs`: where the
        source's refault says that the channel is a session. The size of the guest, in bytes."""
        source, destination = self.driver.source, self.driver.destination
        limits = {
            "max-bandwidth": 8 * _MIB,
            "max-postcopy-bandwidth": 20 * _MIB,
            "downtime-limit": bare.DOWNTIME_LIMIT,
        }
        await source.execute("migrate-set-parameters", limits)
        await destination.execute("migrate-incoming", {"uri": self.way.target_uri})
        await source.execute("migrate", {"uri": self.way.uri})
        await bare.wait_sent(source, 0.02)
        if logs is not None:
            await _began(logs)
        size = int((await source.execute("query-migrate"))["ram"]["total"])
        await _lose(self.proxy, part, size // 3 // part)
        await _lost(self.proxy)
        await _lose(self.proxy, part, self.draw.choice((2_000, 20_000, 100_000)))
        return size

    async def _remaining(self) -> int:
        answer = await self.driver.source.execute("query-migrate")
        return int(answer.get("ram", {}).get("remaining", 0))

    async def _completed(self) -> None:
        await self.driver.source.wait_migration("completed")
        await self.driver.destination.wait_migration("completed")


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


def _statuses(pair: Pair) -> list[str]:
    wrong = []
    for qemu in (pair.source, pair.destination):
        told = [str(event.data["status"]) for event in qemu.qmp.events if event.name == "MIGRATION"]
        if more := [status for status in told if status not in SEEN]:
            wrong.append(f"{qemu.name}: {', '.join(dict.fromkeys(more))}")
    return wrong


async def campaign(binary: str, losses: int, each: int, seed: int, off: int, lanes: Lanes) -> int:
    """Runs it, prints what became of each migration that noticed something, and the table."""
    made, wrong, number = 0, 0, 0
    resumed: Counter[float] = Counter()
    while made < losses:
        outcome = await _one(binary, seed + number, each, lanes, session=True)
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
        outcome = await _one(binary, seed + i, 4, lanes, session=False)
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


async def _one(binary: str, seed: int, losses: int, lanes: Lanes, *, session: bool) -> Outcome:
    with tempfile.TemporaryDirectory() as directory:
        return await migrate(Path(directory), binary, seed, losses, session=session, lanes=lanes)


def main(arguments: list[str]) -> int:
    """Runs it once and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--preempt", action="store_true", help="with postcopy-preempt: two connections")
    several.add_argument("--multifd", type=int, default=0, help="with so many multifd channels")
    several.add_argument("--tls", choices=["x509", "psk"], default="", help="encrypted")
    parser.add_argument("--losses", type=int, default=1000)
    parser.add_argument("--each", type=int, default=60, help="losses of one migration (60)")
    parser.add_argument("--off", type=int, default=5, help="the same seeds, without sessions (5)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args(arguments)
    print(f"commit {commit_of()}: python -m tests.campaign.session {' '.join(arguments)}"
          f" (seed {options.seed})", flush=True)  # fmt: skip
    lanes = Lanes(options.preempt, options.multifd, options.tls)
    return trio.run(campaign, options.qemu, options.losses, options.each, options.seed, options.off, lanes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
