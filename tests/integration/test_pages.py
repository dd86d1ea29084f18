"""The commands of README.md and docs/, in a fresh Debian, and the package."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.blocks import BLOCKS, PRELUDE, SAY, SETUP, left_over, script
from tests.integration.debian import ROOT, Debian, booted, make_environment, migration, one_system, until

pytestmark = one_system("pages")

PYTHON = "/usr/lib/refault/bin/python"


STATUS = "refault status\n", "until refault status; do sleep 0.2; done\n"
"""It fails where a QEMU is not connected to yet. Who types it sees that, and types it again."""


def commands(page: str) -> list[str]:
    """What a page says is to be typed, in its blocks."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def package() -> Path:
    """What the first command of first-migration.md makes."""
    (command,) = commands("first-migration.md")[:1]
    subprocess.run(command, shell=True, cwd=ROOT, env=make_environment(), check=True)
    return max((ROOT / "dist").glob("refault_*.deb"), key=lambda file: file.stat().st_mtime)


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Iterator[Debian]:
    with booted(tmp_path_factory.mktemp("fresh")) as debian:
        debian.sh(f"mkdir /root/dist; cp /host/checkout/dist/{package.name} /root/dist")
        yield debian


def test_a_newcomer_reaches_a_recovered_migration(debian: Debian) -> None:
    _, *rest = commands("first-migration.md")
    typed = "\n".join(rest).replace(*STATUS).replace("sleep 1; }", "sleep 3; }")
    told = debian.sh(f"set -x; cd /root\n{typed}", timeout=180)
    assert "postcopy-active" in told
    assert "1 losses, " in told
    assert '"status": "running"' in told
    until(lambda: not debian.status(), lambda: debian.journal("refault"))
    for page in ("refault", "refault-serve"):
        debian.run("test", "-e", f"/usr/share/man/man1/{page}.1.gz")


def test_what_the_other_pages_say_is_typed_and_written(debian: Debian) -> None:
    """After the migration above, of whose loss the journal tells."""
    debian.write("/usr/local/bin/say", SAY)
    debian.sh(f"chmod +x /usr/local/bin/say; systemctl stop refault; {SETUP}")
    for page, planned in BLOCKS.items():
        for block, text in zip(planned, left_over(page), strict=True):
            debian.run("bash", "-euxc", PRELUDE + script(block, text))
    debian.sh("systemctl stop 'typed-*' 'qemu-*'; rm -r /run/qemu /run/typed /usr/local/bin/say")
    debian.sh("cd /run/systemd/system; rm -r refault* typed*; systemctl daemon-reload")
    debian.sh("rm /etc/refault/vms.d/* /etc/refault/vm1.env")


def test_an_upgrade_takes_over_a_postcopy_that_is_paused(debian: Debian) -> None:
    """Of vm1 and vm2, which are its ends; vm3 goes back again."""
    files, daemon, vm_by_vm, back = commands("upgrade.md")
    names = ("vm1", "vm2", "vm3")
    debian.sh(f"test -x {PYTHON} || apt install -y /root/dist/*.deb; systemctl stop refault")
    debian.sh("install -d --owner=vm /var/lib/lab; mkdir -p /run/qemu")
    for name, end in (("vm1", "src"), ("vm2", "dst")):
        debian.run("ln", "-s", f"/var/lib/lab/{end}.qmp", f"/run/qemu/{name}-qemu.qmp")
    qemu = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none"]
    qemu += ["-qmp", "unix:/run/qemu/vm3-qemu.qmp,server=on,wait=off"]
    debian.run("systemd-run", "--unit=vm3", *qemu)
    for name in names:
        arguments = f"--qemu /run/qemu/{name}-qemu.qmp --listen /run/qemu/{name}.qmp,mode=0660,group=vm"
        debian.write(f"/etc/refault/{name}.env", f'ARGS="{arguments} --client-wait 600"\n')
    debian.run("systemctl", "enable", "--now", *(f"refault@{name}" for name in names))
    paused = "/var/lib/lab/paused"
    lab = migration(PYTHON, "/run/qemu/vm1.qmp", "/run/qemu/vm2.qmp", "pause")
    debian.run("systemd-run", "--unit=lab", *lab)
    until(lambda: debian.attempt("test", "-e", paused).returncode == 0, lambda: debian.journal("lab"))

    for name in names:
        debian.sh(files.replace("vm1", name))
    told = debian.sh(daemon.replace(*STATUS))
    for name in names:
        assert f"{name}: not fronted: another refault (pid" in told
    assert debian.status()["vm1"]["migration"]["status"] == "postcopy-paused"
    for name in names:
        debian.sh(vm_by_vm.replace("vm1", name).replace(*STATUS))

    def recovered() -> bool:
        vms = debian.status()
        return all(name in vms and vms[name]["recovery"]["recoveries"] for name in names[:2])

    until(recovered, lambda: debian.journal("refault"))
    debian.run("rm", paused)
    until(lambda: debian.show("lab", "ActiveState") != "active", lambda: debian.journal("lab"))
    assert debian.show("lab", "Result") == "success", debian.journal("lab")

    debian.sh(back.replace("vm1", "vm3"), timeout=60)
    assert debian.show("refault@vm3", "ActiveState") == "active"
    until(lambda: debian.status()["vm3"]["qemu"]["connected"], lambda: debian.journal("refault@vm3"))


CLIENT = """
import json, os, socket, time
with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as file:
    sock.connect("/run/qemu/vm3.qmp")
    assert b"QMP" in file.readline()
    for command in ("qmp_capabilities", "query-status"):
        sock.sendall(json.dumps({"execute": command}).encode())
        assert b"return" in file.readline()
    open("/run/served", "w").close()
    while os.path.exists("/run/served"):
        time.sleep(0.05)
    sock.sendall(b'{"execute": "query-name"}')
    assert json.loads(file.readline()) == {"return": {}}
"""


def test_an_upgrade_of_the_package_restarts_what_runs_and_no_client_notices(debian: Debian) -> None:
    units = ("refault", "refault@vm3")
    debian.write("/run/client.py", CLIENT)
    debian.run("systemd-run", "--unit=client", "python3", "/run/client.py")
    until(
        lambda: debian.attempt("test", "-e", "/run/served").returncode == 0, lambda: debian.journal("client")
    )
    until(lambda: debian.status()["vm3"]["clients"]["kept"], lambda: debian.journal("refault@vm3"))
    before = [debian.show(unit, "MainPID") for unit in units]
    debian.sh("dpkg --install /root/dist/*.deb")
    after = [debian.show(unit, "MainPID") for unit in units]
    assert not {*before, "0"} & {*after}
    debian.run("rm", "/run/served")
    until(lambda: debian.show("client", "ActiveState") != "active", lambda: debian.journal("client"))
    assert debian.show("client", "Result") == "success", debian.journal("client")


OLD = """
import pathlib, signal
here = pathlib.Path("/run/refault/old")
signal.signal(signal.SIGTERM, lambda *_: exit((here / "stopped").touch()))
(here / "ready").touch()
while True:
    signal.pause()
"""
OLD_UNIT = """[Service]
Type=exec
EnvironmentFile=
ExecStart=
ExecStart=/usr/bin/python3 /run/old.py
"""


def test_an_upgrade_stops_what_a_restart_would_kill_and_does_what_policy_allows(debian: Debian) -> None:
    debian.write("/run/old.py", OLD)
    debian.write("/run/systemd/system/refault@old.service.d/old.conf", OLD_UNIT)
    debian.sh("systemctl daemon-reload; systemctl start refault@old")
    there = "/run/refault/old/ready"
    until(lambda: debian.attempt("test", "-e", there).returncode == 0, lambda: debian.journal("refault@old"))
    units = ("refault", "refault@vm3", "refault@old")
    configured = "/var/lib/dpkg/info/refault.postinst configure 0.0.1"
    debian.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")
    before = [debian.show(unit, "MainPID") for unit in units]
    debian.sh(f"chmod +x /usr/sbin/policy-rc.d; {configured}")
    assert [debian.show(unit, "MainPID") for unit in units] == before
    debian.sh(f"rm /usr/sbin/policy-rc.d; {configured}; test -e /run/refault/old/stopped")
    assert not {*before, "0"} & {debian.show(unit, "MainPID") for unit in units}
    debian.sh("systemctl stop refault@old; rm -r /run/systemd/system/refault@old.service.d /run/old.py")
    debian.sh("systemctl daemon-reload")


def test_the_package_goes_without_a_trace(debian: Debian) -> None:
    """But for what the operator has made; also in the midst of an upgrade, where dpkg runs no prerm."""
    debian.sh("dpkg -V refault; apt-get -q purge -y refault; rm -rf /etc/refault")
    assert left(debian) == ""
    debian.sh("dpkg --install /root/dist/*.deb; systemctl enable --now refault; touch /usr/lib/refault/lib/x")
    half = "s/^Status: install ok installed/Status: install reinstreq half-installed/"
    debian.sh(f"sed -i '/^Package: refault$/,/^$/{half}' /var/lib/dpkg/status")
    debian.sh("dpkg --purge --force-remove-reinstreq refault; rm -rf /root/dist")
    assert left(debian) == ""


def left(debian: Debian) -> str:
    """Of refault, what is there."""
    units = debian.sh("systemctl --plain --no-legend list-units 'refault*'")
    named = "'(' -name '*refault*' -or -lname '*refault*' ')'"
    files = f"find / -xdev {named} -not -path '/var/log/*' -not -path '/root/dist/*'"
    return units + debian.sh(f"{files}; ls -d /run/refault 2>/dev/null || true")
