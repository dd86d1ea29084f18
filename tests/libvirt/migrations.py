"""What `virsh migrate` does, of each kind, undisturbed and with lost channels."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from tests.libvirt.domains import (
    NAME,
    Events,
    check_memory,
    file,
    lines_without_numbers,
    prepare,
    remove,
    wait_guest,
    xml,
)
from tests.libvirt.hosts import LibvirtHost, Result
from tests.support.until import until

POSTCOPY = (
    "--live",
    "--postcopy",
    "--postcopy-after-precopy",
    "--bandwidth",
    "30",
    "--postcopy-bandwidth",
    "10",
)
"""Not done by the end of the first pass, with the lab's guest, and some seconds of postcopy."""

PATIENCE = 20.0
"""Seconds in which a migration ends that goes on without virsh."""


@dataclass(frozen=True)
class Kind:
    """One, by what virsh is given."""

    name: str
    options: tuple[str, ...]
    losses: int = 0
    """Channels lost in postcopy."""
    by_copy: bool = False
    """Whether the disk is not shared."""


KINDS = (
    Kind("precopy", ("--live",)),
    Kind("postcopy", POSTCOPY),
    Kind("parallel", ("--live", "--parallel", "--parallel-connections", "2")),
    Kind("p2p", ("--live", "--p2p")),
    Kind("p2p tunnelled", ("--live", "--p2p", "--tunnelled")),
    Kind("persistent undefinesource", ("--live", "--persistent", "--undefinesource")),
    Kind("copy-storage-all", ("--live", "--copy-storage-all"), by_copy=True),
    Kind("tls", ("--live", "--tls")),
    Kind("postcopy tls", (*POSTCOPY, "--tls")),
    Kind("postcopy, 1 lost", POSTCOPY, losses=1),
    Kind("postcopy, 3 lost", POSTCOPY, losses=3),
    Kind("postcopy, 10 lost", POSTCOPY, losses=10),
)


@dataclass(frozen=True)
class Migrated:
    """What came of one."""

    result: Result
    states: tuple[str, ...]
    """Of both domains as virsh ended, source first."""
    later: tuple[str, ...]
    """The same once libvirt knows of no postcopy any more, or PATIENCE later."""
    events: tuple[tuple[str, ...], ...]
    lost: int
    memory: str
    """What is wrong with it; nothing where it is right."""

    @property
    def comparable(self) -> tuple[object, ...]:
        """What is to be the same with any emulator, where no channel is lost."""
        said = tuple(lines_without_numbers(self.result.text))
        told = tuple(
            tuple(line for line in each if "migration-iteration" not in line) for each in self.events
        )  # how often a memory is gone over depends on how busy the machine is
        return (self.result.code, said, self.later, told, self.memory)

    def __str__(self) -> str:
        ends = f"{self.result.code}, {self.result.seconds:4.1f} s"
        return f"{ends}; {' / '.join(self.later)}; memory {self.memory or 'right'}"


def _state(host: LibvirtHost) -> str:
    said = host.virsh("domstate", NAME, "--reason")
    return said.output.strip() if said.code == 0 else "no domain"


def _is_in_postcopy(host: LibvirtHost) -> bool:
    said = host.virsh("qemu-monitor-command", NAME, '{"execute":"query-migrate"}').output
    return '"status":"postcopy-active"' in said


def _is_over(host: LibvirtHost) -> bool:
    return "post-copy" not in _state(host)


def _lose(
    source: LibvirtHost, destination: LibvirtHost, losses: int, migrated: threading.Event, lost: list[int]
) -> None:
    """Loses channels, each once the memory has gone on behind the one before."""
    for _ in range(losses):
        until(
            lambda: migrated.is_set() or _is_in_postcopy(source),
            lambda: (_state(source), _state(destination)),
            seconds=60,
            pause=0.05,
        )
        if migrated.is_set():
            return
        lost.append(source.lose_channel())


def run(source: LibvirtHost, destination: LibvirtHost, variant: str, kind: Kind) -> Migrated:
    """One migration of a domain with an emulator, to its end. Leaves nothing of it."""
    for host in (source, destination):
        prepare(host, variant)
    domain = file(source, "vm.xml", xml(variant, disk=kind.by_copy))
    events = [Events.listen(host) for host in (source, destination)]
    try:
        source.must("virsh", "-q", "define", domain)
        source.must("virsh", "-q", "start", NAME)
        wait_guest(source)
        for each in events:
            each.seen()
        migrated, lost = threading.Event(), list[int]()
        troubles = threading.Thread(target=_lose, args=(source, destination, kind.losses, migrated, lost))
        troubles.start()
        to = f"qemu+tcp://{destination.address}/system"
        result = source.virsh("migrate", *kind.options, NAME, to)
        migrated.set()
        troubles.join()
        states = (_state(source), _state(destination))
        try:
            until(
                lambda: _is_over(source) and _is_over(destination), lambda: None, seconds=PATIENCE, pause=0.1
            )
        except AssertionError:
            memory = "split"
        else:
            memory = "not there" if "running" not in _state(destination) else check_memory(destination)
        later = (_state(source), _state(destination).replace("paused (user)", "running"))
        return Migrated(
            result, states, later, tuple(tuple(each.seen()) for each in events), sum(map(bool, lost)), memory
        )
    finally:
        for each in events:
            each.close()
        for host in (source, destination):
            remove(host)


def what_is_wrong(kind: Kind, bare: Migrated, *fronted: Migrated) -> str:
    """What is not as it should be with refault; nothing where all is."""
    if not kind.losses:
        different = [each for each in fronted if each.comparable != bare.comparable]
        return "not as without refault" if different else ""
    *_, session = fronted
    if session.result.code or not session.lost:
        return "virsh fails with a session"
    ends = [(each.later, each.memory) for each in fronted]
    return "" if ends == [(("shut off (migrated)", "running (migrated)"), "")] * 2 else "a wrong end"
