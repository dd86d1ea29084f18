"""Fuzzes what reads the journal of clients' connections (qmp/journal.py, qmp/saved.py, qmp/replay.py):

    python -m tests.fuzz.fuzz_journal SECONDS [SEED]

A core is at work for a while, what is written down of it is damaged, and read as the next refault would.
Whatever the damage: it is told, or gone on with to an end, soon. Exits with 1 where it is not.
"""

from __future__ import annotations

import random
import sys
import time
import traceback
from collections.abc import Iterator

import msgspec
from tests.unit.qmp.course import Course, new_core
from tests.unit.qmp.played import GREETING

from refault.daemon.kept.left import OtherVersionError
from refault.daemon.kept.taken import read_whole, replayed
from refault.qmp.journal import RECORD, TornError

_SOON = 2.0
"""Seconds of the processor's, for a file of some kilobytes."""
_EACH = 50
"""Damages of one file."""


def go_on(data: bytes) -> bool:
    """Reads a journal and goes on with what it tells to the end of all; False where it was refused."""
    core = new_core([])
    try:
        replayed(*read_whole(data), core).finish(lambda _: -1)
    except (TornError, OtherVersionError, msgspec.MsgspecError):
        return False
    for client in list(core.clients.values())[::2]:
        core.leave(client)
    core.upstream_lost()
    for client in list(core.clients.values()):
        core.leave(client)
    core.upstream_connected(b'"refault-1"')
    core.receive_upstream(GREETING % b'"oob"')
    return True


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One of the many ways in which a file can be wrong."""
    file = bytearray(data)
    at = chance.randrange(len(file))
    size = min(chance.choice((1, 1, 2, 4, 8, RECORD, 100)), len(file) - at)
    match chance.randrange(6):
        case 0:
            del file[at:]
        case 1:
            del file[at : at + size]
        case 2:
            other = chance.randrange(len(file))
            file[at:at] = file[other : other + size]
        case 3:
            file[at : at + size] = bytes([chance.choice((0, 0xFF))]) * size
        case 4:
            file[at] ^= 1 << chance.randrange(8)
        case _:
            file[at : at + size] = chance.randbytes(size)
    return bytes(file)


def courses(chance: random.Random) -> Iterator[bytes]:
    """Files of cores that were at work for a time."""
    while True:
        course = Course(chance.randrange(1 << 30))
        for _ in range(chance.randrange(60)):
            course.step()
            if chance.random() < 0.05:
                course.first.flush()
                course.first.save()
        yield course.first.file()


def main(seconds: float, seed: int) -> int:
    """For so long; 1 for a finding."""
    chance = random.Random(seed)
    until = time.monotonic() + seconds
    tried = gone_on = 0
    for whole in courses(chance):
        assert go_on(whole)
        for _ in range(_EACH):
            data = whole
            for _ in range(chance.choice((1, 1, 1, 2, 5))):
                data = damaged(data, chance) or whole
            before = time.thread_time()
            try:
                gone_on += go_on(data)
            except Exception:
                traceback.print_exc()
                print(f"seed {seed}, damage {tried}: {data.hex()}", file=sys.stderr)
                return 1
            if (took := time.thread_time() - before) > _SOON:
                print(f"seed {seed}, damage {tried}: {took:.1f} s: {data.hex()}", file=sys.stderr)
                return 1
            tried += 1
        if time.monotonic() > until:
            break
    print(f"journal, {seconds:.0f} s: {tried} damaged files, {gone_on} gone on with, seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)))
