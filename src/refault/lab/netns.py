"""Two network namespaces and a veth pair: two hosts, as far as TCP can tell. Needs root and iproute2.

Namespaces are entered with nsenter (util-linux): `ip -n` and `ip netns exec` make a mount namespace too and
remount what is below `/` as slaves, which is refused where `/` is no mount point, as in a chroot.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000  # sched.h; Python has setns from 3.12 on
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Host:
    """One of the two: its namespace, its address, and what to put before a command to run it there."""

    namespace: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """The beginning of a command line that runs inside."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--"]

    def link(self, state: str) -> None:
        """Sets its end of the link `up` or `down`; down, the network is silent for both."""
        _ip("link", "set", "veth0", state, inside=self)

    def socket(self) -> socket.socket:
        """A TCP socket of this host, for whoever is not inside."""
        made: list[socket.socket] = []
        failures: list[OSError] = []

        def make() -> None:  # only this thread enters
            with open(f"/run/netns/{self.namespace}", "rb") as namespace:
                if _libc.setns(namespace.fileno(), _CLONE_NEWNET) < 0:
                    failures.append(OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())))
                else:
                    made.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return made[0]

    def limit(self, rate: str) -> None:
        """Lets no more out of it than ``rate``, as tc(8) spells it (`100mbit`)."""
        bucket = ["tbf", "rate", rate, "burst", "64k", "latency", "20ms"]
        _run([*self.prefix, "tc", "qdisc", "replace", "dev", "veth0", "root", *bucket])


def _ip(*arguments: str, inside: Host | None = None) -> None:
    _run([*(inside.prefix if inside else ()), "ip", *arguments])


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"{' '.join(command)}: {result.stderr.strip() or result.returncode}")


@contextlib.contextmanager
def two_hosts(subnet: str = "192.0.2") -> Iterator[tuple[Host, Host]]:
    """Makes two namespaces with addresses ``subnet``.1 and .2, removed when the block is left.

    Raises OSError, with what `ip` said, where that is not permitted.
    """
    hosts = tuple(Host(f"refault-{os.getpid()}-{side}", f"{subnet}.{side}") for side in (1, 2))
    one, other = hosts
    with contextlib.ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "del", host.namespace)
        peer = ["peer", "name", "veth0", "netns", other.namespace]
        _ip("link", "add", "veth0", "netns", one.namespace, "type", "veth", *peer)
        for host in hosts:
            _ip("addr", "add", f"{host.address}/24", "dev", "veth0", inside=host)
            _ip("link", "set", "lo", "up", inside=host)
            host.link("up")
        yield one, other
