"""Stands where a qtest program starts its QEMU: puts a refault between the two, then becomes that QEMU.

The program listens on a unix socket and has QEMU's monitor dial it (tests/qtest/libqtest.c, from
qtest_init_without_qmp_handshake). Here QEMU dials refault, and refault the program.

The program kills and reaps the process that it started, so that one becomes QEMU. Its child, the keeper,
starts refault, ends it at QEMU's end, and leaves its exit status; __main__.py has orphans come to it, and
reaps it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STARTS_WITHIN = 45.0
"""Seconds until refault listens; libqtest waits 50 for its QEMU (SOCKET_TIMEOUT)."""
ENDS_WITHIN = 20.0
"""Seconds from the end of its QEMU until refault has ended."""
_MONITOR = "socket,path="
_MONITOR_END = ",id=char0"
_LISTENS = "00010000"
"""__SO_ACCEPTCON, among the flags in /proc/net/unix."""


def between(arguments: Sequence[str], dialled: str) -> tuple[list[str], str | None]:
    """QEMU's arguments with its monitor dialling `dialled` instead, and the program's own socket; None, and
    the arguments as they were, where there is no such monitor.
    """
    changed = list(arguments)
    for at in range(1, len(changed)):
        option, value = changed[at - 1], changed[at]
        if option == "-chardev" and value.startswith(_MONITOR) and value.endswith(_MONITOR_END):
            changed[at] = f"{_MONITOR}{dialled}{_MONITOR_END}"
            return changed, value.removeprefix(_MONITOR).removesuffix(_MONITOR_END)
    return changed, None


def refault_command(refault: str, dialled: str, program: str, directory: Path) -> list[str]:
    """refault between a QEMU that dials `dialled` and a program that listens at `program`."""
    return [
        *(refault, "run", "--name", directory.name),
        *("--qemu", f"unix:{dialled},server=on", "--listen", f"unix:{program},server=off"),
        *("--control", f"{directory}/control", "--state-dir", f"{directory}/state"),
    ]


def is_listening(path: str) -> bool:
    """Whether somebody listens on a unix socket; not by connecting, which refault would take for QEMU."""
    rows = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines())
    return any(row[3] == _LISTENS and row[-1] == path for row in rows)


def start_keeper(command: list[str], directory: Path) -> None:
    """Starts refault by way of a keeper: a child of this process, for as long as this process lives."""
    kept = os.pidfd_open(os.getpid())
    if os.fork():
        os.close(kept)
        return
    try:
        keep(command, directory, kept)
    finally:
        os._exit(0)


def keep(command: list[str], directory: Path, kept: int) -> None:
    # What the program left open, its other QEMU's sockets among them, is QEMU's alone.
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    with (directory / "log").open("w") as log:
        refault = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    select.select([kept], [], [])
    refault.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        refault.wait(ENDS_WITHIN)
    refault.kill()
    (directory / "status").write_text(str(refault.wait()))


def main(arguments: list[str]) -> None:
    qemu = os.environ["QTESTS_QEMU"]
    directory = Path(os.environ["QTESTS_DIRECTORY"], f"vm-{os.getpid()}")
    dialled = f"{directory}/qmp"
    changed, program = between(arguments, dialled)
    if program is not None:
        (directory / "state").mkdir(parents=True)
        command = refault_command(os.environ["QTESTS_REFAULT"], dialled, program, directory)
        start_keeper(command, directory)
        end = time.monotonic() + STARTS_WITHIN
        while not is_listening(dialled):
            if time.monotonic() > end:
                sys.exit(f"wrapper: refault does not listen; its words are in {directory}/log")
            time.sleep(0.01)
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    os.execv(qemu, [qemu, *changed])


if __name__ == "__main__":
    main(sys.argv[1:])
