"""Two libvirt hosts on one machine, of Debian's own packages. Needs root; no systemd.

Each host is a set of namespaces (first_process.py), so that it has its own libvirtd, refault, QEMUs and
files below /etc/libvirt, /run and /var, and all of them end with it. QEMU runs as libvirt-qemu, a user that
only the hosts have.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.certificates import make_certificates
from tests.support.until import until

from refault.lab.netns import Host as Network
from refault.lab.netns import two_hosts

ROOT = Path(__file__).parents[2]
SHARED = "/run/lab"
"""Where a host's guests, disks and programs are, for its QEMUs to read."""
_WRAPPER = f"{SHARED}/refault-qemu-system-x86_64"
EMULATORS = {"bare": "/usr/bin/qemu-system-x86_64", "refault": _WRAPPER, "session": _WRAPPER}
"""`session`: a refault whose migrations are sessions."""
VIRSH_TIMEOUT = 100.0
_UID = 64055  # as Debian's libvirt-daemon-system has it
_USERFAULTFD = Path("/proc/sys/vm/unprivileged_userfaultfd")
_CHANNEL_PORTS = range(49152, 49216)
_LIBVIRTD = """
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
"""
_QEMU = """
stdio_handler = "file"
security_driver = "none"
cgroup_controllers = [ ]
user = "libvirt-qemu"
group = "libvirt-qemu"
migration_address = "{address}"
migration_host = "{address}"
migrate_tls_x509_cert_dir = "{shared}/tls"
default_tls_x509_cert_dir = "{shared}/tls"
default_tls_x509_verify = 0
"""
_REFAULT = """
[daemon]
exec = "/run/refault/exec,allow-user=libvirt-qemu"

[defaults]
session = "{session}"
"""


@dataclass(frozen=True)
class Result:
    """What a command ended with, and after how many seconds."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def text(self) -> str:
        """All that it said."""
        return self.output + self.errors


@dataclass
class LibvirtHost:
    """One of the two."""

    name: str
    network: Network
    directory: Path
    first: subprocess.Popen[str]
    pid: int
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Its address."""
        return self.network.address

    @property
    def files(self) -> Path:
        """SHARED, seen from outside."""
        return Path(f"/proc/{self.pid}/root{SHARED}")

    def inside(self, *command: str) -> list[str]:
        """A command line that runs inside."""
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "--", *command]

    def run(self, *command: str, timeout: float = VIRSH_TIMEOUT) -> Result:
        """Runs a command to its end; exit status 124 where that has not come in time."""
        began = time.monotonic()
        ended = subprocess.run(
            self.inside("timeout", "-k", "1", str(timeout), *command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        return Result(ended.returncode, ended.stdout, ended.stderr, time.monotonic() - began)

    def must(self, *command: str) -> str:
        """What a command says that has to succeed. Raises AssertionError."""
        result = self.run(*command)
        assert result.code == 0, (command, result)
        return result.output

    def virsh(self, *command: str) -> Result:
        """virsh, at this host's libvirtd."""
        return self.run("virsh", "-q", "-c", "qemu:///system", *command)

    def start(self, name: str, *command: str) -> None:
        """Starts a daemon, whose output is kept."""
        with (self.directory / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                self.inside(*command), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def said(self, name: str) -> str:
        """What a daemon has said."""
        log = self.directory / f"{name}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def kill(self, name: str, number: str = "TERM") -> None:
        """Ends a daemon, if it runs, and waits for that."""
        started = self._running.pop(name, None)
        if started is None:
            return
        self.run("kill", f"-{number}", *self.run("pgrep", "-f", "--", _PATTERNS[name]).output.split())
        started.wait(30)

    def start_libvirtd(self) -> None:
        """Starts libvirtd; returns when it answers."""
        self.start("libvirtd", "/usr/sbin/libvirtd", "--listen")
        until(lambda: self.virsh("list").code == 0, lambda: self.said("libvirtd"), pause=0.05)

    def start_refault(self, *, sessions: bool = False) -> None:
        """Starts refault; returns when domains may be handed to it."""
        told = _REFAULT.format(session="auto" if sessions else "off")
        (self.files / "refault.toml").write_text(told)
        self.start("refault", sys.executable, "-m", "refault", "serve", "--config", f"{SHARED}/refault.toml")
        until(
            lambda: self.run("test", "-S", "/run/refault/exec").code == 0,
            lambda: self.said("refault"),
            pause=0.05,
        )

    def end(self) -> None:
        """Ends all that runs there."""
        self.first.kill()
        with self.first:  # waits
            for started in self._running.values():
                started.wait()

    def lose_channel(self) -> int:
        """Resets the migration channel alone; how many of its connections there were."""
        ports = " or ".join(f"{end} = :{port}" for port in _CHANNEL_PORTS for end in ("sport", "dport"))
        killed = self.must("ss", "-HKnt", f"( {ports} )")
        return len(re.findall(r"(?m)^ESTAB", killed))


_PATTERNS = {"libvirtd": "^/usr/sbin/libvirtd", "refault": "-m refault serve", "events": "virsh.* event "}


def _lay(directory: Path, name: str, network: Network, hosts: dict[str, str]) -> None:
    for each in ("etc", "lib", "log", "cache"):
        (directory / each).mkdir()
    shutil.copytree("/etc/libvirt", directory / "etc/libvirt")
    own = {"uuid": uuid.uuid4(), "address": network.address, "shared": SHARED}
    (directory / "etc/libvirt/libvirtd.conf").write_text(_LIBVIRTD.format(**own))
    (directory / "etc/libvirt/qemu.conf").write_text(_QEMU.format(**own))
    known = "".join(f"{address} {host}\n" for host, address in hosts.items())
    (directory / "etc/hosts").write_text(f"127.0.0.1 localhost\n{known}")
    kvm = os.stat("/dev/kvm").st_gid if os.path.exists("/dev/kvm") else _UID + 1
    users = [
        line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("libvirt-qemu:")
    ]
    (directory / "etc/passwd").write_text(
        "\n".join([*users, f"libvirt-qemu:x:{_UID}:{_UID}::/var/lib/libvirt:/usr/sbin/nologin", ""])
    )
    groups = [
        line
        for line in Path("/etc/group").read_text().splitlines()
        if line.split(":")[0] not in ("kvm", "libvirt-qemu")
        and line.split(":")[2] not in (str(kvm), str(_UID))
    ]
    (directory / "etc/group").write_text(
        "\n".join([*groups, f"kvm:x:{kvm}:libvirt-qemu", f"libvirt-qemu:x:{_UID}:", ""])
    )


def _wrapper(directory: Path) -> Path:
    program = directory / "refault-qemu-system-x86_64"
    sources = sorted(map(str, (ROOT / "wrapper").glob("*.c")))
    subprocess.run(
        ["gcc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-static", "-o", str(program), *sources], check=True
    )
    return program


def _begin(name: str, network: Network, directory: Path) -> LibvirtHost:
    entered = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--mount",
        "--uts",
        "--ipc",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    first = subprocess.Popen(
        [
            *network.prefix,
            *entered,
            sys.executable,
            str(Path(__file__).with_name("first_process.py")),
            name,
            str(directory),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout
    assert first.stdout.readline() == "ready\n"
    [pid] = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    return LibvirtHost(name, network, directory, first, int(pid))


@contextlib.contextmanager
def _userfaultfd() -> Iterator[None]:
    """QEMU has no capability under libvirt, and postcopy needs this."""
    before = _USERFAULTFD.read_text()
    _USERFAULTFD.write_text("1")
    try:
        yield
    finally:
        _USERFAULTFD.write_text(before)


@contextlib.contextmanager
def libvirt_hosts(*, count: int = 2) -> Iterator[list[LibvirtHost]]:
    """``count`` hosts with libvirtd and refault, and the emulators of EMULATORS."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="refault-libvirt-")))
        directory.chmod(0o755)
        stack.enter_context(_userfaultfd())
        networks = stack.enter_context(two_hosts())[:count]
        named = {f"host{number}": network for number, network in enumerate(networks, 1)}
        program = _wrapper(directory)
        (directory / "tls").mkdir()
        make_certificates(directory / "tls", ",".join(f"IP:{network.address}" for network in networks))
        hosts = []
        for name, network in named.items():
            (directory / name).mkdir()
            _lay(directory / name, name, network, {each: other.address for each, other in named.items()})
            host = _begin(name, network, directory / name)
            stack.callback(host.end)
            hosts.append(host)
            shutil.copy(program, host.files / program.name)
            shutil.copytree(directory / "tls", host.files / "tls")
            for each in (host.files / "tls").iterdir():
                each.chmod(0o644)
            (host.files / "written").mkdir()
            os.chown(host.files / "written", _UID, _UID)
            host.start_refault()
        for host in hosts:
            host.start_libvirtd()
        yield hosts
