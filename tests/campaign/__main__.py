"""The campaign of losses: `make campaign CAMPAIGN="--qemu BINARY --losses 260 --seed 1"`."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import trio
from tests.campaign.campaign import run
from tests.campaign.losses import LossClass

from refault.lab.qemu import DEFAULT_BINARY


def main() -> int:
    """The process's beginning; 1 where a loss did not end as well as QEMU allows."""
    parser = argparse.ArgumentParser(prog="make campaign", description=__doc__)
    parser.add_argument("--qemu", default=DEFAULT_BINARY, help="the QEMU binary of both ends")
    parser.add_argument("--losses", type=int, default=260, help="how many, shared by the classes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no migration after this time")
    parser.add_argument("--logs", type=Path, help="where to keep the logs of what ended badly")
    parser.add_argument(
        "--only",
        action="append",
        choices=[kind.name.lower() for kind in LossClass],
        help="these classes alone",
    )
    arguments = parser.parse_args()
    kinds = [kind for kind in LossClass if not arguments.only or kind.name.lower() in arguments.only]
    record = trio.run(
        run, arguments.qemu, kinds, arguments.losses, arguments.seed, arguments.minutes * 60, arguments.logs
    )
    print(record)
    return 1 if record.defects or record.failures else 0


if __name__ == "__main__":
    sys.exit(main())
