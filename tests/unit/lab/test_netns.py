from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refault.lab.netns import two_hosts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make network namespaces")

# A root directory like this one but no mount point, as a chroot's is; its mounts go when the command ends.
CHROOT = """
set -e
for entry in /*; do
    if [ -L "$entry" ]; then cp -P "$entry" "$1$entry"
    elif [ -d "$entry" ]; then mkdir "$1$entry"; mount --rbind "$entry" "$1$entry"; fi
done
root=$1; shift
exec chroot "$root" "$@"
"""
INSIDE = """
import subprocess
from refault.lab.netns import two_hosts
with two_hosts() as hosts:
    for host in hosts:
        subprocess.run([*host.prefix, "ip", "address", "show", "veth0"], check=True)
"""


def test_two_hosts_reach_each_other_until_the_link_is_down() -> None:
    with two_hosts() as (one, other):
        connect = f"import socket; socket.create_connection(('{other.address}', 9), timeout=1)"
        command = [*one.prefix, sys.executable, "-c", connect]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "ConnectionRefusedError" in run.stderr
        other.link("down")
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.stderr.endswith(("TimeoutError: timed out\n", "No route to host\n"))
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert one.namespace not in names
    assert other.namespace not in names


def test_a_second_network_lives_on_when_the_first_is_down() -> None:
    with two_hosts("192.0.2", "198.51.100") as (one, other):
        other.link("down")
        connect = f"import socket; socket.create_connection(('{other.addresses[1]}', 9), timeout=20)"
        command = [*one.prefix, sys.executable, "-c", connect]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "ConnectionRefusedError" in run.stderr


def test_a_root_that_is_no_mount_point_will_do(tmp_path: Path) -> None:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    root: list[str] = []  # where this one is no mount point, it is the one that is wanted
    if any(mount.split()[4] == "/" for mount in mounts):
        root = ["unshare", "--mount", "--propagation", "private", "sh", "-c", CHROOT, "sh", str(tmp_path)]
    command = [*root, sys.executable, "-c", INSIDE]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert "192.0.2.1/24" in run.stdout
    assert "192.0.2.2/24" in run.stdout


def test_what_ip_says_is_told() -> None:
    with two_hosts() as (one, _), pytest.raises(OSError, match=r"link set veth0 sideways: .*sideways"):
        one.link("sideways")
