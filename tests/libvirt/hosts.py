"""Two libvirt hosts on one machine, of Debian's own packages or another suite's. Needs root; no systemd.

Each host is a set of namespaces (first_process.py), so that it has its own libvirtd, refault, QEMUs and
files below /etc/libvirt, /run and /var, and all of them end with it. QEMU runs as libvirt-qemu, a user that
only the hosts have. libvirt and QEMU of another suite run in its root (tests/tools/suite), a chroot which
has what the two share with refault at the same places.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.certificates import make_certificates
from tests.support.until import until

from refault.daemon.telling import snapshot
from refault.daemon.telling.snapshot import VmStatus
from refault.lab.netns import Host as Network
from refault.lab.netns import two_hosts

ROOT = Path(__file__).parents[2]
SHARED = "/run/lab"
"""Where a host's guests, disks and programs are, for its QEMUs to read."""
_WRAPPER = f"{SHARED}/refault-qemu-system-x86_64"
_QEMU_ALONE = "/usr/bin/qemu-system-x86_64"
EMULATORS = {"bare": _QEMU_ALONE, "refault": _WRAPPER, "session": _WRAPPER, "second": _QEMU_ALONE}
"""`session`: a refault whose migrations are sessions; `second`: one at a second monitor."""
SECOND_MONITOR = "/var/lib/libvirt/qemu/vm.refault"
VIRSH_TIMEOUT = 200.0
STARTS_WITHIN = 120.0
"""Seconds for a daemon, on a machine that has much else to do."""
_UID = 64055  # as Debian's libvirt-daemon-system has it
_USERFAULTFD = Path("/proc/sys/vm/unprivileged_userfaultfd")
_KVM = Path("/dev/kvm")
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
{namespaces}
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
_SECOND = f"""
[vm.vm]
qemu = "{SECOND_MONITOR}"
listen = "/run/refault/vm.qmp"
recover_uri = "tcp:{{destination}}:49300"
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
    root: str
    """Of the suite that libvirt and QEMU are of; empty where they are the machine's own."""
    destination: str
    """The address of the host that domains migrate to."""
    refault: str | None = None
    """For which of EMULATORS its refault is; None: it does not run."""
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

    def in_suite(self, *command: str) -> list[str]:
        """The command line of a program of the suite's, for `run` and `start`."""
        return ["chroot", self.root, *command] if self.root else list(command)

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

    def virsh(self, *command: str) -> Result:
        """virsh, at this host's libvirtd."""
        return self.run(*self.in_suite("virsh", "-q", "-c", "qemu:///system", *command))

    def must(self, *command: str) -> str:
        """What a virsh says that has to succeed. Raises AssertionError."""
        result = self.virsh(*command)
        assert result.code == 0, (command, result)
        return result.output

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

    def qemu_said(self, domain: str) -> str:
        """What libvirt has on record of a domain's QEMU: how it was started, and what it has said."""
        return (self.directory / f"log/qemu/{domain}.log").read_text(errors="replace")

    def signal(self, name: str, number: str) -> None:
        """Sends a daemon a signal."""
        self.run("kill", f"-{number}", *self.run("pgrep", "-f", "--", _PATTERNS[name]).output.split())
        if number == "CONT":  # nsenter stops with what it has started, and does not go on with it
            self._running[name].send_signal(signal.SIGCONT)

    def kill(self, name: str, number: str = "TERM") -> None:
        """Ends a daemon, if it runs, and waits for that."""
        if name == "refault":
            self.refault = None
        started = self._running.pop(name, None)
        if started is None:
            return
        self.signal(name, number)
        started.wait(30)

    def start_libvirtd(self) -> None:
        """Starts libvirtd; returns when it answers."""
        self.start("libvirtd", *self.in_suite("/usr/sbin/libvirtd", "--listen"))
        until(
            lambda: self.virsh("list").code == 0,
            lambda: self.said("libvirtd"),
            seconds=STARTS_WITHIN,
            pause=0.1,
        )

    def start_refault(self, variant: str = "refault") -> None:
        """Starts refault; returns when domains may be handed to it."""
        told = _REFAULT.format(session="auto" if variant == "session" else "off")
        if variant == "second":
            told += _SECOND.format(destination=self.destination)
        (self.files / "refault.toml").write_text(told)
        self.refault = variant
        self.start("refault", sys.executable, "-m", "refault", "serve", "--config", f"{SHARED}/refault.toml")
        until(self._takes_hand_overs, lambda: self.said("refault"), seconds=STARTS_WITHIN, pause=0.02)

    def _takes_hand_overs(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(f"/proc/{self.pid}/root/run/refault/exec")
            return True
        return False

    def refault_says(self) -> VmStatus | None:
        """What refault says of the one VM; None where there is none, or it does not answer."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as control:
            control.settimeout(5)
            control.connect(f"/proc/{self.pid}/root/run/refault/refault.control")
            with control.makefile("rb") as document:
                vms = snapshot.decode(document.read()).vms
            return vms[0] if vms else None
        return None

    def is_fronted(self) -> bool:
        """Whether refault is in front of the one VM, and its own end would be noticed by nobody."""
        told = self.refault_says()
        return told is not None and told.qemu.connected and told.clients.kept

    def until_fronted(self) -> None:
        """Waits for that."""
        until(self.is_fronted, lambda: self.said("refault")[-2000:], seconds=STARTS_WITHIN, pause=0.02)

    def end(self) -> None:
        """Ends all that runs there."""
        self.first.kill()
        with self.first:  # waits
            for started in self._running.values():
                started.wait()

    def lose_channel(self) -> int:
        """Resets the migration channel alone; how many of its connections there were."""
        ports = " or ".join(f"{end} = :{port}" for port in _CHANNEL_PORTS for end in ("sport", "dport"))
        killed = self.run("ss", "-HKnt", f"( {ports} )")
        assert killed.code == 0, killed
        return len(re.findall(r"(?m)^ESTAB", killed.output))


_PATTERNS = {"libvirtd": "^/usr/sbin/libvirtd", "refault": "-m refault serve", "events": "virsh.* event "}


def _lay(directory: Path, root: str, network: Network, hosts: dict[str, str]) -> None:
    for each in ("etc", "lib", "log", "cache"):
        (directory / each).mkdir()
    shutil.copytree(f"{root}/etc/libvirt", directory / "etc/libvirt")
    # Its /dev for one domain is made without what a chroot has there.
    namespaces = "namespaces = [ ]" if root else ""
    own = {"uuid": uuid.uuid4(), "address": network.address, "shared": SHARED, "namespaces": namespaces}
    (directory / "etc/libvirt/libvirtd.conf").write_text(_LIBVIRTD.format(**own))
    (directory / "etc/libvirt/qemu.conf").write_text(_QEMU.format(**own))
    known = "".join(f"{address} {host}\n" for host, address in hosts.items())
    (directory / "etc/hosts").write_text(f"127.0.0.1 localhost\n{known}")
    kvm = _KVM.stat().st_gid if _KVM.exists() else _UID + 1
    users = [
        line
        for line in Path(f"{root}/etc/passwd").read_text().splitlines()
        if not line.startswith("libvirt-qemu:")
    ]
    (directory / "etc/passwd").write_text(
        "\n".join([*users, f"libvirt-qemu:x:{_UID}:{_UID}::/var/lib/libvirt:/usr/sbin/nologin", ""])
    )
    groups = [
        line
        for line in Path(f"{root}/etc/group").read_text().splitlines()
        if line.split(":")[0] not in ("kvm", "libvirt-qemu")
        and line.split(":")[2] not in (str(kvm), str(_UID))
    ]
    (directory / "etc/group").write_text(
        "\n".join([*groups, f"kvm:x:{kvm}:libvirt-qemu", f"libvirt-qemu:x:{_UID}:", ""])
    )


def _wrapper(directory: Path) -> Path:
    program = directory / "refault-qemu-system-x86_64"
    sources = sorted(map(str, (ROOT / "wrapper").glob("*.c")))
    # It waits for refault as long as a busy machine takes.
    options = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-static", "-DREFAULT_PATIENCE=20000"]
    subprocess.run(["gcc", *options, "-o", str(program), *sources], check=True)
    return program


def _begin(name: str, network: Network, directory: Path, root: str, destination: str) -> LibvirtHost:
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
            root,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout
    assert first.stdout.readline() == "ready\n"
    [pid] = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    return LibvirtHost(name, network, directory, first, int(pid), root, destination)


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
def _kvm() -> Iterator[None]:
    """Where no udev has given it to its group it may be root's alone."""
    before = _KVM.stat().st_mode if _KVM.exists() else None
    if before is not None:
        _KVM.chmod(stat.S_IMODE(before) | 0o060)
    try:
        yield
    finally:
        if before is not None:
            _KVM.chmod(stat.S_IMODE(before))


@contextlib.contextmanager
def libvirt_hosts(root: str = "") -> Iterator[list[LibvirtHost]]:
    """Both, with libvirtd and refault, and the emulators of EMULATORS.

    ``root``: of the suite that libvirt and QEMU are of; empty for the machine's own."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="refault-libvirt-")))
        directory.chmod(0o755)
        stack.enter_context(_userfaultfd())
        stack.enter_context(_kvm())
        networks = stack.enter_context(two_hosts())
        named = {f"host{number}": network for number, network in enumerate(networks, 1)}
        program = _wrapper(directory)
        (directory / "tls").mkdir()
        make_certificates(directory / "tls", ",".join(f"IP:{network.address}" for network in networks))
        hosts = []
        for name, network in named.items():
            (directory / name).mkdir()
            _lay(directory / name, root, network, {each: other.address for each, other in named.items()})
            host = _begin(name, network, directory / name, root, networks[1].address)
            stack.callback(host.end)
            hosts.append(host)
            shutil.copy(program, host.files / program.name)
            shutil.copytree(directory / "tls", host.files / "tls")
            for each in (host.files / "tls").iterdir():
                each.chmod(0o644)
            (host.files / "written").mkdir()
            os.chown(host.files / "written", _UID, _UID)
        with ThreadPoolExecutor() as threads:  # each takes seconds
            begun = [
                threads.submit(start) for host in hosts for start in (host.start_refault, host.start_libvirtd)
            ]
            for one in begun:
                one.result()
        yield hosts
