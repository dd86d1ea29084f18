"""A Debian of its own that systemd boots, in a container: what is installed there stays there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.support import until as support

ROOT = Path(__file__).parents[2]
SUITE = os.environ.get("REFAULT_SUITE")
"""That of the Debian, where it is not this machine's (`make systemd SUITE=trixie`)."""
BASE = ROOT / ".nspawn" / (SUITE or "debian")
OTHERS = (ROOT / ".qemus").resolve()
"""Other QEMUs than the machine's own, where `make qemus` has put them, are at the same place there."""
T = TypeVar("T")
PATIENCE = 120
# The system is an overlay over what tests/tools/nspawn has made, in memory, seen by this process tree alone.
_BOOT = """
mount -t tmpfs -o mode=755 tmpfs "$place"
mkdir "$place/changed" "$place/work" "$place/system"
layers=lowerdir=$below,upperdir=$place/changed,workdir=$place/work
mount -t overlay overlay -o "$layers" "$place/system"
exec systemd-nspawn --quiet --register=no --keep-unit --boot --console=pipe --machine="debian-$$" \
    --directory="$place/system" --private-network --system-call-filter='userfaultfd pidfd_getfd @memlock' \
    --bind-ro=/usr:/host/usr --bind-ro="$checkout:/host/checkout" ${others:+"--bind-ro=$others"}
"""
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


class Debian:
    """It runs. Commands are run there as root."""

    def __init__(self, init: int) -> None:
        self._enter = ["nsenter", f"--target={init}", "--all", "--wdns=/", "--"]

    def is_running(self) -> bool:
        return self.attempt("systemctl", "is-system-running").stdout.strip() == "running"

    def failed(self) -> str:
        """What keeps it from running."""
        return self.attempt("sh", "-c", "systemctl is-system-running; systemctl --failed").stdout

    def attempt(self, *command: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """Runs a command and says what became of it, with standard error in standard output."""
        return subprocess.run(
            [*self._enter, *command],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def run(self, *command: str, timeout: float = PATIENCE) -> str:
        """What a command says that must not fail."""
        done = self.attempt(*command, timeout=timeout)
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}"
        return done.stdout

    def sh(self, script: str, timeout: float = PATIENCE) -> str:
        """The same, of a script each of whose commands must not fail."""
        return self.run("sh", "-euc", script, timeout=timeout)

    def show(self, unit: str, key: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={key}", unit).strip()

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit", unit)

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-euc", 'mkdir -p "${1%/*}" && printf %s "$2" >"$1"', "-", path, text)

    def status(self) -> dict[str, Any]:
        """What `refault status` says, by VM."""
        told = self.sh("refault status --json 2>/run/said || [ $? -eq 6 ] || { cat /run/said; exit 1; }")
        return {vm["name"]: vm for vm in json.loads(told)["vms"]}


def make_base() -> None:
    """Has BASE be there."""
    subprocess.run([ROOT / "tests/tools/nspawn", BASE.parent, *([SUITE] if SUITE else [])], check=True)


def migration(python: str, source: str, destination: str, what: str) -> list[str]:
    """The command that runs `under_units` there, with that refault's Python and with /var/lib/lab."""
    # userfaultfd catches the kernel's own faults with that capability alone.
    who = ["setpriv", "--reuid=vm", "--regid=vm", "--clear-groups"]
    who += ["--inh-caps=+sys_ptrace", "--ambient-caps=+sys_ptrace"]
    script = "/host/checkout/tests/integration/under_units.py"
    return [*who, python, script, "/var/lib/lab", source, destination, what]


def make_environment() -> dict[str, str]:
    """For `make install` and `make deb`: of the wheel that CI has built, if it has, and of no other make."""
    environment = os.environ | {"MAKEFLAGS": ""}
    if built := os.environ.get("REFAULT_DIST"):
        environment["PACKAGE"] = str(next(Path(built).glob("refault-*.whl")))
    return environment


@contextlib.contextmanager
def booted(directory: Path, *layers: Path) -> Iterator[Debian]:
    """Boots one with its files in `directory`, what is in `layers` laid over it, this checkout as
    /host/checkout, read-only, and a user `vm`. All that runs there is killed at the end.
    """
    make_base()
    place, log = directory / "debian", directory / "debian.log"
    place.mkdir()
    words = {"place": place, "below": ":".join(map(str, [*layers, BASE])), "checkout": ROOT}
    words["others"] = OTHERS if OTHERS.exists() else ""
    with contextlib.ExitStack() as stack:
        join = "".join(f'echo $$ >"{each}/cgroup.procs"\n' for each in stack.enter_context(_cgroups()))
        output = stack.enter_context(log.open("wb"))
        nspawn = subprocess.Popen(
            ["unshare", "--mount", "sh", "-euc", join + _BOOT],
            env=os.environ | {name: str(word) for name, word in words.items()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        stack.enter_context(nspawn)
        stack.callback(nspawn.kill)
        init = _first_process(nspawn, log)
        stack.callback(os.kill, init, signal.SIGKILL)
        debian = Debian(init)
        until(debian.is_running, debian.failed)
        if os.path.exists("/dev/kvm"):
            debian.run("mknod", "--mode=666", "/dev/kvm", "c", "10", "232")
        debian.run("useradd", "--system", "--user-group", "vm")
        yield debian


def _first_process(nspawn: subprocess.Popen[bytes], log: Path) -> int:
    """The process that is number 1 there, once it is systemd."""
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")

    def booting() -> list[int]:
        assert nspawn.poll() is None, log.read_text()
        pids = [int(pid) for pid in children.read_text().split()]
        return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "systemd\n"]

    return until(booting, log.read_text)[0]


def one_system(name: str) -> list[pytest.MarkDecorator]:
    """Marks of a module whose tests share one that they boot."""
    return [
        pytest.mark.qemu,
        pytest.mark.xdist_group(name),
        pytest.mark.timeout(600),  # the first of all makes the system
        pytest.mark.skipif(os.geteuid() != 0, reason="root alone may boot a container"),
    ]


def until(look: Callable[[], T], tell: Callable[[], str]) -> T:
    """Looks until there is something to see. Fails with what `tell` says."""
    return support.until(look, tell, seconds=PATIENCE, pause=0.05)


@contextlib.contextmanager
def _cgroups() -> Iterator[list[Path]]:
    """A control group for the container in each hierarchy that systemd keeps its units in."""
    mounts = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()[:3]
        if kind == "cgroup2":
            mounts[""] = before.split()[4]
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            mounts["name=systemd"] = before.split()[4]
    # One name: in the hierarchy of systemd's own nspawn makes what there is in the unified one.
    name = f"debian-{os.getpid()}-{time.monotonic_ns()}"
    groups = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in mounts:
            groups.append(Path(f"{mounts[controllers]}{path}", name))
    for group in groups:
        group.mkdir()
    try:
        yield groups
    finally:
        until(lambda: all(map(_removed, groups)), lambda: f"processes are left in {groups}")


def _removed(group: Path) -> bool:
    """A killed process is in its group until it is reaped."""
    try:
        for directory, _, _ in os.walk(group, topdown=False):
            os.rmdir(directory)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    return not group.exists()
