"""The units under a real systemd, in a Debian of their own: from installation to stop."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial

import pytest
from tests.integration.debian import ROOT, Debian, booted, make_environment, migration, one_system, until

pytestmark = one_system("units")

PYTHON = "/usr/local/lib/refault/bin/python"
VM = '[vm.vm1]\nqemu = "/run/vms/vm1.real"\nlisten = "/run/vms/vm1,mode=0660,group=vm"\n'


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    """With refault installed, by somebody with a strict umask, and a QEMU of another user's."""
    directory = tmp_path_factory.mktemp("installed")
    layer = directory / "layer"
    # The machine's own Python is the container's, too.
    command = ["make", "install", f"DESTDIR={layer}", "PREFIX=/usr/local", "PYTHON=/usr/bin/python3"]
    subprocess.run(command, cwd=ROOT, umask=0o077, env=make_environment(), check=True)
    with booted(directory, layer) as debian:
        debian.sh("install -d --owner=vm /run/vms")
        qemu = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none"]
        qemu += ["-qmp", "unix:/run/vms/vm1.real,server=on,wait=off"]
        debian.run("systemd-run", "--unit=qemu-vm1", "--uid=vm", *qemu)
        yield debian


def until_fronted(debian: Debian, unit: str) -> None:
    until(lambda: debian.status()["vm1"]["qemu"]["connected"], lambda: debian.journal(unit))


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


def told_since(debian: Debian, unit: str, told: str) -> bool:
    """Whether the event loop has told again that it turns."""
    return debian.show(unit, "WatchdogTimestampMonotonic") != told


@pytest.mark.parametrize("unit", ["refault", "refault@vm1"])
def test_a_hung_event_loop_is_killed_and_begun_anew(debian: Debian, unit: str) -> None:
    debian.write("/etc/refault/vms.d/vm1.toml", VM)
    debian.write("/etc/refault/vm1.env", 'ARGS="--qemu /run/vms/vm1.real --listen /run/vms/vm1"\n')
    debian.run("systemctl", "start", unit)
    assert debian.show(unit, "WatchdogUSec") == "30s"
    debian.write(f"/run/systemd/system/{unit}.service.d/soon.conf", "[Service]\nWatchdogSec=1\n")
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
        assert debian.show("refault", "ActiveState") == "active"
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
