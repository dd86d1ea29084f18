"""A network that goes silent: how soon it is noticed and recovered, beside a bare QEMU in the same minute.

    destination-end, source-end  postcopy, the link down at that host for 20 s, then up
    second-network               postcopy, the link down for ever, another network named with --recover-uri
    stopped-refault              postcopy, the destination's refault stopped (SIGSTOP) for 30 s: not cut
    stopped-qemu                 the same with the destination's QEMU
    precopy                      precopy, the link down for 20 s: it completes

Exits with 1 unless a loss is noticed on both sides within `dead-after` and 1 s, recovered within 1 s of a
path being there, and all complete with the memory right.

Run: python -m tests.campaign.silence [--qemu QEMU] [--seconds 20] [--only SCENARIO] [--no-bare]
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
from tests.campaign.scenarios import NotWell, tell

from refault.channel.relay import DEAD_AFTER_SECONDS
from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.guest import Progress
from refault.lab.qemu import DEFAULT_BINARY

BANDWIDTH = 1 << 20
NOTICED_WITHIN = DEAD_AFTER_SECONDS + 1.0
RECOVERED_WITHIN = 1.0
_MINUTE = 60.0


async def _standstill(lab: TwoHosts, until: trio.Event) -> float:
    """The longest time in seconds for which no vCPU went on at the destination, until it is told to end."""
    longest, since = 0.0, trio.current_time()
    last: list[Progress | None] = []
    while not until.is_set():
        now = lab.pair.destination.progress()
        if now != last:
            last, since = now, trio.current_time()
        longest = max(longest, trio.current_time() - since)
        await trio.sleep(0.01)
    return longest


async def _down(lab: TwoHosts, host: int, seconds: float) -> str:
    """The link is down at one end for so long; what that made of the migration."""
    since, began = lab.marks(), trio.current_time()
    lab.hosts[host].link("down")
    noticed: list[float] = []
    if lab.setting.refault:
        noticed = await _noticed(lab, since, began)
    await trio.sleep(max(0.0, seconds - (trio.current_time() - began)))
    since, up = lab.marks(), trio.current_time()
    lab.hosts[host].link("up")
    if not lab.setting.refault:
        return await _bare_goes_on(lab, up, began + _MINUTE)
    return await _recovered(lab, since, up, noticed)


async def _noticed(lab: TwoHosts, since: list[int], began: float) -> list[float]:
    paused = await lab.both("postcopy-paused", since, DEAD_AFTER_SECONDS * 3)
    return [when - began for when in paused]


async def _recovered(lab: TwoHosts, since: list[int], there: float, noticed: list[float]) -> str:
    active = max(await lab.both("postcopy-active", since, 30)) - there
    both = " and ".join(f"{seconds:.1f} s" for seconds in noticed)
    told = f"noticed after {both}, active again {active:.2f} s after a path was there"
    if max(noticed) > NOTICED_WITHIN or active > RECOVERED_WITHIN:
        raise NotWell(told)
    return told


async def _bare_goes_on(lab: TwoHosts, up: float, minute: float) -> str:
    """Whether bytes flow again on the old connection, in what is left of the minute."""
    sent = await _sent(lab)
    while trio.current_time() < minute:
        if await _sent(lab) > sent:
            return f"nobody notices; bytes flow again {trio.current_time() - up:.1f} s after the link is up"
        await trio.sleep(0.05)
    raise NotWell("nobody notices, and nothing flows in the rest of the minute")


async def _sent(lab: TwoHosts) -> int:
    ram = (await lab.pair.source.qmp.execute("query-migrate")).get("ram", {})
    return int(ram.get("postcopy-requests", 0))


async def destination_end(lab: TwoHosts, seconds: float) -> str:
    await lab.begin(BANDWIDTH)
    await lab.postcopy()
    return await _down(lab, 1, seconds)


async def source_end(lab: TwoHosts, seconds: float) -> str:
    await lab.begin(BANDWIDTH)
    await lab.postcopy()
    return await _down(lab, 0, seconds)


async def second_network(lab: TwoHosts, seconds: float) -> str:
    await lab.begin(BANDWIDTH)
    await lab.postcopy()
    since, began = lab.marks(), trio.current_time()
    lab.hosts[1].link("down")
    if not lab.setting.refault:
        await trio.sleep(_MINUTE)
        status = await bare.migration_status(lab.pair.source.qmp)
        raise NotWell(f"nobody notices; after a minute the source says {status}, and no vCPU goes on")
    noticed = await _noticed(lab, since, began)
    # The other network was there all the time: it is tried as soon as the first has not answered.
    return await _recovered(lab, since, began + max(noticed), noticed)


async def _stopped(lab: TwoHosts, process: int, seconds: float) -> str:
    await lab.begin(BANDWIDTH)
    await lab.postcopy()
    since = lab.marks()
    peer = lab.refaults[1] if process else lab.pair.destination.process
    peer.signal(signal.SIGSTOP)
    await trio.sleep(seconds * 1.5)
    peer.signal(signal.SIGCONT)
    await lab.pair.destination.wait_progress(30)
    for qemu, mark in zip(lab.qemus, since, strict=True):
        told = [event.data.get("status") for event in qemu.qmp.events[mark:]]
        if "postcopy-paused" in told:
            raise NotWell(f"{qemu.name} was paused: {told}")
    return "not cut"


async def stopped_refault(lab: TwoHosts, seconds: float) -> str:
    if not lab.setting.refault:
        return "-"
    return await _stopped(lab, 1, seconds)


async def stopped_qemu(lab: TwoHosts, seconds: float) -> str:
    return await _stopped(lab, 0, seconds)


async def precopy(lab: TwoHosts, seconds: float) -> str:
    await lab.begin(BANDWIDTH * 4)
    lab.hosts[1].link("down")
    await trio.sleep(seconds)
    lab.hosts[1].link("up")
    await lab.postcopy()
    return "waited out"


SCENARIOS: dict[str, Callable[[TwoHosts, float], Awaitable[str]]] = {
    "destination-end": destination_end,
    "source-end": source_end,
    "second-network": second_network,
    "stopped-refault": stopped_refault,
    "stopped-qemu": stopped_qemu,
    "precopy": precopy,
}


async def one(directory: Path, name: str, binary: str, seconds: float, *, refault: bool) -> str:
    """One scenario, with its memory compared; what became of it. Raises where it did not end well."""
    recover_port = free_port() if name == "second-network" else None
    setting = Setting(binary, refault=refault, recover_port=recover_port)
    async with on_two_hosts(directory, setting) as lab:
        over = trio.Event()
        stood: list[float] = []

        async def watch() -> None:
            stood.append(await _standstill(lab, over))

        async with trio.open_nursery() as nursery:
            if name != "precopy":
                nursery.start_soon(watch)
            told = await SCENARIOS[name](lab, seconds)
            over.set()
        if told == "-":
            return told
        verdict = await lab.finish(_MINUTE)
        stands = f"; no vCPU went on for up to {stood[0]:.1f} s" if stood else ""
        return f"{told}{stands}; {verdict}"


async def measure(binary: str, seconds: float, names: list[str], beside: bool) -> int:
    """How many with refault did not end as they must."""
    bad = 0
    for name in names:
        for refault in (True, False) if beside else (True,):
            scenario = partial(one, name=name, binary=binary, seconds=seconds, refault=refault)
            well = await tell(name, "refault" if refault else "bare QEMU", scenario)
            bad += refault and not well
    return bad


def main() -> int:
    """The process's beginning."""
    parser = argparse.ArgumentParser(prog="make campaign-silence")
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the link is down")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="these alone")
    parser.add_argument("--no-bare", action="store_true", help="leave the bare QEMU out")
    arguments = parser.parse_args()
    print(f"command  python -m tests.campaign.silence {' '.join(sys.argv[1:])}")
    print(f"commit   {commit_of()}\nQEMU     {arguments.qemu}\n", flush=True)
    names = arguments.only or list(SCENARIOS)
    return 1 if trio.run(measure, arguments.qemu, arguments.seconds, names, not arguments.no_bare) else 0


if __name__ == "__main__":
    sys.exit(main())
