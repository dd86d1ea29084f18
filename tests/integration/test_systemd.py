"""The units under a real systemd, in a Debian of their own: from installation to stop."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.integration import other_suite
from tests.integration.debian import (
    BASE,
    OTHERS,
    ROOT,
    SUITE,
    Debian,
    booted,
    make_base,
    make_environment,
    migration,
    one_system,
    until,
)

pytestmark = one_system("units")

PYTHON = "/usr/local/lib/refault/bin/python"
QEMUS = ["qemu-system-x86_64", *(str(OTHERS / name) for name in ("qemu-10", "qemu-11"))]
VM = '[vm.vm1]\nqemu = "/run/vms/vm1.real"\nlisten = "/run/vms/vm1,mode=0660,group=vm"\n'


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    """With refault installed, by somebody with a strict umask, and a QEMU of another user's."""
    directory = tmp_path_factory.mktemp("installed")
    layer = directory / "layer"
    if SUITE:
        make_base()
        other_suite.install(BASE, layer)
    else:  # the machine's own Python is the container's, too
        command = ["make", "install", f"DESTDIR={layer}", "PREFIX=/usr/local", "PYTHON=/usr/bin/python3"]
        subprocess.run(command, cwd=ROOT, umask=0o077, env=make_environment(), check=True)
    with booted(directory, layer) as debian:
        debian.sh("install -d --owner=vm /run/vms")
        qemu = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none"]
        qemu += ["-qmp", "unix:/run/vms/vm1.real,server=on,wait=off"]
        debian.run("systemd-run", "--unit=qemu-vm1", "--uid=vm", *qemu)
        yield debian


def until_fronted(debian: Debian, unit: str) -> None:
    def fronted() -> bool:
        vms = debian.status()
        return "vm1" in vms and vms["vm1"]["qemu"]["connected"]

    until(fronted, lambda: debian.journal(unit))


def test_from_installation_to_stop(debian: Debian) -> None:
    debian.run("systemctl", "enable", "--now", "refault")
    assert debian.status() == {}
    main = debian.show("refault", "MainPID")

    debian.write("/etc/refault/vms.d/vm1.toml", VM)
    debian.run("systemctl", "reload", "refault")
    until_fronted(debian, "refault")
    assert debian.show("refault", "MainPID") == main
    for user, may in (("vm", True), ("nobody", False)):
        group = debian.run("id", "--group", user).strip()
        who = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        assert (debian.attempt(*who, "test", "-w", "/run/vms/vm1").returncode == 0) is may

    debian.write("/etc/refault/vms.d/vm2.toml", "[vm.vm2]\nqemu = 7\n")
    debian.run("systemctl", "reload", "refault")
    until(lambda: "qemu: 7 is not" in debian.journal("refault"), lambda: debian.journal("refault"))
    assert list(debian.status()) == ["vm1"]
    assert debian.attempt("systemctl", "restart", "refault").returncode != 0
    assert debian.show("refault", "ActiveState") == "failed"
    assert debian.show("refault", "ExecMainStatus") == "2"
    assert debian.show("refault", "NRestarts") == "0"
    debian.sh("rm /etc/refault/vms.d/vm2.toml; systemctl start refault")
    until_fronted(debian, "refault")

    debian.run("systemctl", "stop", "refault")
    assert debian.show("refault", "Result") == "success"
    assert debian.sh("ls /run/vms").split() == ["vm1.real"]


def test_a_reload_is_over_when_it_has_been_applied(debian: Debian) -> None:
    """Where systemd knows Type=notify-reload; where it does not, that is waited for here."""
    version = int(debian.run("systemctl", "--version").split()[1])
    told = debian.show("refault", "Type") == "notify-reload"
    assert told is (version >= 253)
    debian.sh("rm -f /etc/refault/vms.d/* /run/vms/answers")
    debian.write("/etc/refault/vms.d/vm1.toml", VM)
    debian.write("/run/client.py", CLIENT)
    debian.run("systemctl", "restart", "refault")
    until_fronted(debian, "refault")
    main = debian.show("refault", "MainPID")
    debian.run("systemd-run", "--unit=client", "--uid=vm", "python3", "/run/client.py")
    until(lambda: debian.attempt("test", "-s", "/run/vms/answers").returncode == 0, lambda: "no answer")

    def is_applied(names: str, vms: set[str], says: str) -> bool:
        """`names`: of the sockets that there are."""
        told = names.split() == sorted(vms) and debian.show("refault", "StatusText") == says
        return told and debian.status().keys() == vms

    def reloaded(vms: set[str], says: str) -> None:
        look = "find /run/vms -name 'vm[1-9]*' ! -name '*.real' -printf '%f\\n' | sort"
        names = debian.sh(f"systemctl reload refault; {look}")
        if told:
            assert is_applied(names, vms, says), debian.journal("refault")
        else:
            until(lambda: is_applied(debian.sh(look), vms, says), lambda: debian.journal("refault"))
        assert debian.show("refault", "ActiveState") == "active"

    one, many = {"vm1"}, {f"vm{number}" for number in range(1, 101)}
    try:
        debian.sh(
            "cd /etc/refault/vms.d; for n in $(seq 2 100); do sed s/vm1/vm$n/ vm1.toml >vm$n.toml; done"
        )
        reloaded(many, "serving 100 VMs")
        debian.write("/etc/refault/vms.d/vm1.toml", "[vm.vm1]\nqemu = 7\n")
        reloaded(many, "the configuration is wrong: see the log")
        assert "nothing is changed: /etc/refault/vms.d/vm1.toml" in debian.journal("refault")
        debian.sh("rm /etc/refault/vms.d/*")
        debian.write("/etc/refault/vms.d/vm1.toml", VM)
        reloaded(one, "serving 1 VMs")
        so_far = debian.run("cat", "/run/vms/answers")
        until(lambda: debian.run("cat", "/run/vms/answers") != so_far, lambda: debian.journal("client"))
        assert debian.show("client", "ActiveState") == "active"
        assert (debian.show("refault", "MainPID"), debian.show("refault", "NRestarts")) == (main, "0")
    finally:
        debian.sh("systemctl stop client || true; systemctl stop refault; systemctl reset-failed")


def told_since(debian: Debian, unit: str, told: str) -> bool:
    """Whether the event loop has told again that it turns."""
    return debian.show(unit, "WatchdogTimestampMonotonic") != told


@pytest.mark.parametrize("unit", ["refault", "refault@vm1"])
def test_a_hung_event_loop_is_killed_and_begun_anew(debian: Debian, unit: str) -> None:
    debian.write("/etc/refault/vms.d/vm1.toml", VM)
    debian.write("/etc/refault/vm1.env", 'ARGS="--qemu /run/vms/vm1.real --listen /run/vms/vm1"\n')
    debian.run("systemctl", "start", unit)
    assert debian.show(unit, "WatchdogUSec") == "30s"
    debian.write(f"/run/systemd/system/{unit}.service.d/soon.conf", "[Service]\nWatchdogSec=3\n")
    debian.sh(f"systemctl daemon-reload; systemctl restart {unit}")
    try:
        hung = debian.show(unit, "MainPID")
        for _ in range(3):  # it turns for longer than that
            told = debian.show(unit, "WatchdogTimestampMonotonic")
            until(partial(told_since, debian, unit, told), partial(debian.journal, unit))
        assert debian.show(unit, "NRestarts") == "0"
        debian.sh(f"kill -STOP {hung}")
        until(lambda: debian.show(unit, "NRestarts") == "1", lambda: debian.journal(unit))
        until(lambda: debian.show(unit, "ActiveState") == "active", lambda: debian.journal(unit))
        assert debian.show(unit, "MainPID") != hung
        assert "Watchdog timeout" in debian.journal(unit)
        until_fronted(debian, unit)
    finally:
        debian.sh(f"systemctl stop {unit}; rm -r /run/systemd/system/{unit}.service.d")
        debian.run("systemctl", "daemon-reload")


AS_USER = {
    "refault": "",  # as it is installed
    "root": "User=root\nGroup=root\n",
    "vm": "User=vm\nGroup=vm\nCapabilityBoundingSet=\nCapabilityBoundingSet=CAP_SYS_PTRACE\n"
    "AmbientCapabilities=\nAmbientCapabilities=CAP_SYS_PTRACE\n",
    "undumpable": "User=vm\nGroup=vm\n"
    "CapabilityBoundingSet=\nCapabilityBoundingSet=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH\n"
    "AmbientCapabilities=\nAmbientCapabilities=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH\n",
    # Nothing can be taken out of QEMU's process: the manager keeps connections.
    "no-ptrace": "CapabilityBoundingSet=\nCapabilityBoundingSet=CAP_DAC_OVERRIDE\n"
    "AmbientCapabilities=\nAmbientCapabilities=CAP_DAC_OVERRIDE\n",
}
CLIENT = """
import itertools, json, socket
with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as file:
    sock.connect("/run/vms/vm1")
    assert b"QMP" in file.readline()
    sock.sendall(b'{"execute": "qmp_capabilities"}')
    assert json.loads(file.readline()) == {"return": {}}
    for turn in itertools.count(1):
        sock.sendall(json.dumps({"execute": "query-status", "id": turn}).encode())
        assert json.loads(file.readline())["id"] == turn
        with open("/run/vms/answers", "w") as answers:
            answers.write(str(turn))
"""


NIGHTLY = [pytest.param(user, marks=pytest.mark.nightly) for user in ("refault", "root")]


def undumpable_qemu(debian: Debian) -> str:
    """One that has become the user vm by itself: nobody without CAP_SYS_PTRACE takes anything out of it, nor
    does its own user, as with Yama out of any (kernel/ptrace.c, __ptrace_may_access). Its monitor's path."""
    where = "/run/vms/undumpable.real"
    options = f"-M none -nodefaults -display none -runas vm -qmp unix:{where},server=on,wait=off"
    debian.sh(f"systemd-run --collect --unit=undumpable -p UMask=0 qemu-system-x86_64 {options}")
    until(lambda: debian.attempt("test", "-S", where).returncode == 0, lambda: debian.journal("undumpable"))
    pid = debian.show("undumpable", "MainPID")
    until(lambda: debian.attempt("runuser", "-uvm", "ls", f"/proc/{pid}/fd").returncode != 0, lambda: pid)
    return where


@pytest.mark.parametrize("user", [*NIGHTLY, "vm", "undumpable", "no-ptrace"])
def test_a_client_outlives_kills_and_restarts_of_the_unit_and_ends_with_a_stop(
    debian: Debian, user: str
) -> None:
    """Whoever it runs as: the QEMU is the user vm's. Yama, where the kernel has it, as most hosts have it."""
    debian.sh("rm -f /etc/refault/vms.d/* /run/vms/answers; sysctl -qe -w kernel.yama.ptrace_scope=1 || true")
    qemu = undumpable_qemu(debian) if user == "undumpable" else "/run/vms/vm1.real"
    debian.write("/etc/refault/vms.d/vm1.toml", VM.replace("/run/vms/vm1.real", qemu))
    debian.write("/run/systemd/system/refault.service.d/user.conf", f"[Service]\n{AS_USER[user]}")
    debian.write("/run/client.py", CLIENT)

    def answers() -> int:
        return int(debian.attempt("cat", "/run/vms/answers").stdout or 0)

    def kept() -> bool:
        told = debian.attempt("refault", "status", "--json").stdout
        vms = json.loads(told)["vms"] if told.startswith("{") else []
        return bool(vms) and all(vm["clients"]["kept"] for vm in vms)

    def stored() -> str:
        return debian.show("refault", "NFileDescriptorStore")

    def until_served() -> None:
        until(kept, lambda: debian.journal("refault"))
        until(lambda: stored() == ("5" if user == "no-ptrace" else "0"), stored)
        so_far = answers()
        until(lambda: answers() > so_far + 1, lambda: debian.journal("refault") + debian.journal("client"))

    debian.sh("systemctl daemon-reload; systemctl restart refault")
    try:
        until_fronted(debian, "refault")
        debian.run("systemd-run", "--unit=client", "--uid=vm", "python3", "/run/client.py")
        until(lambda: debian.attempt("test", "-s", "/run/vms/answers").returncode == 0, lambda: "no answer")
        for end in ("kill --signal=KILL refault", "restart refault"):
            until_served()
            debian.sh(f"systemctl {end}")
        until_served()
        assert debian.show("client", "ActiveState") == "active"
        debian.run("systemctl", "stop", "refault")
        until(lambda: debian.show("client", "ActiveState") == "failed", lambda: debian.journal("client"))
    finally:
        debian.sh("systemctl stop refault; systemctl stop client undumpable || true; systemctl reset-failed")
        debian.sh("rm -r /run/systemd/system/refault.service.d; systemctl daemon-reload")


CAMPAIGNS = [
    pytest.param(user, binary, 20, planned, id=f"{user}-{Path(binary).name}-{how}", marks=pytest.mark.nightly)
    for binary, user in itertools.product(QEMUS, AS_USER)
    for how, planned in (("killed", False), ("restarted", True))
]


@pytest.mark.parametrize(("user", "binary", "kills", "planned"), [("vm", QEMUS[0], 3, False), *CAMPAIGNS])
def test_no_client_notices_that_the_unit_ends(
    debian: Debian, user: str, binary: str, kills: int, *, planned: bool
) -> None:
    """The campaign of restarts (tests/campaign/restart.py), under the unit, with a QEMU of the user vm's."""
    where, qemu = "/run/vms/campaign", "/usr/local/bin/qemu-of-vm"
    become = f"setpriv --reuid=vm --regid=vm --clear-groups {binary}"
    if user == "undumpable":  # what -runas is called from 10.0 on
        become = f"{binary} {'-runas vm' if binary == QEMUS[0] else '-run-with user=vm'}"
    debian.write(qemu, f'#!/bin/sh\numask 0\nexec {become} "$@"\n')
    debian.write("/etc/refault/vms.d/vm1.toml", f'[vm.vm]\nqemu = "{where}/q"\nlisten = "{where}/f"\n')
    debian.write("/run/systemd/system/refault.service.d/user.conf", f"[Service]\n{AS_USER[user]}")
    debian.sh(f"chmod 755 {qemu}; rm -rf {where}; install -d --owner=vm {where}")
    debian.sh("systemctl stop refault; systemctl daemon-reload")
    command = ["env", "--chdir=/host/checkout", PYTHON, "-m", "tests.campaign.restart_unit", where]
    command += ["--unit=refault", "--control=/run/refault/refault.control", f"--qemu={qemu}"]
    command += [f"--kills={kills}", f"--seed={random.randrange(1 << 30)}"]
    try:
        done = debian.attempt(*command, *(["--planned"] if planned else []), timeout=500)
        print(done.stdout)
        assert done.returncode == 0, debian.journal("refault")[-20000:]
    finally:
        debian.sh("rm -r /run/systemd/system/refault.service.d; systemctl daemon-reload")


def test_sockets_of_the_managers_own_outlive_the_daemon(debian: Debian) -> None:
    """And have it started when somebody comes."""
    debian.write("/etc/refault/vms.d/vm1.toml", VM)
    sockets = "ListenStream=/run/refault/refault.control\nListenStream=/run/vms/vm1\n"
    sockets += "SocketMode=0660\nSocketGroup=vm\nRemoveOnStop=yes\n"
    debian.write("/run/systemd/system/refault.socket", f"[Socket]\n{sockets}")
    debian.sh("systemctl stop refault; systemctl daemon-reload; systemctl start refault.socket")
    try:
        inode = debian.run("stat", "--format=%i %a %G", "/run/vms/vm1")
        assert inode.split()[1:] == ["660", "vm"]
        assert debian.show("refault", "ActiveState") == "inactive"
        greet = "import socket; client = socket.socket(socket.AF_UNIX); client.settimeout(30); "
        greet += "client.connect('/run/vms/vm1'); print(client.recv(6).decode())"
        assert debian.run("python3", "-c", greet) == '{"QMP"\n'
        # It serves before it is told to be ready.
        until(lambda: debian.show("refault", "ActiveState") == "active", lambda: debian.journal("refault"))
        assert debian.status()["vm1"]["listeners"][0]["listening"]
        debian.run("systemctl", "restart", "refault")
        assert debian.run("stat", "--format=%i %a %G", "/run/vms/vm1") == inode
        assert debian.run("python3", "-c", greet) == '{"QMP"\n'
        assert "TROUBLE" not in debian.attempt("refault", "status").stdout
    finally:
        debian.run("systemctl", "stop", "refault.socket", "refault")
        debian.sh("rm /run/systemd/system/refault.socket; systemctl daemon-reload")


@pytest.mark.parametrize("units", [["refault"], ["refault@src", "refault@dst"]], ids=["one", "instances"])
def test_a_migration_is_recovered_by_confined_refaults(debian: Debian, units: list[str]) -> None:
    """Whose QEMUs and clients are another user's, as on any host that has one for them."""
    debian.sh("rm -f /etc/refault/vms.d/*; rm -rf /var/lib/lab; install -d --owner=vm /var/lib/lab")
    for end in ("src", "dst"):
        qemu, listen = f"/var/lib/lab/{end}.qmp", f"/run/vms/{end},mode=0660,group=vm"
        debian.write(f"/etc/refault/{end}.env", f'ARGS="--qemu {qemu} --listen {listen}"\n')
        if units == ["refault"]:
            text = f'[vm.{end}]\nqemu = "{qemu}"\nlisten = "{listen}"\n'
            debian.write(f"/etc/refault/vms.d/{end}.toml", text)
    debian.run("systemctl", "restart", *units)
    debian.run(*migration(PYTHON, "/run/vms/src", "/run/vms/dst", "lose"), timeout=120)
    for vm in debian.status().values():
        assert (vm["recovery"]["losses"], vm["recovery"]["recoveries"]) == (3, 3)
        assert vm["pages_total"]["requested"] > 0
        assert vm["state"]["errors"] == 0
    log = debian.journal("refault*")
    assert "TROUBLE" not in log
    assert "not permitted" not in log
    debian.run("systemctl", "stop", *units)


@pytest.mark.parametrize("unit", ["refault.service", "refault@vm1.service"])
def test_exposure(debian: Debian, unit: str) -> None:
    debian.run("systemd-analyze", "security", "--threshold=20", "--no-pager", unit)
