"""Which VMs are to be fronted, of those that several sources want: no two share a name or an address, and
what one that leaves has is not free yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from refault.daemon import uses
from refault.daemon.options import VmOptions, changes_in_place

Sources = Mapping[str, Sequence[VmOptions]]


@dataclass(frozen=True)
class Verdict:
    """What becomes of all that is wanted."""

    wanted: dict[str, VmOptions] = field(default_factory=dict)
    """By name."""
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    """By source and name: why not."""
    waiting: dict[tuple[str, str], str] = field(default_factory=dict)
    """The same of those for which there is room when another has left."""


def judge(sources: Sources, held: Mapping[str, VmOptions]) -> Verdict:
    """Who is to be fronted; `held`: what those have who are. Who was handed over goes before all others, for
    it cannot come anew: libvirt ends a domain whose monitor it has lost.

    One of these that goes on in place waits for nobody: where a listener that it is to have from now on is
    another's still, that is tried again, and it keeps its clients.
    """
    leaving: set[str] = set()
    while True:
        verdict = _judge(sources, held, leaving)
        leave = set(_leave(verdict.wanted, held))
        if leave <= leaving:
            return verdict
        leaving |= leave


def _leave(wanted: Mapping[str, VmOptions], held: Mapping[str, VmOptions]) -> Iterator[str]:
    for name, has in held.items():
        if name not in wanted or not changes_in_place(has, wanted[name]):
            yield name


def _judge(sources: Sources, held: Mapping[str, VmOptions], leaving: set[str]) -> Verdict:
    verdict = Verdict()
    names: set[str] = set()
    taken: list[uses.Use] = []
    kept = [use for name in leaving for use in uses.of_vm(name, held[name])]
    each = [(source, options) for source, vms in sources.items() for options in vms]
    for source, options in sorted(each, key=lambda pair: not pair[1].handed):
        name = options.name
        mine = uses.of_vm(name, options)
        if name in names:
            verdict.refused[source, name] = "there is a VM of this name already"
            continue
        if (clash := _clash(taken, mine)) is not None:
            verdict.refused[source, name] = f"{_words(*clash)} already"
            continue
        names.add(name)
        taken += mine
        goes_on = name in held and changes_in_place(held[name], options)
        clash = None if goes_on else _clash([use for use in kept if use.owner != name], mine)
        if clash is None:
            verdict.wanted[name] = options
        else:
            verdict.waiting[source, name] = f"{_words(*clash)}, which is leaving"
    return verdict


def _clash(taken: list[uses.Use], mine: list[uses.Use]) -> tuple[uses.Use, uses.Use] | None:
    return next((pair for pair in uses.clashes([*taken, *mine]) if pair[0] in mine), None)


def _words(use: uses.Use, first: uses.Use) -> str:
    return f"{use.written} is {first.option} of {first.owner}"
