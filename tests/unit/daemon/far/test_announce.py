"""A host whose path is back makes itself known to one that waits for its link-layer address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from refault.daemon.far.announce import Ends, announce
from refault.daemon.kernel.routes import SETTLES
from refault.lab.netns import Host, two_hosts

ANNOUNCES = """
import socket, sys
from refault.daemon.far.announce import Ends, announce
ends = Ends(socket.AF_INET, (sys.argv[1], 1), (sys.argv[2], 1))
print("ready", flush=True)
sys.stdin.readline()
print(announce(ends), flush=True)
"""


@contextmanager
def announcer(there: Host, here: Host) -> Iterator[Callable[[], str]]:
    command = [*there.prefix, sys.executable, "-c", ANNOUNCES, there.address, here.address]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None
        assert stdout.readline() == "ready\n"

        def tell() -> str:
            stdin.write("\n")
            stdin.flush()
            return stdout.readline()

        yield tell


def seconds_to_connect(*, announced: bool) -> float:
    """From when it was begun, right before the link came up."""
    with two_hosts() as (here, there), announcer(there, here) as tell:
        there.link("down")
        with there.socket() as listener, here.socket() as dialling:
            listener.bind((there.address, 0))
            listener.listen()
            dialling.setblocking(False)
            began = time.monotonic()
            dialling.connect_ex(listener.getsockname())
            there.link("up")
            time.sleep(SETTLES)
            if announced:
                assert tell() == "True\n"
            listener.settimeout(20)
            listener.accept()[0].close()
            taken = time.monotonic() - began
        if not announced:
            tell()
        return taken


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces")
def test_a_connection_under_way_is_made_as_soon_as_the_other_host_announces_itself() -> None:
    # On a loaded machine the link may take so long to come up that the SYN is sent again by then.
    assert any(seconds_to_connect(announced=True) < 0.9 for _ in range(20))
    assert seconds_to_connect(announced=False) > 0.9


def test_where_no_route_leads_it_says_so() -> None:
    ours, theirs = ("192.0.2.1", 1), ("192.0.2.2", 1)  # an address that no host has (RFC 5737)
    assert announce(Ends(socket.AF_INET, ours, theirs)) is False


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_ipv6_takes_scope_and_flow() -> None:
    assert announce(Ends(socket.AF_INET6, ("::1", 1, 0, 0), ("::1", 2, 0, 0))) is True
