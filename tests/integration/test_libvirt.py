"""libvirt itself, with QEMU alone and with refault; `make libvirt-lab` has more."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.libvirt import lifecycle, migrations
from tests.libvirt.hosts import LibvirtHost, libvirt_hosts

PACKAGING = Path(__file__).parents[2] / "packaging"
SHORT = migrations.Kind(
    "postcopy, 1 lost, and soon over",
    (
        "--live",
        "--postcopy",
        "--postcopy-after-precopy",
        "--bandwidth",
        "40",
        "--postcopy-bandwidth",
        "5",
    ),
    (migrations.RESET,),
)

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes namespaces"),
    pytest.mark.xdist_group("libvirt"),  # who ends first takes userfaultfd back from all
]


def test_libvirt_does_as_with_qemu_alone_and_does_not_notice_a_lost_channel() -> None:
    with libvirt_hosts() as [source, destination]:

        def live(host: LibvirtHost, variant: str) -> list[lifecycle.Step]:
            return lifecycle.run(host, variant, lifecycle.SHORT_STEPS)

        with ThreadPoolExecutor() as threads:
            bare, fronted = threads.map(live, (source, destination), ("bare", "refault"))
        assert {step.result.code for step in bare} == {0}
        assert [step.said for step in fronted] == [step.said for step in bare]
        # Some of them come behind the end of the command.
        told, beside = ([event for step in steps for event in step.events] for steps in (fronted, bare))
        assert told == beside
        run = migrations.run(source, destination, "refault", SHORT)
    assert (run.result.code, run.befell, run.later, run.memory) == (0, 1, migrations.ENDS, ""), run


@pytest.mark.nightly
def test_virsh_migrate_fails_where_qemu_is_alone() -> None:
    with libvirt_hosts() as [source, destination]:
        alone = migrations.run(source, destination, "bare", SHORT)
    assert "failed in post-copy phase" in alone.result.text
    assert alone.later == ("paused (post-copy failed)", "running (post-copy failed)")


@pytest.mark.nightly
def test_virsh_migrate_does_not_notice_lost_channels_of_a_session() -> None:
    [kind] = [kind for kind in migrations.KINDS if kind.name == "postcopy, 3 lost"]
    with libvirt_hosts() as [source, destination]:
        run = migrations.run(source, destination, "session", kind)
    assert (run.result.code, run.befell, run.later, run.memory) == (0, 3, migrations.ENDS, ""), run


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
