"""`refault watch` on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
import trio
from tests.unit.daemon.pictures import BUSY

from refault.daemon.monitor.address import Address
from refault.daemon.telling.control import serve_control
from refault.daemon.telling.snapshot import Status, VmStatus

ENTERED, LEFT, CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


class Terminal:
    """A pseudo-terminal with `refault watch` on it."""

    def __init__(self, control: Path, width: int = 80, height: int = 24) -> None:
        self.ours, self.theirs = pty.openpty()
        self.resize(width, height)
        self.before = termios.tcgetattr(self.theirs)
        command = [sys.executable, "-m", "refault", "watch", "--control", str(control)]
        environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            command,
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env={name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")},
            preexec_fn=self._own_terminal,
        )
        self.shown = b""
        self.everything = b""

    def _own_terminal(self) -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    async def until(self, text: bytes) -> None:
        """Reads until it is shown, and forgets what was shown before."""
        with trio.fail_after(60):
            while text not in self.shown:
                await trio.lowlevel.wait_readable(self.ours)
                chunk = os.read(self.ours, 65536)
                self.shown += chunk
                self.everything += chunk
        self.shown = self.shown.partition(text)[2]

    async def ended(self) -> int:
        """Its exit status, with the terminal as it was before."""
        await self.until(CURSOR)
        await self.until(LEFT)
        status: int = await trio.to_thread.run_sync(self.process.wait)
        assert termios.tcgetattr(self.theirs) == self.before
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


def renamed(name: str) -> VmStatus:
    return msgspec.structs.replace(BUSY, name=name)


async def test_it_shows_what_is_told_follows_the_terminal_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    status = Status(vms=(renamed("first"),))
    control = tmp_path / "control"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, Address(str(control)), lambda: status)
        with ExitStack() as stack:
            terminals = [Terminal(control) for _ in range(3)]
            for terminal in terminals:
                stack.callback(terminal.close)
            for terminal in terminals:
                await terminal.until(ENTERED)
                await terminal.until(b"first")
                assert termios.tcgetattr(terminal.theirs)[3] & termios.ICANON == 0
            status = Status(vms=(renamed("second"),))
            by_key, by_interrupt, by_signal = terminals
            await by_key.until(b"second")
            by_key.resize(60, 8)
            await by_key.until("\N{HORIZONTAL ELLIPSIS}".encode())
            os.write(by_key.ours, b"\x1a")
            await by_key.until(LEFT)
            stopped = partial(os.waitid, os.P_PID, by_key.process.pid, os.WSTOPPED)
            await trio.to_thread.run_sync(stopped)
            assert termios.tcgetattr(by_key.theirs) == by_key.before
            by_key.process.send_signal(signal.SIGCONT)
            await by_key.until(ENTERED)
            os.write(by_key.ours, b"x\x1b[Aq")
            os.write(by_interrupt.ours, b"\x03")
            by_signal.process.send_signal(signal.SIGTERM)
            assert [await terminal.ended() for terminal in terminals] == [0, 0, 0]
            assert not re.search(rb"\x1b\[[\d;]*3[0-7]m", b"".join(t.everything for t in terminals))
        nursery.cancel_scope.cancel()
