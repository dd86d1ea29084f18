"""The campaign of losses: `make campaign CAMPAIGN="--qemu BINARY --each 20 --seed 1"`.

With --record the same command, issued again, goes on where it was: `--minutes 5 --record FILE` makes it in
pieces.
"""

from __future__ import annotations

import argparse
import random
import sys
from functools import partial
from pathlib import Path

import trio
from tests.campaign.campaign import run
from tests.campaign.losses import LossClass, classes
from tests.campaign.record import Record

from refault.lab.qemu import DEFAULT_BINARY


def main() -> int:
    """The process's beginning; 1 where a loss did not end as well as QEMU allows, or was not made."""
    parser = argparse.ArgumentParser(prog="make campaign", description=__doc__)
    parser.add_argument("--qemu", default=DEFAULT_BINARY, help="the QEMU binary of both ends")
    parser.add_argument("--each", type=int, default=20, help="how many losses of each class at least")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no migration after this time")
    parser.add_argument("--record", type=Path, help="where to keep the record, to go on with it later")
    parser.add_argument("--preempt", action="store_true", help="with postcopy-preempt: two connections")
    parser.add_argument(
        "--also", action="append", default=[], help="a capability that both switch on besides"
    )
    parser.add_argument("--logs", type=Path, help="where to keep the logs of what ended badly")
    parser.add_argument(
        "--only",
        action="append",
        choices=[kind.name.lower() for kind in LossClass],
        help="these classes alone",
    )
    arguments = parser.parse_args()
    kinds = [
        kind
        for kind in classes(preempt=arguments.preempt)
        if not arguments.only or kind.name.lower() in arguments.only
    ]
    command = " ".join(["python -m tests.campaign", *sys.argv[1:]])
    record = Record.begin(command, arguments.seed, arguments.record)
    campaign = partial(run, arguments.qemu, kinds, arguments.each, record, arguments.minutes * 60)
    also = [*(["postcopy-preempt"] if arguments.preempt else []), *arguments.also]
    trio.run(partial(campaign, also=also, keep=arguments.record, logs=arguments.logs))
    print(record)
    left = {kind.value: count for kind, count in record.left(kinds, arguments.each).items() if count}
    for kind, count in left.items():
        print(f"still to be made: {count} of {kind}")
    unmade = bool(left) and arguments.record is None  # nobody goes on with it
    return 1 if record.defects or record.failures or unmade else 0


if __name__ == "__main__":
    sys.exit(main())
