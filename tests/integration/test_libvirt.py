"""libvirt itself, with QEMU alone and with refault; `make libvirt-lab` has more."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.libvirt import lifecycle, migrations
from tests.libvirt.hosts import libvirt_hosts

PACKAGING = Path(__file__).parents[2] / "packaging"

pytestmark = [pytest.mark.nightly, pytest.mark.qemu, pytest.mark.timeout(180)]


def test_what_libvirt_does_it_does_as_with_qemu_alone() -> None:
    with libvirt_hosts(count=1) as [host]:
        bare, fronted = (
            lifecycle.run(host, variant, lifecycle.SHORT_STEPS) for variant in ("bare", "refault")
        )
    assert {step.result.code for step in bare} == {0}
    assert [step.comparable for step in fronted] == [step.comparable for step in bare]


def test_virsh_migrate_does_not_notice_lost_channels_of_a_session() -> None:
    [kind] = [kind for kind in migrations.KINDS if kind.name == "postcopy, 3 lost"]
    with libvirt_hosts() as [source, destination]:
        run = migrations.run(source, destination, "session", kind)
    assert (run.result.code, run.later, run.memory) == (0, ("shut off (migrated)", "running (migrated)"), "")
    assert run.lost


def test_what_the_security_modules_are_given_is_well_formed(tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    rules = (PACKAGING / "apparmor" / "refault").read_text()
    profile.write_text(f"profile libvirt-vm {{\n{rules}\n}}\n")
    subprocess.run(["/sbin/apparmor_parser", "-Q", "-K", profile], check=True)
    module = tmp_path / "refault.mod"
    selinux = PACKAGING / "selinux"
    subprocess.run(["/usr/bin/checkmodule", "-M", "-m", "-o", module, selinux / "refault.te"], check=True)
    package, contexts = tmp_path / "refault.pp", selinux / "refault.fc"
    subprocess.run(["/usr/bin/semodule_package", "-o", package, "-m", module, "-f", contexts], check=True)
