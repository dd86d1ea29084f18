"""Who gets a name and an address, of all that want them, and of those who have them still."""

from __future__ import annotations

from pathlib import Path

from refault.daemon.monitor.address import Address
from refault.daemon.options import VmOptions
from refault.daemon.wanted import judge


def vm(name: str, qemu: str, *listen: str) -> VmOptions:
    return VmOptions(
        name=name,
        qemu=Address(f"/q/{qemu}"),
        listen=tuple(Address(f"/l/{each}", server=True) for each in listen or (name,)),
        state_dir=Path("/s"),
    )


def names(sources: dict[str, list[VmOptions]], *held: VmOptions) -> tuple[list[str], list[str], list[str]]:
    """Of those that are wanted, refused, and waiting."""
    verdict = judge(sources, {each.name: each for each in held})
    return (
        sorted(verdict.wanted),
        sorted(name for _, name in verdict.refused),
        sorted(name for _, name in verdict.waiting),
    )


def test_the_first_that_names_it_has_it() -> None:
    sources = {"files": [vm("a", "1"), vm("b", "1")], "/q/*": [vm("a", "2"), vm("c", "3", "a")]}
    assert names(sources) == (["a"], ["a", "b", "c"], [])


def test_who_gets_another_name_waits_until_the_old_one_has_left() -> None:
    old, new = vm("a", "1"), vm("b", "1")
    assert names({"files": [new]}, old) == ([], [], ["b"])
    assert names({"files": [new]}) == (["b"], [], [])


def test_who_comes_anew_waits_for_nobody_but_others() -> None:
    """Its QEMU is at another place: it leaves, and comes again."""
    assert names({"files": [vm("a", "2")]}, vm("a", "1")) == (["a"], [], [])
    assert names({"files": [vm("a", "2"), vm("b", "1")]}, vm("a", "1"), vm("b", "2")) == ([], [], ["a", "b"])


def test_who_goes_on_does_not_leave_for_a_listener_that_is_not_free_yet() -> None:
    a, b = vm("a", "1", "x"), vm("b", "2", "y")
    assert names({"files": [vm("b", "2", "x")]}, a, b) == (["b"], [], [])


def test_what_one_has_that_is_refused_now_is_not_free_either() -> None:
    """c takes a's listener, for which a leaves; so b does not get a's QEMU yet."""
    sources = {"files": [vm("c", "3", "x")], "/q/*": [vm("b", "1"), vm("a", "1", "x")]}
    assert names(sources, vm("a", "1", "x")) == ([], ["a"], ["b", "c"])


def test_who_was_handed_over_keeps_its_name_whoever_else_wants_it() -> None:
    """Its end would be its domain's."""
    listen = Address("/l/libvirt", server=True, fd=7)
    handed = VmOptions(name="a", qemu=Address("/q/1"), listen=(listen,), state_dir=Path("/s"))
    verdict = judge({"files": [vm("a", "2"), vm("b", "1")], "libvirt": [handed]}, {"a": handed})
    assert verdict.wanted == {"a": handed}
    assert sorted(verdict.refused) == [("files", "a"), ("files", "b")]
