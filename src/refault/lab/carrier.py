"""The network between the two ends of a migration, as a process that can be killed: it forwards TCP
connections.

    python -m refault.lab.carrier --listen HOST:PORT --connect HOST:PORT [--far-pid PID]

PID is a process in the far end's network namespace, where that is another one. It behaves as a network does:
while nobody listens at the far end it does not listen either (it looks into the kernel's table, for a
connection made only to see kills a QEMU), and it connects there as soon as it has accepted. Commands come as
lines on standard input, which is a socket, and each is answered there by the same line when it is done:

    ready    nothing: it can take commands
    target N connect to port N of the far end from now on
    once N M I,J  connect to port N or M, to each listening socket once, to those with inodes I and J never
    open     start to forward (before that it holds no port: a spare one waits like this)
    reset    break all connections, both sides see a reset
    close    close all connections: the sides see an orderly end
    cut WHEN HOW WAY N PATTERN
             reset or close (HOW) one connection, once, when N bytes have passed after PATTERN, a regular
             expression over bytes, in hexadecimal (N below 0: before its last bytes); WAY is forward, to
             the far end, or backward; of those that are there `now`, or of the `next` ones. Nothing that
             comes later is passed on. HOW may be freeze, too: then nothing is lost, and the process stops
             (SIGSTOP) where as much has been read and all that was read with it is passed on
    cut-done nothing: it is answered when that cut has been made

It ends when its standard input does.
"""

from __future__ import annotations

import argparse
import os
import re
import selectors
import signal
import socket
import struct
import time
from dataclasses import dataclass

from .procnet import listeners

_CHUNK = 64 << 10
_POLL = 0.005
_POLL_CLOSED = 0.002  # somebody may be waiting
_CONNECT_DEADLINE = 5.0
_LONGEST_MATCH = 64


@dataclass(frozen=True)
class _Cut:
    """Where a connection is to be broken, and how."""

    how: bytes
    forward: bool
    extra: int
    pattern: re.Pattern[bytes]

    @property
    def freezes(self) -> bool:
        """Whether it loses nothing."""
        return self.how == b"freeze"

    @classmethod
    def parse(cls, how: bytes, way: bytes, extra: bytes, pattern: bytes) -> _Cut:
        expression = re.compile(bytes.fromhex(pattern.decode()), re.DOTALL)
        return cls(how, way == b"forward", int(extra), expression)


class _Watch:
    """A cut on its way through one connection."""

    def __init__(self, cut: _Cut) -> None:
        self.cut = cut
        self._seen = b""
        self._left: int | None = None

    def allowed(self, data: bytes) -> bytes:
        """What of ``data`` may still pass; ``due`` says whether that was the last."""
        passes = len(data)
        if self._left is None:
            found = self.cut.pattern.search(self._seen + data)
            if found is None:
                self._seen = (self._seen + data)[-_LONGEST_MATCH:]
                return data
            end = max(found.end() - len(self._seen), 0)
            passes = max(end + self.cut.extra, 0)
            self._left = self.cut.extra - (len(data) - end)
        else:
            passes = self._left
            self._left -= len(data)
        return data if self.cut.freezes else data[:passes]

    @property
    def due(self) -> bool:
        """Whether all that may pass has been read."""
        return self._left is not None and self._left <= 0


class _End:
    """One socket of a forwarded connection: what was read from ``peer`` and is still to be written here."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.peer: _End = self
        self.pending = b""
        self.finished = False  # nothing more will be read from this socket
        self.shut = False  # and its peer has been told
        self.interest = 0
        self.watch: _Watch | None = None  # over what is read from this socket
        self.near = False  # accepted, not connected


class Carrier:
    """The forwarder: one thread, nothing blocks but the connection to the far end, which has a deadline."""

    def __init__(
        self, listen: tuple[str, int], connect: tuple[str, int], far_pid: int | str = "self"
    ) -> None:
        self._listen = listen
        self._far_pid = far_pid
        self._connect = connect
        self._ports = [connect[1]]
        self._inodes: set[int] = set()
        self._used: set[int] | None = None
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._look_again = 0.0
        self._opened = False
        self._ends: list[_End] = []
        self._commands = b""
        self._cut: _Cut | None = None
        self._cut_asked = False

    def run(self) -> None:
        """Forwards until standard input ends."""
        os.set_blocking(0, False)
        self._selector.register(0, selectors.EVENT_READ, None)
        while True:
            self._follow_far_end()
            for key, mask in self._selector.select(self._poll() if self._opened else None):
                if key.fd == 0:
                    if not self._take_commands():
                        return
                elif isinstance(key.data, _End):
                    self._move(key.data, mask)
                else:
                    self._accept()

    def _follow_far_end(self) -> None:
        if not self._opened or time.monotonic() < self._look_again:
            return
        wanted = self._find_far_end()
        self._look_again = time.monotonic() + self._poll()
        if wanted and self._listener is None:
            family = socket.AF_INET6 if ":" in self._listen[0] else socket.AF_INET
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self._listen)
            listener.listen()
            listener.setblocking(False)
            self._listener = listener
            self._selector.register(listener, selectors.EVENT_READ, None)
        elif not wanted and self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _find_far_end(self) -> bool:
        for port in self._ports:
            try:
                found = listeners(port, self._far_pid) - (self._used or set())
            except OSError:  # the process that stands for the far end has died
                return False
            if found:
                self._connect = (self._connect[0], port)
                self._inodes = found
                return True
        return False

    def _poll(self) -> float:
        return _POLL_CLOSED if self._listener is None else _POLL

    def _take_commands(self) -> bool:
        try:
            data = os.read(0, 4096)
        except BlockingIOError:
            return True
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            if line == b"open":
                self._opened = True
                self._follow_far_end()
            elif line.startswith((b"target ", b"once ")):
                word, *ports = line.split()
                used = ports.pop() if word == b"once" else b""
                self._ports = [int(port) for port in ports]
                self._used = {int(inode) for inode in used.split(b",")} if used else None
                self._look_again = 0.0
                self._follow_far_end()
            elif line in (b"reset", b"close"):
                while self._ends:
                    self._drop(self._ends[0], reset=line == b"reset")
            elif line.startswith(b"cut "):
                _, when, *rest = line.split(b" ")
                self._cut = _Cut.parse(*rest)
                for end in self._ends if when == b"now" else ():
                    self._watch_for_cut(end)
            elif line == b"cut-done" and self._cut is not None:
                self._cut_asked = True
                continue
            os.write(0, line + b"\n")
        return bool(data)

    def _watch_for_cut(self, end: _End) -> None:
        if self._cut is not None and end.near is self._cut.forward:
            end.watch = _Watch(self._cut)

    def _make_cut(self, end: _End, cut: _Cut) -> None:
        if not cut.freezes:
            self._drop(end, reset=cut.how == b"reset")
        self._cut = None
        for other in self._ends:
            other.watch = None
        if self._cut_asked:
            self._cut_asked = False
            os.write(0, b"cut-done\n")
        if cut.freezes:
            os.kill(os.getpid(), signal.SIGSTOP)

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        try:
            far = socket.create_connection(self._connect, timeout=_CONNECT_DEADLINE)
        except OSError:
            _reset(near)
            return
        if self._used is not None:
            self._used |= self._inodes
            self._look_again = 0.0
        one, other = _End(near), _End(far)
        one.peer, other.peer = other, one
        one.near = True
        for end in (one, other):
            self._watch_for_cut(end)
        self._ends += [one, other]
        self._watch(one)
        self._watch(other)

    def _move(self, end: _End, mask: int) -> None:
        if end not in self._ends:
            return  # dropped by an earlier event of the same round
        try:
            if mask & selectors.EVENT_WRITE:
                end.pending = end.pending[end.sock.send(end.pending) :]
            if mask & selectors.EVENT_READ and not end.peer.pending and not end.finished:
                data = end.sock.recv(_CHUNK)
                end.finished = not data
                if end.watch is not None:
                    data = end.watch.allowed(data)
                    end.finished = end.finished or (end.watch.due and not end.watch.cut.freezes)
                if data:
                    end.peer.pending = data[_send(end.peer.sock, data) :]
            for reader in (end, end.peer):
                if reader.watch is not None and reader.watch.due and not reader.peer.pending:
                    cut = reader.watch.cut
                    self._make_cut(reader, cut)
                    if not cut.freezes:
                        return
            if end.finished and not end.shut and not end.peer.pending:
                end.peer.sock.shutdown(socket.SHUT_WR)
                end.shut = True
            if end.peer.finished and not end.peer.shut and not end.pending:
                end.sock.shutdown(socket.SHUT_WR)
                end.peer.shut = True
        except BlockingIOError:
            pass
        except OSError:
            self._drop(end, reset=True)
            return
        if end.shut and end.peer.shut:
            self._drop(end, reset=False)
            return
        self._watch(end)
        self._watch(end.peer)

    def _watch(self, end: _End) -> None:
        readable = not end.finished and not end.peer.pending
        interest = (selectors.EVENT_READ if readable else 0) | (selectors.EVENT_WRITE if end.pending else 0)
        if interest == end.interest:
            return
        if end.interest:
            self._selector.unregister(end.sock)
        if interest:
            self._selector.register(end.sock, interest, end)
        end.interest = interest

    def _drop(self, end: _End, *, reset: bool) -> None:
        for each in (end, end.peer):
            self._ends.remove(each)
            if each.interest:
                self._selector.unregister(each.sock)
            if reset:
                _reset(each.sock)
            else:
                # As any forwarder closes; an end whose bytes were not all read sees a reset. To read them
                # first would leave a sender that had filled the window blocked: for a minute the kernel
                # acknowledges its probes, with the window still closed.
                each.sock.close()


def _send(sock: socket.socket, data: bytes) -> int:
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main() -> None:
    """The process's beginning."""
    parser = argparse.ArgumentParser(prog="refault.lab.carrier")
    parser.add_argument("--listen", type=_address, required=True)
    parser.add_argument("--connect", type=_address, required=True)
    parser.add_argument("--far-pid", default="self")
    arguments = parser.parse_args()
    Carrier(arguments.listen, arguments.connect, arguments.far_pid).run()


if __name__ == "__main__":
    main()
