"""Two libvirt hosts, with QEMU alone and with refault, side by side: prints two tables, and what differs.

python -m tests.libvirt [--root DIRECTORY] [--lifecycle | --kills N | --starts N]
    [--only KIND]... [--emulator NAME]... [--times N]
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.libvirt import kills, lifecycle, migrations, starts
from tests.libvirt.domains import NAME
from tests.libvirt.hosts import EMULATORS, LibvirtHost, libvirt_hosts

USUAL = [each for each in EMULATORS if each != "second"]


def show_lifecycle(host: LibvirtHost) -> int:
    """The table of one host's commands; how many rows differ."""
    differing = 0
    print("| virsh | bare: exit, ms | refault: exit, ms | results and events |\n|---|---|---|---|")
    for bare, fronted in zip(*(lifecycle.run(host, variant) for variant in ("bare", "refault")), strict=True):
        same = bare.comparable == fronted.comparable
        differing += not same
        times = [f"{each.result.code}, {each.result.seconds * 1000:.0f}" for each in (bare, fronted)]
        print(
            f"| {bare.command[:60]} | {' | '.join(times)} | {'same' if same else 'DIFFERENT'} |", flush=True
        )
        if not same:
            for step in (bare, fronted):
                print(f"    {step.result.text.strip()[-1000:]} {step.events}")
    return differing


def show_migrations(hosts: list[LibvirtHost], only: list[str], emulators: list[str], times: int) -> int:
    """The table of migrations, those with refault so often; how many are not as they should be."""
    wrong = 0
    print(f"| virsh migrate | {' | '.join(emulators)} | |\n|---{'|---' * len(emulators)}|---|")
    for kind in migrations.KINDS:
        if only and kind.name not in only:
            continue
        source, destination = hosts
        runs: dict[str, migrations.Migrated] = {}
        for _ in range(times):
            for variant in emulators:
                if variant != "bare" or variant not in runs:
                    runs[variant] = migrations.run(source, destination, variant, kind)
            fronted = [run for variant, run in runs.items() if variant != "bare"]
            why = migrations.what_is_wrong(kind, runs.get("bare"), *fronted)
            wrong += bool(why)
            told = " | ".join(map(str, runs.values()))
            print(f"| {kind.name} | {told} | {why or 'as it should be'} |", flush=True)
            if why:
                for variant, run in runs.items():
                    print(f"    {variant}: {run}")
                    print("\n".join(f"        {line}" for line in (run.result.text, *map(str, run.events))))
                for host in hosts:
                    print(f"    {host.name}, refault: {host.said('refault')[-4000:]}")
                    print(f"    {host.name}, QEMU: {host.qemu_said(NAME)[-2000:]}")
    return wrong


def show_kills(host: LibvirtHost, number: int) -> int:
    """What goes wrong with a domain whose refault is killed; how much."""
    wrong = kills.run(host, number)
    print("\n".join(wrong))
    return len(wrong)


def show_starts(host: LibvirtHost, times: int) -> int:
    """The table of starts; how many cases are not as they should be."""
    wrong = 0
    print("| refault | virsh start, ms | query-status, ms | fronted | |\n|---|---|---|---|---|")
    for case, told in starts.run(host, times):
        wrong += bool(told.wrong)
        print(f"| {case} | {told} | {told.wrong or 'as it should be'} |", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.libvirt", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="this kind of migration alone")
    parser.add_argument("--emulator", action="append", choices=EMULATORS, help="of these alone")
    parser.add_argument("--times", type=int, default=1, help="each kind so often with refault")
    parser.add_argument("--lifecycle", action="store_true", help="no migrations")
    parser.add_argument("--kills", type=int, help="kill refault so often under one domain, and no more")
    parser.add_argument("--starts", type=int, help="start a domain so often in each case, and no more")
    parser.add_argument("--root", default="", help="of the suite that libvirt and QEMU are of")
    given = parser.parse_args()
    wrong = 0
    with libvirt_hosts(given.root and os.path.abspath(given.root)) as hosts:
        print(hosts[0].must("version").strip(), flush=True)
        if given.kills:
            return show_kills(hosts[0], given.kills)
        if given.starts:
            return show_starts(hosts[0], given.starts)
        if not given.only:
            wrong += show_lifecycle(hosts[0])
        if not given.lifecycle:
            wrong += show_migrations(hosts, given.only, given.emulator or USUAL, given.times)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
