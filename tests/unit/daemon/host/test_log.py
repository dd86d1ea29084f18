"""The log's two forms."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from refault.daemon.host.log import JournalFormatter, PlainFormatter, is_journal, spare_full
from refault.daemon.host.outlet import MOST_BYTES, Outlet
from refault.daemon.host.repeats import Sparing


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("refault.x", level, "x.py", 1, text, None, None)


@pytest.mark.parametrize("form", [JournalFormatter().format, PlainFormatter().format])
def test_no_name_or_error_begins_a_line_of_its_own(form: Callable[[logging.LogRecord], str]) -> None:
    said = form(record(logging.WARNING, "vm1\n2026-01-01 00:00:00.000 vm2: lost\x1b[2J"))
    assert said.endswith(r"vm1\n2026-01-01 00:00:00.000 vm2: lost\x1b[2J")
    assert said.isprintable()


def test_journal_lines_carry_their_priority_each() -> None:
    form = JournalFormatter().format
    try:
        raise KeyError("of ours")
    except KeyError:
        failed = logging.LogRecord("refault.x", logging.ERROR, "x.py", 1, "internal", None, sys.exc_info())
    assert {line[:3] for line in form(failed).splitlines()} == {"<3>"}
    levels = (logging.DEBUG, logging.INFO, logging.ERROR, logging.CRITICAL, logging.ERROR + 1)
    assert [form(record(level, "x")) for level in levels] == ["<7>x", "<6>x", "<3>x", "<2>x", "<3>x"]
    assert form(record(logging.INFO, "")) == "<6>"


def test_plain_lines_have_a_time_and_name_the_level_if_it_matters() -> None:
    form = PlainFormatter().format
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(rf"{stamp} ready", form(record(logging.INFO, "ready")))
    assert re.fullmatch(rf"{stamp} warning: vm1: lost", form(record(logging.WARNING, "vm1: lost")))


class Full(trio.abc.Listener[trio.abc.Stream]):
    """There is no descriptor for who comes."""

    async def accept(self) -> trio.abc.Stream:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def aclose(self) -> None:
        pass


def test_that_no_descriptor_is_left_for_who_comes_is_told_in_few_lines() -> None:
    said: list[str] = []
    sparing = Sparing(trio.current_time)
    logger = logging.getLogger("trio.serve_listeners")

    def say(record: logging.LogRecord) -> bool:
        if sparing.filter(record):
            said.append(PlainFormatter().format(record))
        return False

    async def serve() -> None:
        with trio.move_on_after(5):
            await trio.serve_listeners(trio.abc.Stream.aclose, [Full()])

    for each in (spare_full, say):
        logger.addFilter(each)
    try:
        trio.run(serve, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        for each in (spare_full, say):
            logger.removeFilter(each)
    assert 1 <= len(said) < 5
    assert all("Too many open files" in line and "\n" not in line for line in said)


def test_the_journal_is_known_by_its_inode(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream:
        stat = os.fstat(stream.fileno())
        journal = {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
        assert is_journal(stream.fileno(), journal)
        assert not is_journal(stream.fileno(), {})
        # As where a unit's program was started with its error output sent elsewhere.
        assert not is_journal(stream.fileno(), {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino + 1}"})
    assert not is_journal(10_000, journal)


def test_setup_writes_to_standard_error_once() -> None:
    code = (
        "import logging; from refault.daemon.host.log import setup_logging; setup_logging(); setup_logging();"
        "logging.getLogger('refault.daemon').warning('once'); logging.getLogger('refault').debug('never')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == ""
    assert done.stderr.endswith(" warning: once\n")
    assert len(done.stderr.splitlines()) == 1


def full_pipe() -> tuple[int, int]:
    """One whose reader stands still: its ends."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    return reader, writer


def told(count: int) -> bytes:
    return b"%d missing\n" % count


def written(reader: int, last: bytes) -> list[bytes]:
    """The lines up to the first with `last` in it."""
    lines = []
    with open(reader, "rb") as stream:
        for line in stream:
            lines.append(line.lstrip(b"\0"))
            if last in line:
                return lines
    raise AssertionError(lines[-3:])


def test_nobody_waits_for_a_reader_and_what_is_lost_is_told_of_where_it_is() -> None:
    reader, writer = full_pipe()
    outlet = Outlet(partial(os.write, writer), told)
    line = b"x" * 999 + b"\n"
    for _ in range(MOST_BYTES // len(line) + 100):
        outlet.put(line)
    lost = outlet.dropped
    assert 99 <= lost <= 101
    outlet.put(b"short\n")  # there is room for this
    outlet.flush(0.05)  # and no end of waiting
    lines = written(reader, b"missing")
    assert lines[-1] == told(lost)
    assert lines.count(line) == MOST_BYTES // len(line) + 100 - lost
    assert outlet.dropped == lost


def test_a_descriptor_that_does_not_block_is_not_tried_all_the_time() -> None:
    tries = 0

    def take(line: bytes) -> int:
        nonlocal tries
        tries += 1
        if tries == 1 or time.monotonic() < start + 0.1:
            raise BlockingIOError
        return len(line)

    start = time.monotonic()
    outlet = Outlet(take, told)
    outlet.put(b"line\n")
    outlet.flush(10)
    assert (outlet.dropped, tries <= 4) == (0, True)


def test_what_is_lost_is_told_of_though_nothing_follows() -> None:
    reader, writer = full_pipe()
    outlet = Outlet(partial(os.write, writer), told)
    outlet.put(b"first\n")
    outlet.put(b"x" * MOST_BYTES + b"\n")
    assert written(reader, b"missing") == [b"first\n", b"1 missing\n"]


def test_a_log_that_cannot_be_written_is_counted_and_read_again_later(tmp_path: Path) -> None:
    broken = os.open(tmp_path, os.O_RDONLY)
    outlet = Outlet(partial(os.write, broken), told)
    for _ in range(3):
        outlet.put(b"lost\n")
    outlet.flush(10)
    assert outlet.dropped == 3
    whole = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(whole, broken)
    outlet.put(b"again\n")
    outlet.put(b"and again\n")
    outlet.flush(10)
    assert (tmp_path / "log").read_bytes() == b"3 missing\nagain\nand again\n"


def test_a_line_that_is_torn_ends_before_the_next(tmp_path: Path) -> None:
    """A disk that is full has room for a part of it."""
    outlet = Outlet(partial(os.write, os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)), told)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, unlimited[1]))
    try:
        outlet.put(b"a long line\n")
        outlet.flush(10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    outlet.put(b"next\n")
    outlet.flush(10)
    assert (tmp_path / "log").read_bytes() == b"a lon\n1 missing\nnext\n"


WRITERS = """
import ctypes, logging, os, sys, threading, warnings
from refault.daemon.host.log import lines_dropped, setup_logging
setup_logging()
log = logging.getLogger("refault.x")
for _ in range(3000):
    log.info("x" * 500)
warnings.warn("a warning")
print("by hand", file=sys.stderr)
logging.getLogger("trio").error("a library")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
assert ctypes.CDLL(None, use_errno=True).write(2, b"last words", 10) == -1
print(lines_dropped() > 500)
raise KeyError("the end")
"""


def test_whoever_writes_to_a_standard_error_that_nobody_reads_goes_on() -> None:
    """The first of all tests of this is that it ends."""
    reader, writer = full_pipe()
    command = [sys.executable, "-c", WRITERS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, timeout=60, check=False)
    os.close(writer)
    os.close(reader)
    assert done.stdout == b"True\n"
    assert done.returncode == 1


def test_the_flags_of_a_standard_error_that_others_have_too_are_not_touched() -> None:
    code = "from refault.daemon.host.log import setup_logging; setup_logging()"
    reader, writer = os.pipe()
    subprocess.run([sys.executable, "-c", code], stderr=writer, timeout=30, check=True)
    assert os.get_blocking(writer)
    os.close(writer)
    os.close(reader)


def test_what_python_says_by_itself_is_of_the_log() -> None:
    code = (
        "import sys, warnings; from refault.daemon.host.log import setup_logging; setup_logging();"
        "warnings.warn('careful'); print('by hand', file=sys.stderr); raise KeyError('bug')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stderr.splitlines()
    assert re.search(r" warning: .*UserWarning: careful$", lines[0])
    assert any(line.endswith(" error: by hand") for line in lines)
    assert lines[-1].endswith(" error: KeyError: 'bug'")
