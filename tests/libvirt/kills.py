"""refault killed again and again while libvirt is spoken to, which does not notice."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle

from tests.libvirt.domains import NAME, Events, check_memory, file, prepare, remove, wait_guest, xml
from tests.libvirt.hosts import LibvirtHost

CALLS = (
    ("qemu-monitor-command", NAME, '{"execute":"query-status"}'),
    ("domstats", NAME),
    ("suspend", NAME),
    ("domstate", NAME, "--reason"),
    ("resume", NAME),
)
"""What libvirt is asked, over and over."""
LONGEST = 0.5
"""Seconds for which one is left alone, and none is there, at most."""
_OF_CALLS = ("'lifecycle' for domain 'vm': Suspended", "'lifecycle' for domain 'vm': Resumed")


@dataclass
class _Said:
    calls: int = 0
    failed: list[str] = field(default_factory=list)


@contextmanager
def _calls(host: LibvirtHost) -> Iterator[_Said]:
    """Makes them, to the end of a round."""
    said = _Said()
    ends = threading.Event()

    def call() -> None:
        for command in cycle(CALLS):
            result = host.virsh(*command)
            said.calls += 1
            if result.code:
                said.failed.append(f"{' '.join(command)}: {result.text.strip()}")
            if ends.is_set() and command == CALLS[-1]:
                return

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield said
    finally:
        ends.set()
        caller.join()


def run(host: LibvirtHost, kills: int) -> list[str]:
    """Kills it so often under one domain; what went wrong. Prints what was done."""
    moments = random.Random(kills)
    prepare(host, "refault")
    events = Events.listen(host)
    try:
        host.must("define", file(host, "vm.xml", xml("refault")))
        host.must("start", NAME)
        wait_guest(host)
        host.until_fronted()
        events.seen()
        with _calls(host) as said:
            for _ in range(kills):
                time.sleep(moments.uniform(0, LONGEST))
                host.kill("refault", "KILL")
                time.sleep(moments.uniform(0, LONGEST))
                host.start_refault()
                host.until_fronted()
        print(f"refault killed {kills} times beside {said.calls} calls: {len(said.failed)} failed")
        told = [line for line in events.seen() if not any(each in line for each in _OF_CALLS)]
        memory = check_memory(host)
        return [*said.failed, *told, *([memory] if memory else [])]
    finally:
        events.close()
        remove(host)
