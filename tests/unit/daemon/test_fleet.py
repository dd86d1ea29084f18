"""Which VMs are fronted, of those that several sources want."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from refault.daemon import fleet as fleet_module
from refault.daemon.fleet import Fleet
from refault.daemon.host.own_needs import Troubles
from refault.daemon.monitor.address import Address
from refault.daemon.options import VmOptions
from refault.daemon.vm import Vm


@asynccontextmanager
async def running(troubles: Troubles) -> AsyncIterator[Fleet]:
    fleet = Fleet(troubles)
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.run)
        yield fleet
        nursery.cancel_scope.cancel()


def options(directory: Path, name: str, listen: str | None = None, qemu: str | None = None) -> VmOptions:
    at = Address(str(directory / (listen or name)), server=True)
    return VmOptions(
        name=name,
        qemu=Address(str(directory / f"{qemu or name}.real")),
        listen=(at,),
        state_dir=directory / f"{name}.d",
    )


def names(fleet: Fleet) -> list[str]:
    return sorted(vm.name for vm in fleet.vms)


async def until(fleet: Fleet, *wanted: str) -> None:
    with trio.fail_after(10):
        while names(fleet) != list(wanted):
            await trio.sleep(0.01)


async def test_a_name_and_an_address_have_one_vm_and_the_next_gets_them_when_that_has_gone(
    tmp_path: Path,
) -> None:
    troubles = Troubles()
    a, b = options(tmp_path, "a"), options(tmp_path, "b")
    async with running(troubles) as fleet:
        await fleet.want(
            {"files": [a, b], "/q/*": [options(tmp_path, "a"), options(tmp_path, "c", listen="b")]}
        )
        assert names(fleet) == ["a", "b"]
        assert troubles.tell() == (
            "a of /q/*: not fronted: there is a VM of this name already",
            f"c of /q/*: not fronted: unix:{tmp_path}/b is listen of b already",
        )
        await fleet.want({"files": [a]})
        await until(fleet, "a", "c")
        assert troubles.tell() == ("a of /q/*: not fronted: there is a VM of this name already",)
        await fleet.want({"files": [], "/q/*": []})
        await until(fleet)
        assert troubles.tell() == ()
    assert os.listdir(tmp_path) == []


async def test_a_vm_whose_migration_needs_refault_leaves_when_that_has_ended_or_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "LEAVE_LOOK", 0.01)
    busy = True
    monkeypatch.setattr(Vm, "may_leave", property(lambda _: not busy))
    a = options(tmp_path, "a")
    async with running(Troubles()) as fleet:
        await fleet.want({"files": [a]})
        [vm] = fleet.vms
        await fleet.want({"files": []})
        await trio.sleep(0.05)
        assert (fleet.vms, vm.leaving) == ([vm], fleet_module.NOT_WANTED)
        await fleet.want({"files": [a]})  # wanted again
        await trio.sleep(0.05)
        assert (fleet.vms, vm.leaving) == ([vm], None)
        moved = options(tmp_path, "a", listen="a2")
        await fleet.want({"files": [moved]})
        await trio.sleep(0.05)
        assert (fleet.vms, vm.leaving, vm.options) == ([vm], None, moved)
        other = VmOptions(name="a", qemu=Address("/q"), listen=moved.listen, state_dir=moved.state_dir)
        await fleet.want({"files": [other]})
        await trio.sleep(0.05)
        assert (fleet.vms, vm.leaving) == ([vm], fleet_module.CHANGED)
        busy = False
        with trio.fail_after(10):
            while [each.options for each in fleet.vms] != [other]:
                await trio.sleep(0.01)


async def test_what_one_that_leaves_has_is_free_when_it_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a VM gets another name while its migration needs refault."""
    monkeypatch.setattr(fleet_module, "LEAVE_LOOK", 0.01)
    busy = True
    monkeypatch.setattr(Vm, "may_leave", property(lambda vm: vm.name != "a" or not busy))
    troubles = Troubles()
    a, b, c = options(tmp_path, "a"), options(tmp_path, "b", qemu="a"), options(tmp_path, "c")
    async with running(troubles) as fleet:
        await fleet.want({"files": [a]})
        await fleet.want({"files": [b, c]})
        assert names(fleet) == ["a", "c"]
        assert troubles.tell() == (
            f"b of files: not fronted: unix:{tmp_path}/a.real is qemu of a, which is leaving",
        )
        [vm, _] = fleet.vms
        await fleet.want({"files": [a]})  # wanted again under its old name
        await until(fleet, "a")
        assert (fleet.vms, vm.leaving, troubles.tell()) == ([vm], None, ())
        await fleet.want({"files": [b]})
        assert names(fleet) == ["a"]
        busy = False
        await until(fleet, "b")
        assert troubles.tell() == ()
        await fleet.want({"files": [a]})  # nothing keeps it: the new name is there when this returns
        assert names(fleet) == ["a"]


async def test_an_error_in_one_vm_is_that_ones_alone_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "RETRY", (0.01, 0.01))
    fails, made = True, fleet_module._make_state_dir

    def make(options: VmOptions) -> bool:
        if fails and options.name == "a":
            raise PermissionError("not here")
        return made(options)

    monkeypatch.setattr(fleet_module, "_make_state_dir", make)
    troubles = Troubles()
    a, b = options(tmp_path, "a"), options(tmp_path, "b")
    async with running(troubles) as fleet:
        await fleet.want({"files": [a, b]})
        assert names(fleet) == ["b"]
        assert troubles.tell() == ("a: not fronted: internal error: PermissionError('not here')",)
        fails = False
        await until(fleet, "a", "b")
        with trio.fail_after(10):
            while troubles.tell():
                await trio.sleep(0.01)


async def test_a_listener_that_cannot_be_had_at_a_reload_is_told_and_comes_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "RETRY", (0.01, 0.01))
    troubles = Troubles()
    a, place = options(tmp_path, "a"), tmp_path / "a2"
    place.write_text("no socket")
    async with running(troubles) as fleet:
        await fleet.want({"files": [a]})
        [vm] = fleet.vms
        await fleet.want({"files": [options(tmp_path, "a", listen="a2")]})
        with trio.fail_after(10):
            while not troubles.tell():
                await trio.sleep(0.01)
            assert "a2: a file that is no socket is there" in troubles.tell()[0]
            place.unlink()
            while troubles.tell() or not place.is_socket():
                await trio.sleep(0.01)
        assert fleet.vms == [vm]


async def test_an_internal_error_in_a_change_leaves_the_vm_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "RETRY", (0.01, 0.01))
    changed, change = trio.Event(), Vm.change
    tries = 0

    async def once_wrong(self: Vm, options: VmOptions) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise UnicodeError("label too long")
        await change(self, options)
        changed.set()

    monkeypatch.setattr(Vm, "change", once_wrong)
    async with running(Troubles()) as fleet:
        await fleet.want({"files": [options(tmp_path, "a")]})
        [vm] = fleet.vms
        await fleet.want({"files": [options(tmp_path, "a", listen="a2")]})
        with trio.fail_after(10):
            await changed.wait()
        assert fleet.vms == [vm]


async def test_who_wants_may_be_cancelled_and_what_was_wanted_comes(tmp_path: Path) -> None:
    async with running(Troubles()) as fleet:
        with trio.CancelScope() as scope:
            scope.cancel()
            await fleet.want({"files": [options(tmp_path, "a")]})
        await until(fleet, "a")
