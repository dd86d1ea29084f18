"""Two network namespaces and veth pairs between them: two hosts, as far as TCP can tell. Needs root and
iproute2.

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
    """One of the two: its namespace, its address in each network, and what to put before a command to run it
    there.
    """

    namespace: str
    addresses: tuple[str, ...]

    @property
    def address(self) -> str:
        """Its address in the first network."""
        return self.addresses[0]

    @property
    def prefix(self) -> list[str]:
        """The beginning of a command line that runs inside."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--"]

    def link(self, state: str, network: int = 0) -> None:
        """Sets its end of a link `up` or `down`; down, that network is silent for both."""
        _ip("link", "set", f"veth{network}", state, inside=self)

    def socket(self) -> socket.socket:
        """A TCP socket of this host, for whoever is not inside."""
        return socket_inside(f"/run/netns/{self.namespace}", socket.AF_INET, socket.SOCK_STREAM)

    def receive_buffer(self, size: int) -> None:
        """Has the kernel hold up to ``size`` bytes for who does not read, on connections that come from now
        on.
        """
        _run([*self.prefix, "sh", "-c", f"echo 4096 {size} {size} >/proc/sys/net/ipv4/tcp_rmem"])

    def limit(self, rate: str) -> None:
        """Lets no more out of it than ``rate``, as tc(8) spells it (`100mbit`)."""
        bucket = ["tbf", "rate", rate, "burst", "64k", "latency", "20ms"]
        _run([*self.prefix, "tc", "qdisc", "replace", "dev", "veth0", "root", *bucket])


def socket_inside(namespace: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket of the network namespace that the file ``namespace`` stands for, for whoever is not inside.

    Raises OSError where entering it is not permitted.
    """
    made: list[socket.socket] = []
    failures: list[OSError] = []

    def make() -> None:  # only this thread enters
        try:
            with open(namespace, "rb") as file:
                if _libc.setns(file.fileno(), _CLONE_NEWNET) < 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            made.append(socket.socket(family, kind, protocol))
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return made[0]


def _ip(*arguments: str, inside: Host | None = None) -> None:
    _run([*(inside.prefix if inside else ()), "ip", *arguments])


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"{' '.join(command)}: {result.stderr.strip() or result.returncode}")


@contextlib.contextmanager
def two_hosts(*subnets: str) -> Iterator[tuple[Host, Host]]:
    """Makes two namespaces with addresses .1 and .2 in each of ``subnets``, removed when the block is left.

    Raises OSError, with what `ip` said, where that is not permitted.
    """
    subnets = subnets or ("192.0.2",)
    one, other = (
        Host(f"refault-{os.getpid()}-{side}", tuple(f"{subnet}.{side}" for subnet in subnets))
        for side in (1, 2)
    )
    with contextlib.ExitStack() as stack:
        for host in (one, other):
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "del", host.namespace)
            _ip("link", "set", "lo", "up", inside=host)
        for network in range(len(subnets)):
            veth = f"veth{network}"
            peer = ["peer", "name", veth, "netns", other.namespace]
            _ip("link", "add", veth, "netns", one.namespace, "type", "veth", *peer)
            for host in (one, other):
                # No IPv6: the end of its duplicate address detection would be a change of the network.
                with contextlib.suppress(OSError):  # a kernel without IPv6 refuses
                    _ip("link", "set", veth, "addrgenmode", "none", inside=host)
                _ip("addr", "add", f"{host.addresses[network]}/24", "dev", veth, inside=host)
                host.link("up", network)
        yield one, other
