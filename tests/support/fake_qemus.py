"""Monitors of QEMUs that are not there, all in one process: they greet, and answer each command with nothing.

python -m tests.support.fake_qemus PATH...
"""

from __future__ import annotations

import re
import selectors
import socket
import sys
from collections.abc import Sequence

_GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""},'
    b' "capabilities": ["oob"]}}\r\n'
)
_ID = re.compile(rb'"id": *("[^"]*"|\d+)')


def serve(paths: Sequence[str]) -> None:
    """Serves, until killed."""
    selector = selectors.DefaultSelector()
    for path in paths:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen(1)
        selector.register(sock, selectors.EVENT_READ, True)
    while True:
        for key, _ in selector.select():
            sock = key.fileobj  # type: ignore[assignment]
            if key.data:
                connection, _ = sock.accept()
                connection.sendall(_GREETING)
                selector.register(connection, selectors.EVENT_READ, False)
            elif commands := sock.recv(1 << 16):
                sock.sendall(
                    b"".join(b'{"return": {}, "id": %s}\r\n' % each for each in _ID.findall(commands))
                )
            else:
                selector.unregister(sock)
                sock.close()


if __name__ == "__main__":
    serve(sys.argv[1:])
