"""Clients that misbehave, each a process of its own: python qmp_abuse.py slow|flood SOCKET."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

COMMANDS = b'{"execute": "query-status", "id": 1}' * 100


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.recv(65536)
    sock.sendall(b'{"execute": "qmp_capabilities"}')
    sock.recv(65536)
    return sock


def send_without_end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(COMMANDS)


def main(kind: str, path: str) -> None:
    sock = connect(path)
    if kind == "flood":  # reads, but sends as fast as it can
        threading.Thread(target=send_without_end, args=(sock,), daemon=True).start()
        while sock.recv(65536):
            pass
    else:  # reads nothing
        send_without_end(sock)


if __name__ == "__main__":
    main(*sys.argv[1:])
