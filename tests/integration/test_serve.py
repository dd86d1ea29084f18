"""`refault serve`: many VMs behind one daemon, each with an end of its own."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.integration.qemus import BINARIES
from tests.integration.qmp_tools import qemu_process
from tests.integration.test_access import ARGUMENTS, may
from tests.integration.waiting import told
from tests.support.until import until

from refault.daemon.host.errors import OperatorError
from refault.daemon.telling.control import query
from refault.daemon.telling.snapshot import Status, VmStatus
from refault.lab import bare
from refault.lab.channel import free_port, start_channel
from refault.lab.driver import refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import PairOptions, start_pair

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
GUEST = Guest(vcpus=1, log_pages=14, tick_ns=4_000_000)
CRASHING = """
import sys
from pathlib import Path
from refault.daemon.monitor.clients import Clients
taken = Clients._take
async def take(self, address, *arguments):
    crash = Path(address.path + ".crash")
    if crash.exists():
        crash.unlink()
        raise KeyError("of ours")
    await taken(self, address, *arguments)
Clients._take = take
from refault.cli.main import main
sys.exit(main())
"""
"""A refault whose front fails at the next client where there is a file named as its listener and `.crash`."""


HANDED = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(os.path.abspath("handed"))
    listening.listen()
    fd = listening.detach()
    os.dup2(fd, 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
from refault.cli.main import main
sys.exit(main())
"""
"""A refault that was handed a listener by the service manager."""


class Served:
    """A `refault serve` over `directory`/refault.toml."""

    def __init__(self, directory: Path, *command: str) -> None:
        self.directory = directory
        self.control = directory / "run" / "refault.control"
        (directory / "run").mkdir()
        (directory / "vms.d").mkdir()
        (directory / "refault.toml").touch()
        self.log = directory / "log"
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(directory / "notify"))
        self.manager.settimeout(60)
        environment = os.environ | {
            "RUNTIME_DIRECTORY": str(directory / "run"),
            "NOTIFY_SOCKET": str(directory / "notify"),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*(command or (sys.executable, "-m", "refault")), "serve", "--config", "refault.toml"],
                cwd=directory,
                stdout=log,
                stderr=log,
                env=environment,
                # fewer descriptors than it needs, as in a shell
                preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (48, HARD)),
            )

    def until_ready(self) -> list[str]:
        """What the service manager is told, up to READY=1."""
        told: list[str] = []
        while "READY=1" not in told:
            told += self.manager.recv(4096).decode().splitlines()
        return told

    def reload(self) -> list[str]:
        self.process.send_signal(signal.SIGHUP)
        return self.until_ready()

    def write(self, name: str, text: str) -> None:
        (self.directory / "vms.d" / f"{name}.toml").write_text(text)

    def vm(self, name: str) -> None:
        """Writes down a VM of this name."""
        self.write(name, f'[vm.{name}]\nqemu = "{self.directory}/{name}.real"\nlisten = "{self.at(name)}"\n')

    def at(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def status(self) -> Status:
        return query(self.control, 20)

    def until(self, condition: Callable[[Status], object]) -> Status:
        end = time.monotonic() + 40
        while True:
            with contextlib.suppress(OperatorError):
                status = self.status()
                if condition(status):
                    return status
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path, sys.executable, "-c", CRASHING)
    with served.manager, served.process:
        try:
            served.until_ready()
            yield served
        finally:
            served.process.kill()


@contextlib.contextmanager
def qemu(served: Served, name: str) -> Iterator[subprocess.Popen[bytes]]:
    with qemu_process(f"unix:{served.at(name)}.real,server=on,wait=off") as process:
        yield process


class Talk:
    """A client that notices an end of its connection."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self.greeting = self._lines.readline()

    def ask(self, command: str, **arguments: object) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        return json.loads(self._lines.readline())["return"]

    def works(self, done: threading.Event) -> int:
        """Asks until it is done; how often it was answered, in order."""
        answered = 0
        while not done.is_set():
            self._socket.sendall(json.dumps({"execute": "query-status", "id": answered}).encode())
            reply = json.loads(self._lines.readline())  # nor has an end of file, or a second greeting, come
            assert (reply["id"], reply["return"]["status"]) == (answered, "running")
            answered += 1
            done.wait(0.01)
        return answered

    def refused(self, verb: str, command: str) -> str:
        """What an error says."""
        said = {verb: command, "arguments": ARGUMENTS.get(command, {})}
        self._socket.sendall(json.dumps(said).encode())
        return str(json.loads(self._lines.readline())["error"]["desc"])

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def listening(vm: VmStatus, least: int = 1) -> bool:
    return len(vm.listeners) >= least and all(each.listening for each in vm.listeners)


def there(*names: str) -> Callable[[Status], object]:
    return lambda status: {vm.name for vm in status.vms if vm.qemu.connected and listening(vm)} == set(names)


def test_a_reload_touches_what_has_changed_and_nothing_else(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for name in ("a", "b", "z"):
            stack.enter_context(qemu(served, name))
            served.vm(name)
        told = served.reload()
        assert told[0] == "RELOADING=1"
        assert told[1].startswith("MONOTONIC_USEC=")
        served.until(there("a", "b", "z"))
        clients = [
            stack.enter_context(contextlib.closing(Talk(served.at(name)))) for name in "az" for _ in range(25)
        ]
        for client in clients:
            client.ask("qmp_capabilities")
        gone = stack.enter_context(contextlib.closing(Talk(served.at("b"))))
        done = threading.Event()
        pool = stack.enter_context(ThreadPoolExecutor(len(clients)))
        stack.callback(done.set)
        at_work = [pool.submit(client.works, done) for client in clients]

        stack.enter_context(qemu(served, "c"))
        served.vm("c")
        (served.directory / "vms.d" / "b.toml").unlink()
        served.reload()
        served.until(there("a", "c", "z"))
        assert gone._lines.readline() == b""
        until(lambda: not Path(served.at("b")).exists(), served.log.read_text)

        served.write("d", "[vm.d]\nqemu = 7\n")
        assert "RELOADING=1" in served.reload()
        [trouble] = served.status().troubles
        assert "[vm.d] qemu: 7 is not a text in quotes" in trouble
        (served.directory / "vms.d" / "d.toml").unlink()

        served.write(
            "a", f'[vm.a]\nqemu = "{served.at("a")}.real"\nlisten = ["{served.at("a")}", "{served.at("a2")}"]'
        )
        served.reload()
        status = served.until(lambda status: not status.troubles and listening(status.vms[0], 2))
        with contextlib.closing(Talk(served.at("a2"))) as another:
            assert b"QMP" in another.greeting
        done.set()
        assert all(each.result() > 1 for each in at_work)
        assert {vm.name: vm.clients.total for vm in status.vms} == {"a": 25, "c": 0, "z": 25}


def test_rules_hold_at_a_handed_listener_and_for_a_vm_that_was_found(tmp_path: Path) -> None:
    """tests/integration/test_access.py has the other kinds of listeners."""
    served = Served(tmp_path, sys.executable, "-c", HANDED)
    with served.manager, served.process:
        try:
            served.until_ready()
            with qemu(served, "a") as one, qemu(served, "b") as other:
                rule = "read_only = true"
                listener = f'{{ address = "{served.at("handed")}", {rule} }}'
                served.write("a", f'[vm.a]\nqemu = "{served.at("a")}.real"\nlisten = {listener}\n')
                listeners = (
                    f'[{{ address = "{{dir}}/{{stem}}", {rule} }},'
                    ' { address = "{dir}/{stem}.others", allow_users = ["4242"] }]'
                )
                served.write("b", f'[[watch]]\nqemu = "{served.at("[b]")}.real"\nlisten = {listeners}\n')
                served.reload()
                served.until(there("a", "b"))
                for where in (served.at("handed"), served.at("b")):
                    with contextlib.closing(Talk(where)) as client:
                        assert client.ask("qmp_capabilities", enable=["oob"]) == {}
                        schema = client.ask("query-qmp-schema")
                        commands = {each["name"] for each in schema if each["meta-type"] == "command"}
                        assert {"quit", "migrate", "human-monitor-command", "device_add"} < commands
                        for verb in ("execute", "exec-oob"):
                            for command in commands:
                                assert may(command) or "read-only" in client.refused(verb, command)
                        assert client.ask("query-status")["status"] == "running"
                with contextlib.closing(Talk(served.at("b.others"))) as not_allowed:
                    assert not_allowed.greeting == b""
                assert (one.poll(), other.poll()) == (None, None)
        finally:
            served.process.kill()


def test_a_vm_has_an_end_of_its_own(served: Served) -> None:
    with qemu(served, "a"), qemu(served, "b"):
        served.vm("a")
        served.vm("b")
        served.reload()
        served.until(there("a", "b"))
        with (
            contextlib.closing(Talk(served.at("a"))) as other,
            contextlib.closing(Talk(served.at("b"))) as own,
        ):
            other.ask("qmp_capabilities")
            Path(served.at("b") + ".crash").touch()
            with contextlib.suppress(ConnectionError), contextlib.closing(Talk(served.at("b"))) as victim:
                assert victim.greeting == b""
            assert own._lines.readline() == b""
            status = served.until(lambda status: status.vms[1].internal_errors and there("a", "b")(status))
            assert [vm.internal_errors for vm in status.vms] == [0, 1]
            assert status.vms[1].internal_error == "KeyError('of ours')"
            with contextlib.closing(Talk(served.at("b"))) as again:
                assert b"QMP" in again.greeting
            assert other.ask("query-status")["status"] == "running"


def test_a_vm_that_another_refault_fronts_is_refused_until_that_has_ended(served: Served) -> None:
    with qemu(served, "a"):
        directory = served.directory / "run" / "a"  # as refault@a has it
        directory.mkdir()
        command = [sys.executable, "-m", "refault", "run", "--name", "a", "--qemu", served.at("a") + ".real"]
        command += ["--listen", served.at("a")]
        environment = os.environ | {"RUNTIME_DIRECTORY": str(directory)}
        with subprocess.Popen(command, env=environment) as run:
            try:
                end = time.monotonic() + 40
                while not Path(served.at("a")).exists():
                    assert time.monotonic() < end
                    time.sleep(0.01)
                served.vm("a")
                served.reload()
                status = served.until(lambda status: status.troubles)
                assert f"a: not fronted: another refault (pid {run.pid})" in status.troubles[0]
                assert status.vms == ()
            finally:
                run.terminate()
        served.until(lambda status: not status.troubles and there("a")(status))


def test_vms_are_found_by_their_sockets_and_dropped_with_their_qemus(served: Served) -> None:
    (served.directory / "refault.toml").write_text(
        f'[[watch]]\nqemu = "{served.directory}/q/*/*.real"\n'
        'listen = "{dir}/{stem}"\nname = "{parent}-{stem}"\n'
    )
    served.reload()
    (served.directory / "q" / "x").mkdir(parents=True)
    with qemu(served, "q/x/a"):
        served.until(there("x-a"))
        (served.directory / "q" / "y").mkdir()
        with qemu(served, "q/y/a"):
            served.until(there("x-a", "y-a"))
        assert Path(served.at("q/y/a.real")).exists()  # it was killed
        served.until(lambda status: [vm.name for vm in status.vms] == ["x-a"])
        Path(served.at("q/y/a.real")).unlink()
        with qemu(served, "q/y/a"):
            served.until(there("x-a", "y-a"))
            assert Path(served.at("q/y/a")).exists()


@pytest.mark.parametrize("binary", BINARIES)
async def test_a_migration_outlives_an_internal_error_in_the_fronts_of_both_ends(
    tmp_path: Path, binary: str
) -> None:
    command = (sys.executable, "-c", CRASHING)
    async with (
        start_pair(GUEST, tmp_path, PairOptions(binary, binary)) as pair,
        start_channel(tmp_path, free_port()) as channel,
        refault_driver(pair, channel, tmp_path, command=command) as driver,
    ):
        await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=1 << 20)
        for end, side in enumerate(("source", "destination")):
            (tmp_path / f"{side}.client.crash").touch()
            with contextlib.suppress(ConnectionError), socket.socket(socket.AF_UNIX) as victim:
                victim.connect(str(tmp_path / f"{side}.client"))
                assert victim.recv(1) == b""
            with trio.fail_after(40):  # until it listens no more: who comes before that is disconnected too
                while (await driver.statuses())[end].internal_errors < 1:
                    await trio.sleep(0.02)
            await driver.connect_again(end)

        def goes_on(vm: VmStatus) -> bool:
            migrates = vm.migration.status, vm.migration.relay
            return (
                vm.internal_errors == 1 and vm.qemu.connected and migrates == ("postcopy-active", "tracking")
            )

        await told(driver, lambda vms: all(map(goes_on, vms)))
        await bare.finish(driver.source)
        assert [vm.recovery.losses for vm in await driver.statuses()] == [0, 0]
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict
