"""Two libvirt hosts, with QEMU alone and with refault, side by side: prints two tables, and what differs.

python -m tests.libvirt [--only KIND]... [--lifecycle]
"""

from __future__ import annotations

import argparse
import sys

from tests.libvirt import lifecycle, migrations
from tests.libvirt.hosts import EMULATORS, LibvirtHost, libvirt_hosts


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


def show_migrations(hosts: list[LibvirtHost], only: list[str]) -> int:
    """The table of migrations; how many are not as they should be."""
    wrong = 0
    print(f"| virsh migrate | {' | '.join(EMULATORS)} | |\n|---|---|---|---|---|")
    for kind in migrations.KINDS:
        if only and kind.name not in only:
            continue
        source, destination = hosts
        runs = [migrations.run(source, destination, variant, kind) for variant in EMULATORS]
        why = migrations.what_is_wrong(kind, *runs)
        wrong += bool(why)
        print(f"| {kind.name} | {' | '.join(map(str, runs))} | {why or 'as it should be'} |", flush=True)
        if why:
            for variant, run in zip(EMULATORS, runs, strict=True):
                print(f"    {variant}: {run}")
                print("\n".join(f"        {line}" for line in (run.result.text, *map(str, run.events))))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.libvirt", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="this kind of migration alone")
    parser.add_argument("--lifecycle", action="store_true", help="no migrations")
    given = parser.parse_args()
    wrong = 0
    with libvirt_hosts() as hosts:
        if not given.only:
            wrong += show_lifecycle(hosts[0])
        if not given.lifecycle:
            wrong += show_migrations(hosts, given.only)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
