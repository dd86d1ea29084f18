"""``make install``: what lies where, and that the program and the unit it puts there work."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import refault
from refault.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
# One worker for all: what they look at is installed once.
pytestmark = [pytest.mark.xdist_group("install"), pytest.mark.timeout(300)]


def run(*command: str | Path, **more: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False, env=os.environ | more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation in a PREFIX of its own, with nothing of this make's settings."""
    directory = tmp_path_factory.mktemp("system")
    run("make", "install", f"PREFIX={directory}/usr", f"SYSCONFDIR={directory}/etc", MAKEFLAGS="")
    return directory


def test_program_runs(system: Path) -> None:
    emulator = run(system / "usr/bin/refault-qemu-system-x86_64", "--version")
    assert emulator == run(Path("/usr/bin/qemu-system-x86_64"), "--version")
    assert os.readlink(system / "usr/bin/refault-qemu-kvm") == "refault-qemu-system-x86_64"
    assert run(system / "usr/bin/refault", "--version") == f"refault {refault.__version__}\n"


def test_each_command_has_its_page_and_shells_complete_it(system: Path) -> None:
    share = system / "usr/share"
    assert {page.stem for page in share.glob("man/man1/*.1")} == {
        "refault",
        *(f"refault-{c}" for c in COMMANDS),
    }
    assert (share / "bash-completion/completions/refault").exists()
    assert (share / "zsh/site-functions/_refault").exists()


def test_unit_is_one_that_systemd_takes(system: Path) -> None:
    unit = system / "usr/lib/systemd/system/refault@.service"
    assert f"ExecStart={system}/usr/bin/refault run " in unit.read_text()
    instance = unit.with_name("refault@vm1.service")
    instance.symlink_to(unit.name)
    assert run("systemd-analyze", "verify", instance) == ""


def test_unit_of_the_whole_host_is_one_that_systemd_takes(system: Path) -> None:
    unit = system / "usr/lib/systemd/system/refault.service"
    assert f"ExecStart={system}/usr/bin/refault serve\n" in unit.read_text()
    assert run("systemd-analyze", "verify", unit) == ""
    files = system / "etc/refault/refault.toml"
    assert files.stat().st_mode & 0o777 == 0o644
    assert run(system / "usr/bin/refault", "check", "--config", files) == "no VM\n"
    example = re.findall(r"^# (\[.*|\w+ = .*)", files.read_text(), flags=re.MULTILINE)
    files.with_name("example.toml").write_text("\n".join(example))
    told = run(system / "usr/bin/refault", "check", files.with_name("example.toml"))
    assert told.startswith("vm1: unix:/run/qemu/vm1.real on unix:/run/qemu/vm1\n{stem}: ")


def test_environment_file_is_an_example_and_kept(system: Path) -> None:
    example = system / "etc/refault/example.env"
    assert "ARGS=" in example.read_text()
    assert example.stat().st_mode & 0o777 == 0o640


def test_users_and_directories_are_what_systemd_reads(system: Path) -> None:
    users = (system / "usr/lib/sysusers.d/refault.conf").read_text()
    assert "u refault - " in users
    directories = (system / "usr/lib/tmpfiles.d/refault.conf").read_text()
    assert "d /run/refault :0755 :refault :refault -" in directories


def test_destdir_is_in_no_file_that_is_installed(tmp_path: Path) -> None:
    run("make", "install", f"DESTDIR={tmp_path}", "PREFIX=/opt/x", MAKEFLAGS="")
    library = tmp_path / "opt/x/lib/refault"
    assert (library / "bin/refault").read_text().startswith("#!/opt/x/lib/refault/bin/python\n")
    assert os.readlink(tmp_path / "opt/x/bin/refault") == "/opt/x/lib/refault/bin/refault"
    unit = (tmp_path / "opt/x/lib/systemd/system/refault@.service").read_text()
    assert "/opt/x/bin/refault run" in unit
    assert "@PREFIX@" not in unit
    assert str(tmp_path) not in unit
