"""Connecting to sockets and what the kernel says about the peer."""

from __future__ import annotations

import errno
import os
import socket
import stat

import trio

from refault.daemon.kernel.tcp import keep_alive
from refault.daemon.monitor.address import Address

CONNECT_TIMEOUT = 10.0
"""For QEMU's monitor, and for a manager that we dial."""
BACKOFF = (0.05, 1.0)
"""The first and the longest pause between two tries."""
_RETRY = 0.02


def prepare(sock: socket.socket) -> socket.socket:
    """Sets up a connected socket: non-blocking, and over TCP undelayed and noticing a dead peer."""
    sock.setblocking(False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock, 15, interval=5)
    return sock


def pauses(address: Address) -> tuple[float, float]:
    """The first and the longest pause between two tries to connect to `address`, in seconds."""
    first, longest = BACKOFF
    if address.reconnect is not None:
        longest = address.reconnect
    return min(first, longest), longest


async def dial(address: Address, timeout: float) -> socket.socket:  # noqa: ASYNC109
    """Connects, within `timeout` seconds. Raises OSError or trio.TooSlowError.

    QEMU's listen backlog is 1: while another client waits there, a connect to its unix socket fails with
    EAGAIN.
    """
    with trio.fail_after(timeout):
        if address.path is None:
            return await _dial_tcp(address)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            while True:
                try:
                    sock.connect(address.sun_path)
                except BlockingIOError:
                    await trio.sleep(_RETRY)
                except ConnectionRefusedError:
                    _must_be_socket(address)
                    raise
                else:
                    await trio.lowlevel.checkpoint()
                    return sock
        except BaseException:
            sock.close()
            raise


def _must_be_socket(address: Address) -> None:
    """A file that is no socket refuses a connection as one does on which nobody listens."""
    if address.abstract:
        return
    kind = os.stat(address.sun_path).st_mode
    if stat.S_ISDIR(kind):
        raise OSError(errno.ENOTSOCK, "that is a directory; name the socket in it")
    if not stat.S_ISSOCK(kind):
        raise OSError(errno.ENOTSOCK, "that is a file and no socket; name the path that QEMU was given")


async def _dial_tcp(address: Address) -> socket.socket:
    """To any address of the name, in both families, or in one where that is asked for."""
    hosts = [address.host]
    if address.family != socket.AF_UNSPEC:
        found = await trio.socket.getaddrinfo(
            address.host, address.port, family=address.family, type=socket.SOCK_STREAM
        )
        hosts = [str(where[0]) for *_, where in found]
    trouble: OSError | None = None
    for host in hosts:
        try:
            stream = await trio.open_tcp_stream(host, address.port)
        except OSError as error:
            trouble = trouble or error
            continue
        sock = prepare(socket.socket(fileno=stream.socket.detach()))
        if sock.getsockname() != sock.getpeername():
            return sock
        sock.close()  # nobody listens, and the kernel chose that very port for our own end
        trouble = ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    assert trouble is not None  # noqa: S101 - a name has an address
    raise trouble


def why(error: BaseException) -> str:
    """What `dial` failed with, for a line in the log."""
    if isinstance(error, trio.TooSlowError):
        return "it does not accept"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
