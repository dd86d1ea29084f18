"""What `virsh migrate` does, of each kind, undisturbed and with what befalls it in postcopy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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
from tests.libvirt.hosts import VIRSH_TIMEOUT, LibvirtHost, Result
from tests.support.until import until

from refault.migration.phase import Phase

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

PATIENCE = 60.0
"""Seconds in which a migration ends that goes on without virsh."""
PATIENCE_ALONE = 1.0
"""The same with QEMU alone: nobody recovers it."""
SILENCE, LONG_SILENCE = 12.0, 45.0
"""Seconds for which the link is down; virsh itself gives up after 30."""

ENDS = ("shut off (migrated)", "running")
"""What both domains are at the end of a migration that has not failed."""


@dataclass(frozen=True)
class Ends:
    """Of a migration that is under way."""

    source: LibvirtHost
    destination: LibvirtHost
    variant: str
    migrated: threading.Event
    """Set when virsh has ended."""


def _reset(ends: Ends) -> bool:
    def lost() -> int:
        told = ends.source.refault_says()
        return told.recovery.losses if told is not None else 0

    before = lost()
    came = until(
        lambda: "the end" if ends.migrated.is_set() else "the reset" if ends.source.lose_channel() else "",
        lambda: "no channel",
        seconds=VIRSH_TIMEOUT,
    )
    if ends.variant in ("refault", "second"):  # else the next one may be lost before that is known
        until(lambda: ends.migrated.is_set() or lost() > before, lambda: before, pause=0.02)
    # At a second monitor virsh ends with the reset.
    return came == "the reset" and (ends.variant == "second" or not ends.migrated.is_set())


def _link_down(ends: Ends, seconds: float) -> bool:
    ends.source.network.link("down")
    time.sleep(seconds)
    ends.source.network.link("up")
    return True


def _kill_refault(ends: Ends, host: LibvirtHost) -> bool:
    host.kill("refault", "KILL")
    host.start_refault(ends.variant)
    return True


def _restart_libvirtd(host: LibvirtHost) -> bool:
    host.kill("libvirtd")
    host.start_libvirtd()
    return True


RESET = "a channel lost"
LINK_DOWN, LINK_LONG_DOWN = (f"{seconds:g} s of link down" for seconds in (SILENCE, LONG_SILENCE))
KILLED_HERE, KILLED_THERE = "refault killed at the source", "refault killed at the destination"
RESTARTED_HERE, RESTARTED_THERE = "libvirtd restarted at the source", "libvirtd restarted at the destination"
TROUBLES: dict[str, Callable[[Ends], bool]] = {
    RESET: _reset,
    LINK_DOWN: lambda ends: _link_down(ends, SILENCE),
    LINK_LONG_DOWN: lambda ends: _link_down(ends, LONG_SILENCE),
    KILLED_HERE: lambda ends: _kill_refault(ends, ends.source),
    KILLED_THERE: lambda ends: _kill_refault(ends, ends.destination),
    RESTARTED_HERE: lambda ends: _restart_libvirtd(ends.source),
    RESTARTED_THERE: lambda ends: _restart_libvirtd(ends.destination),
}
"""What may befall it in postcopy, and whether it did."""
ENDS_VIRSH = {RESTARTED_THERE, LINK_LONG_DOWN}
"""Those that end virsh's own connection, so that it fails with any emulator."""


@dataclass(frozen=True)
class Kind:
    """One, by what virsh is given."""

    name: str
    options: tuple[str, ...]
    troubles: tuple[str, ...] = ()
    """Of TROUBLES, one after the other."""
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
    Kind("postcopy, 1 lost", POSTCOPY, (RESET,)),
    Kind("postcopy, 3 lost", POSTCOPY, (RESET,) * 3),
    Kind("postcopy, 10 lost", POSTCOPY, (RESET,) * 10),
    *(Kind(f"postcopy, {trouble}", POSTCOPY, (trouble,)) for trouble in (LINK_DOWN, LINK_LONG_DOWN)),
    Kind("postcopy, refault killed in turn", POSTCOPY, (KILLED_HERE, KILLED_THERE) * 3),
    *(
        Kind(f"postcopy, {trouble}, 1 lost", POSTCOPY, (trouble, RESET))
        for trouble in (KILLED_HERE, KILLED_THERE, RESTARTED_HERE, RESTARTED_THERE)
    ),
)


@dataclass(frozen=True)
class Migrated:
    """What came of one."""

    variant: str
    """Of EMULATORS."""
    result: Result
    states: tuple[str, ...]
    """Of both domains as virsh ended, source first."""
    later: tuple[str, ...]
    """The same once libvirt knows of no postcopy any more, or PATIENCE later."""
    events: tuple[tuple[str, ...], ...]
    befell: int
    """How many of its troubles did."""
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
        befell = f"{self.befell} befell; " if self.befell else ""
        return f"{ends}; {befell}{' / '.join(self.later)}; memory {self.memory or 'right'}"


def _state(host: LibvirtHost) -> str:
    said = host.virsh("domstate", NAME, "--reason")
    return said.output.strip() if said.code == 0 else "no domain"


def _is_in_postcopy(host: LibvirtHost, variant: str) -> bool:
    """Not by libvirt where there is refault, for it does not hear of pauses; nor by QEMU's status, which is
    there before the package has left: what is lost of that nobody sends again (docs/campaign.md)."""
    if variant == "bare":
        said = host.virsh("qemu-monitor-command", NAME, '{"execute":"query-migrate"}').output
        return '"status":"postcopy-active"' in said
    told = host.refault_says()
    return (
        told is not None
        and told.migration.status == "postcopy-active"
        and (variant == "second" or told.migration.phase == Phase.POSTCOPY)
        and told.recovery.losses == told.recovery.recoveries
    )


def _is_over(host: LibvirtHost) -> bool:
    return "post-copy" not in _state(host)


def _trouble(ends: Ends, troubles: tuple[str, ...], befell: list[bool]) -> None:
    """Each once both are in postcopy, again: QEMU before 8.2 recovers from no loss in a recovery."""
    # At a destination libvirt lets nobody speak.
    hosts = [ends.source] if ends.variant == "bare" else [ends.source, ends.destination]
    for trouble in troubles:
        until(
            lambda: ends.migrated.is_set() or all(_is_in_postcopy(host, ends.variant) for host in hosts),
            lambda: (_state(ends.source), _state(ends.destination)),
            seconds=VIRSH_TIMEOUT,
            pause=0.05,
        )
        if ends.migrated.is_set():
            return
        befell.append(TROUBLES[trouble](ends))


def run(source: LibvirtHost, destination: LibvirtHost, variant: str, kind: Kind) -> Migrated:
    """One migration of a domain with an emulator, to its end. Leaves nothing of it."""
    for host in (source, destination):
        prepare(host, variant)
    domain = file(source, "vm.xml", xml(variant, disk=kind.by_copy))
    # Who listens for events is disconnected where libvirtd ends.
    listens = not {RESTARTED_HERE, RESTARTED_THERE} & set(kind.troubles)
    events = [Events.listen(host) for host in (source, destination)] if listens else []
    try:
        source.must("define", domain)
        source.must("start", NAME)
        wait_guest(source)
        for each in events:
            each.seen()
        befell: list[bool] = []
        ends = Ends(source, destination, variant, threading.Event())
        troubles = threading.Thread(target=_trouble, args=(ends, kind.troubles, befell))
        troubles.start()
        to = f"qemu+tcp://{destination.address}/system"
        result = source.virsh("migrate", *kind.options, NAME, to)
        ends.migrated.set()
        troubles.join()
        states = (_state(source), _state(destination))
        try:
            until(
                lambda: _is_over(source) and _is_over(destination),
                lambda: None,
                seconds=PATIENCE_ALONE if variant == "bare" and RESET in kind.troubles else PATIENCE,
                pause=0.1,
            )
        except AssertionError:
            memory = "split"
        else:
            memory = "not there" if "running" not in _state(destination) else check_memory(destination)
        later = (_state(source), _state(destination).replace("paused (user)", "running"))
        told = tuple(tuple(each.seen()) for each in events)
        return Migrated(variant, result, states, later, told, sum(befell), memory)
    finally:
        for each in events:
            each.close()
        for host in (source, destination):
            remove(host)


def what_is_wrong(kind: Kind, bare: Migrated | None, *fronted: Migrated) -> str:
    """What is not as it should be with refault; nothing where all is. Undisturbed ones are compared with
    `bare`, if there is one. At a `second` monitor nothing keeps a pause from virsh."""
    if not kind.troubles and bare is not None:
        different = [each for each in fronted if each.comparable != bare.comparable]
        return "not as without refault" if different else ""
    if kind.troubles and not all(each.befell for each in fronted):
        return "it was over before"
    hidden = [each for each in fronted if each.variant != "second"]
    if any(each.result.code for each in hidden) and not ENDS_VIRSH & set(kind.troubles):
        return "virsh fails"
    return "" if all((each.later, each.memory) == (ENDS, "") for each in fronted) else "a wrong end"
