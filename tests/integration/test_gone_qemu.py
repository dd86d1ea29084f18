"""A QEMU that ends in any phase of a migration leaves nothing behind: not in the status, the metrics, or the
state directory. The next one at its socket begins clean."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_host import scraped, status
from tests.integration.test_service import Daemon, answer, ask, client_of, daemon, eventually

from refault.lab.channel import free_port

pytestmark = pytest.mark.qemu

GUEST = ["-M", "pc", "-m", "256", "-nodefaults", "-display", "none", "-accel", "tcg", "-S"]
"""It is stopped, so that only what is asked for moves: a minute of precopy, at 9 bytes a page."""


class Side:
    """A QEMU and its refault."""

    def __init__(self, stack: contextlib.ExitStack, place: Path, name: str, *more: str) -> None:
        self.place = place / name
        self.place.mkdir()
        self.stack = stack
        self.metrics = f"127.0.0.1:{free_port()}"
        arguments = ["--name", name, "--qemu", str(self.place / "q"), "--listen", str(self.place / "l")]
        self.refault: Daemon = stack.enter_context(daemon(self.place, *arguments, "--metrics", self.metrics))
        self.refault.wait_ready()
        self.qemu = self.start(*more)

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        (self.place / "q").unlink(missing_ok=True)
        command = ["qemu-system-x86_64", *GUEST, "-qmp", f"unix:{self.place / 'q'},server=on,wait=off", *more]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        eventually(lambda: self.vm()["qemu"]["pid"] == process.pid, self.refault.output)
        return process

    def end(self) -> None:
        self.qemu.kill()
        self.qemu.wait()

    def vm(self) -> dict[str, Any]:
        (vm,) = status(self.place)[1]["vms"]
        return vm  # type: ignore[no-any-return]

    def tell(self, name: str, **arguments: object) -> None:
        with client_of(self.place / "l") as client:
            ask(client, name, **arguments)
            assert answer(client) == "return", name

    def until(self, *wanted: str) -> None:
        eventually(lambda: self.vm()["migration"]["status"] in wanted, self.refault.output)

    def kept(self) -> set[str]:
        """What is in the state directory of a migration."""
        return {name for name in os.listdir(self.place) if re.search(r"\.(json|pages|legs)", name)}


def switch_on(side: Side, *names: str) -> None:
    side.tell(
        "migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names]
    )


@contextlib.contextmanager
def two() -> Iterator[tuple[Side, Side]]:
    with tempfile.TemporaryDirectory(prefix="r") as directory, contextlib.ExitStack() as stack:
        yield Side(stack, Path(directory), "a"), Side(stack, Path(directory), "b", "-incoming", "defer")


def migrating(source: Side, destination: Side) -> None:
    """Precopy, too slow to end."""
    port = free_port()
    for side in (source, destination):
        switch_on(side, "postcopy-ram", "events")
    slow = {"max-bandwidth": 8000, "max-postcopy-bandwidth": 100, "downtime-limit": 1}
    source.tell("migrate-set-parameters", **slow)
    destination.tell("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
    source.tell("migrate", uri=f"tcp:127.0.0.1:{port}")
    source.until("active")
    destination.until("active")


def in_postcopy(source: Side, destination: Side) -> None:
    migrating(source, destination)
    source.tell("migrate-start-postcopy")
    source.until("postcopy-active")
    destination.until("postcopy-active")


def paused(source: Side, destination: Side) -> None:
    """The other one's QEMU has ended, so that no attempt of the side that is left succeeds."""
    in_postcopy(source, destination)


PHASES: dict[str, Callable[[Side, Side], None]] = {
    "precopy": migrating,
    "postcopy": in_postcopy,
    "paused": paused,
}


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_qemu_that_is_killed_leaves_nothing_behind(phase: str, which: str) -> None:
    with two() as (source, destination):
        side, other = (source, destination) if which == "a" else (destination, source)
        PHASES[phase](source, destination)
        eventually(lambda: f"{which}.migration.json" in side.kept(), side.refault.output)
        if phase == "paused":
            other.end()
            side.until("postcopy-paused")
            if side is source:
                eventually(lambda: side.vm()["recovery"]["last_error"] is not None, side.refault.output)
        side.end()
        nothing_is_left(side, None)
        side.qemu = side.start()
        nothing_is_left(side, side.qemu.pid)
        begins_clean(side)


def nothing_is_left(side: Side, pid: int | None) -> None:
    def left() -> dict[str, object]:
        vm = side.vm()
        lines = scraped(side.metrics).splitlines()
        told = ("refault_migration_status{", "refault_leg_held{", "refault_pages_outstanding{")
        return {
            "pid": vm["qemu"]["pid"] if vm["qemu"]["pid"] != pid else None,
            "migration": vm["migration"] if vm["migration"] != NONE else None,
            "pages": {name: value for name, value in vm["pages"].items() if value},
            "error": vm["recovery"]["last_error"],
            "metrics": [line for line in lines if line.startswith(told) and not line.endswith(" 0.0")],
            "files": side.kept(),
        }

    eventually(lambda: not any(left().values()), lambda: f"{left()} {side.refault.output()}")


NONE = {
    "role": "none",
    "status": None,
    "relay": "off",
    "relay_reason": "no migration yet",
    "phase": None,
    "held": None,
    "pause_hidden_since": None,
}


def begins_clean(side: Side) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sink:
        switch_on(side, "pause-before-switchover")
        side.tell("migrate", uri=f"tcp:127.0.0.1:{sink.getsockname()[1]}")
        side.until("active", "pre-switchover")
        assert side.vm()["migration"]["role"] == "source"
        side.tell("migrate_cancel")
        side.until("cancelled")
    assert "Traceback" not in side.refault.output()
