"""A QEMU, a client, or somebody else on the host who makes trouble for one VM, for as long as it runs.

    python -m tests.support.troublemaker KIND PATH

PATH is QEMU's monitor, PATH.qmp where clients come, PATH.d the state directory.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

QUIET = ("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none")
_GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""},'
    b' "capabilities": ["oob"]}}\r\n'
)
_EVENT = (
    b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RTC_CHANGE",'
    b' "data": {"offset": 0, "qom-path": "/x"}}\r\n'
)


def _serve(path: Path, talk: Callable[[socket.socket], None]) -> None:
    """A QEMU that greets, and then does as it likes."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        while True:
            connection, _ = listening.accept()
            with contextlib.suppress(OSError), connection:
                connection.sendall(_GREETING)
                talk(connection)


def _garbage(connection: socket.socket) -> None:
    connection.sendall(b"{garbage]\r\n" * 1000)


def _events(connection: socket.socket) -> None:
    while True:
        if select.select([connection], [], [], 0)[0]:
            commands = connection.recv(1 << 16)
            if not commands:
                return
            for spelling in re.findall(rb'"id": *("[^"]*"|\d+)', commands):
                connection.sendall(b'{"return": {}, "id": ' + spelling + b"}\r\n")
        connection.sendall(500 * _EVENT)


def _dies(path: Path) -> None:
    while True:
        path.unlink(missing_ok=True)
        with subprocess.Popen([*QUIET, "-qmp", f"unix:{path},server=on,wait=off"]) as process:
            while not path.exists():
                time.sleep(0.01)
            time.sleep(0.05)
            process.kill()


def _vanishes(path: Path) -> None:
    directory = Path(f"{path}.d")
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.01)
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
        time.sleep(0.01)


def _client(path: Path) -> socket.socket:
    while True:
        client = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            client.connect(f"{path}.qmp")
            if client.recv(4096):
                return client
        client.close()
        time.sleep(0.02)


def _floods(path: Path, message: bytes) -> None:
    """A client who reads all and never waits for it; once thrown out, he comes again."""
    while True:
        with _client(path) as client, contextlib.suppress(OSError):
            client.sendall(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
            threading.Thread(target=_read, args=(client,), daemon=True).start()
            while True:
                client.sendall(message)


def _read(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while client.recv(1 << 20):
            pass


def _comes_and_goes(path: Path) -> None:
    while True:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(f"{path}.qmp")


def _asks(path: Path) -> None:
    while True:
        with socket.socket(socket.AF_UNIX) as control, contextlib.suppress(OSError):
            control.connect(str(path.parent / "refault.control"))


FLOODS = {
    "client floods commands": b'{"execute": "query-status"}' * 200,
    "client floods unknown commands": b'{"execute": "nonsense"}' * 200,
    "client floods out of band": b'{"exec-oob": "query-status"}' * 200,
    "client floods what is no JSON": b"{]" * 2000,
    "client floods what is no command": b"[1] " * 2000,
    "client floods long commands": b'{"execute": "query-status", "id": "%s"}' % (b"x" * 60000),
    "client floods brackets": b"[" * 1000 + b"]" * 1000,
}
QEMUS: dict[str, Callable[[Path], None]] = {
    "QEMU says garbage": lambda path: _serve(path, _garbage),
    "QEMU floods events": lambda path: _serve(path, _events),
    "QEMU dies and comes": _dies,
}
"""Those that are in the place of a QEMU."""
OTHERS: dict[str, Callable[[Path], None]] = {
    "state directory vanishes": _vanishes,
    "clients come and go": _comes_and_goes,
    "status is asked for without end": _asks,
}
KINDS = (*QEMUS, *OTHERS, *FLOODS)


def main() -> None:
    """Makes trouble, until killed."""
    kind, path = sys.argv[1], Path(sys.argv[2])
    os.nice(19)  # what is looked at is what refault does for it, not that it has a core
    if kind in FLOODS:
        _floods(path, FLOODS[kind])
    else:
        (QEMUS | OTHERS)[kind](path)


if __name__ == "__main__":
    main()
