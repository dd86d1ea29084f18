"""What accept(2) says of a connection that is gone, and of one that cannot be had yet."""

from __future__ import annotations

import errno
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from refault.daemon.monitor.accept import PAUSE, accepted


class Failing(socket.socket):
    """Whose accept(2) fails first."""

    fails = 0

    def accept(self) -> tuple[socket.socket, object]:
        number, self.fails = self.fails, 0
        if number:
            raise OSError(number, os.strerror(number))
        return super().accept()


@pytest.mark.parametrize(
    ("number", "waits"),
    [
        (0, False),
        (errno.EAGAIN, False),
        (errno.ECONNABORTED, False),
        (errno.EPERM, False),
        (errno.ENETDOWN, False),
        (errno.EMFILE, True),
        (errno.ENOMEM, True),
        (errno.EACCES, True),  # and all that nobody thought of: else it would be asked without a pause
        (errno.EIO, True),
    ],
)
async def test_no_connection_is_missed_and_nothing_is_asked_without_a_pause(
    number: int, waits: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    told: list[int | None] = []
    with Failing(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.setblocking(False)
        listening.bind(str(tmp_path / "l"))
        listening.listen()
        client.connect(str(tmp_path / "l"))
        listening.fails = number
        began = trio.current_time()
        (await accepted(listening, lambda error: told.append(error.errno))).close()
        took = trio.current_time() - began
    assert (told, took) == (([number], PAUSE) if waits else ([], 0))


async def test_who_connects_waits_while_somebody_says_why(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    reasons = iter(["few are left", "few are left", None])
    told: list[str | None] = []
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.setblocking(False)
        listening.bind(str(tmp_path / "l"))
        listening.listen()
        client.connect(str(tmp_path / "l"))
        began = trio.current_time()
        take = partial(accepted, why_not=lambda: next(reasons))
        (await take(listening, lambda error: told.append(error.strerror))).close()
        took = trio.current_time() - began
    assert (told, took) == (["few are left"] * 2, 2 * PAUSE)
