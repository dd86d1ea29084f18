"""The log's two forms."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from refault.daemon.log import JournalFormatter, PlainFormatter, is_journal


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("refault.x", level, "x.py", 1, text, None, None)


def test_journal_lines_carry_their_priority_each() -> None:
    form = JournalFormatter().format
    assert form(record(logging.WARNING, "vm1: lost\nagain")) == "<4>vm1: lost\n<4>again"
    levels = (logging.DEBUG, logging.INFO, logging.ERROR, logging.CRITICAL, logging.ERROR + 1)
    assert [form(record(level, "x")) for level in levels] == ["<7>x", "<6>x", "<3>x", "<2>x", "<3>x"]
    assert form(record(logging.INFO, "")) == "<6>"


def test_plain_lines_have_a_time_and_name_the_level_if_it_matters() -> None:
    form = PlainFormatter().format
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(rf"{stamp} ready", form(record(logging.INFO, "ready")))
    assert re.fullmatch(rf"{stamp} warning: vm1: lost", form(record(logging.WARNING, "vm1: lost")))


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
        "import logging; from refault.daemon.log import setup_logging; setup_logging(); setup_logging();"
        "logging.getLogger('refault.daemon').warning('once'); logging.getLogger('refault').debug('never')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == ""
    assert done.stderr.endswith(" warning: once\n")
    assert len(done.stderr.splitlines()) == 1
