"""An internal error in any task of a VM: that one's clients come again, its migration and other VMs go on."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio

from refault.daemon import vm as vm_module
from refault.daemon.migration import Migration
from refault.daemon.monitor.address import Address
from refault.daemon.options import VmOptions
from refault.daemon.roles.source import Source
from refault.daemon.vm import Vm
from refault.migration.relayable import NO_LANES

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""},'
    b' "capabilities": []}}\r\n'
)
_ONLY_WAIT = {"known.vm_state.VmState.run"}
"""Of the VM itself: what is in it waits for ever, and does nothing that could fail."""


async def qemu(stream: trio.SocketStream) -> None:
    """One that has nothing to say."""
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(GREETING)
        negotiation = await stream.receive_some()
        spelling = negotiation[negotiation.index(b'"id": ') + 6 : -1]
        await stream.send_all(b'{"return": {}, "id": ' + spelling + b"}\r\n")
        while await stream.receive_some():
            pass


@asynccontextmanager
async def fronted(path: Path, name: str) -> AsyncIterator[Vm]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path / f"{name}.real"))
        sock.listen(1)
        sock.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        listen = (Address(str(path / name), server=True),)
        vm = Vm(VmOptions(name=name, qemu=Address(f"{path}/{name}.real"), listen=listen, state_dir=path))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, qemu, [listener])
            await nursery.start(vm.run)
            yield vm
            vm.ends_soon()
            nursery.cancel_scope.cancel()


def tasks_of(vm: Vm, below: Any) -> Iterator[Any]:
    """The tasks of a VM."""
    for nursery in below.child_nurseries:
        for task in nursery.child_tasks:
            if task.coro.cr_frame is not None and task.coro.cr_frame.f_locals.get("self") is vm:
                yield from all_below(task)
            yield from tasks_of(vm, task)


def all_below(task: Any) -> Iterator[Any]:
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            yield from all_below(child)


def named(vm: Vm) -> dict[str, Any]:
    tasks = tasks_of(vm, trio.lowlevel.current_root_task())
    return {task.name.removeprefix("refault.daemon."): task for task in tasks}


def of_ours() -> NoReturn:
    raise KeyError("of ours")


async def greeted(at: Path) -> socket.socket:
    """A client that has come, as soon as that can be."""
    with trio.fail_after(10):
        while True:
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            try:
                client.connect(str(at))
                await trio.lowlevel.wait_readable(client)
                if client.recv(4096):
                    return client
            except OSError:
                pass
            client.close()
            await trio.sleep(0.01)


async def test_it_ends_and_renews_that_vms_front_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_module, "FRONT_PAUSES", (0.01, 0.01))
    async with fronted(tmp_path, "a") as vm, fronted(tmp_path, "b"):
        vm.succession.migration = migration = Migration(vm.state, Source, None, NO_LANES)
        with await greeted(tmp_path / "b") as other:
            (await greeted(tmp_path / "a")).close()
            while vm.monitor.clients:  # whose task is no other's concern, and comes with each
                await trio.sleep(0.01)
            names = [name for name in named(vm) if name not in _ONLY_WAIT]
            assert {"monitor.front.Front._accept", "monitor.upstream.Upstream.run"} < set(names)
            for name in names:
                with trio.fail_after(10):
                    while (task := named(vm).get(name)) is None or task._abort_func is None:
                        await trio.sleep(0.01)
                task._attempt_abort(of_ours)  # where it waits, it fails
                (await greeted(tmp_path / "a")).close()
                assert vm.migration is migration
                assert not migration.course.gone
            with pytest.raises(BlockingIOError):  # neither an end of file nor another greeting
                other.recv(1)
