"""How long a domain takes to start, and a command to be answered: with QEMU alone, with refault, and where
refault is stopped or hangs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from tests.libvirt.domains import NAME, file, prepare, remove, xml
from tests.libvirt.hosts import LibvirtHost

ALONE, FRONTED, STOPPED, HANGS = "none, QEMU alone", "in front", "stopped for good", "hangs (SIGSTOP)"
_CALL = f"""qemu-monitor-command {NAME} '{{"execute":"query-status"}}'"""
_CALLS = 200
"""Of one virsh, for most of the time of one is virsh's own."""
_LONGER = 0.3
"""Seconds that a start may take longer with refault."""
_PATIENCE = 3.0
"""Seconds that one may take longer that waits for refault in vain."""


@dataclass(frozen=True)
class Told:
    """Of one case. Seconds: of each start; of one call, on the average of many, each time."""

    starts: list[float]
    calls: list[float]
    fronted: bool
    wrong: str

    def __str__(self) -> str:
        shown = []
        for seconds, digits in ((self.starts, 0), (self.calls, 2)):
            middle, least, most = (f"{of(seconds) * 1000:.{digits}f}" for of in (median, min, max))
            shown.append(f"{middle} ({least} to {most})")
        return f"{' | '.join(shown)} | {'yes' if self.fronted else 'no'}"


def _call(host: LibvirtHost) -> float:
    began = host.virsh("version")
    result = host.virsh(";".join([_CALL] * _CALLS))
    assert result.code == 0, result.text
    return (result.seconds - began.seconds) / _CALLS


def _one(host: LibvirtHost, case: str) -> tuple[float, float, bool]:
    if case == STOPPED:
        host.kill("refault")
    if case == HANGS:
        host.signal("refault", "STOP")
    try:
        started = host.virsh("start", NAME)
        assert started.code == 0, started.text
    finally:
        if case == HANGS:
            host.signal("refault", "CONT")
    call = _call(host)
    fronted = case != STOPPED and host.refault_says() is not None
    assert host.must("domstate", NAME).strip() == "running"
    host.must("destroy", NAME)
    return started.seconds, call, fronted


def run(host: LibvirtHost, times: int) -> Iterator[tuple[str, Told]]:
    """Each case so often."""
    alone = 0.0
    for case in (ALONE, FRONTED, STOPPED, HANGS):
        variant = "bare" if case == ALONE else "refault"
        prepare(host, variant)
        host.must("define", file(host, "vm.xml", xml(variant)))
        try:
            starts, calls, fronted = zip(*(_one(host, case) for _ in range(times)), strict=True)
        finally:
            remove(host)
        alone = alone or median(starts)
        wrong = ""
        if set(fronted) != {case == FRONTED}:
            wrong = "refault is in front of some of them"
        elif case != HANGS and median(starts) > alone + _LONGER:
            wrong = "it takes longer than it may"
        elif max(starts) > alone + _LONGER + _PATIENCE:
            wrong = "it waits longer than it may"
        yield case, Told([*starts], [*calls], any(fronted), wrong)
