from __future__ import annotations

import os
import subprocess

from refault.lab.netns import two_hosts


def test_two_hosts_reach_each_other_until_the_link_is_down() -> None:
    if os.geteuid() != 0:
        return  # another user must not make namespaces, and nothing else is under test
    with two_hosts() as (one, other):
        connect = f"import socket; socket.create_connection(('{other.address}', 9), timeout=0.5)"
        command = [*one.prefix, "python3", "-c", connect]
        assert b"ConnectionRefusedError" in subprocess.run(command, capture_output=True, check=False).stderr
        other.link("down")
        assert (
            b"ConnectionRefusedError" not in subprocess.run(command, capture_output=True, check=False).stderr
        )
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert one.namespace not in names
