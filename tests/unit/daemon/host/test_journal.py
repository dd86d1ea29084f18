"""Lines in the journal's own form, read as systemd's docs/JOURNAL_NATIVE_PROTOCOL.md says."""

from __future__ import annotations

import ast
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from refault.daemon.host import subjects
from refault.daemon.host.alerts import MESSAGE_IDS, message_id
from refault.daemon.host.journal import JournalSocket, entry, fields_of

ROOT = Path(__file__).parents[4]
CATALOG = ROOT / "systemd" / "refault.catalog"


def parsed(data: bytes) -> dict[str, str]:
    """The fields of an entry."""
    fields = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[9 + size :]
        fields[name.decode()] = value.decode()
        data = rest
    return fields


def fields(text: str, *args: object, level: int = logging.ERROR, **further: object) -> dict[str, str]:
    record = logging.LogRecord("refault.x", level, "x.py", 7, text, args, None, "f")
    record.__dict__.update(further)
    return fields_of(record, record.getMessage(), 3)


def test_an_entry_holds_what_it_was_given_whatever_is_in_it() -> None:
    given = {"MESSAGE": "a\nb=c\n", "VM": "vm=1", "EMPTY": "", "ODD": "\udcff\x00"}
    assert parsed(entry(given)) == {**given, "ODD": "\\udcff\x00"}
    assert len(parsed(entry({"MESSAGE": "x" * (1 << 20)}))["MESSAGE"]) == 48 << 10


def test_a_line_names_its_vm_and_the_loss_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "_recoveries", {})
    subjects.served("vm1")
    assert fields("%s: is lost", "vm1")["VM"] == "vm1"
    subjects.recovering("vm1", "aa")
    lost = fields("%s: is lost", "vm1")
    assert (lost["VM"], lost["RECOVERY_ID"], lost["PRIORITY"]) == ("vm1", "aa", "3")
    assert (lost["MESSAGE"], lost["CODE_LINE"], lost["SYSLOG_IDENTIFIER"]) == ("vm1: is lost", "7", "refault")
    assert not {"VM", "RECOVERY_ID", "MESSAGE_ID"} & set(fields("%s: a stranger came", "10.0.0.1:9"))
    subjects.recovering("vm1", None)
    assert "RECOVERY_ID" not in fields("%s: is active", "vm1")
    assert fields("%s: x", "vm1", journal={"CLIENT_UID": "0"})["CLIENT_UID"] == "0"


def alerts() -> Iterator[str]:
    sources = (file.read_text() for file in (ROOT / "src").rglob("*.py"))
    for source in (each for each in sources if "ALERT: " in each):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "%s: ALERT: " in node.value:
                yield node.value


def test_each_alert_has_an_id_of_its_own_and_the_catalogue_has_them_all() -> None:
    texts = set(alerts())
    assert len(texts) == len(MESSAGE_IDS) > 8
    for text in texts:
        assert [words in text for words in MESSAGE_IDS].count(True) == 1, text
    assert {message_id(text) for text in texts} == set(MESSAGE_IDS.values())
    ids = re.findall(r"^-- (\w+)$", CATALOG.read_text(), re.MULTILINE)
    assert sorted(ids) == sorted(MESSAGE_IDS.values())
    assert message_id("%s: gave up after all") is None


@pytest.mark.skipif(shutil.which("journalctl") is None, reason="needs systemd")
def test_the_catalogue_is_one_that_systemd_takes(tmp_path: Path) -> None:
    (tmp_path / "usr/lib/systemd/catalog").mkdir(parents=True)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    shutil.copy(CATALOG, tmp_path / "usr/lib/systemd/catalog")
    made = subprocess.run(
        ["journalctl", "--update-catalog", f"--root={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert (made.returncode, made.stderr) == (0, "")
    assert (tmp_path / "var/lib/systemd/catalog/database").stat().st_size > CATALOG.stat().st_size / 2


def test_a_service_of_the_journal_writes_entries_and_not_lines(tmp_path: Path) -> None:
    code = (
        "import logging; from pathlib import Path; from refault.daemon.host import journal, log, subjects\n"
        f"journal.SOCKET = Path({str(tmp_path / 'socket')!r})\n"
        "subjects.served('vm1'); log.setup_logging()\n"
        "logging.getLogger('refault').warning('%s: two\\nlines', 'vm1')\n"
        "1 / 0"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(str(tmp_path / "socket"))
        reader.settimeout(10)
        stream, other = socket.socketpair()
        with stream, other:
            stat = os.fstat(other.fileno())
            environment = {**os.environ, "JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, stderr=other.fileno(), env=environment, check=False)
            assert done.returncode == 1
            told = parsed(reader.recv(65536))
            assert (told["VM"], told["MESSAGE"], told["PRIORITY"]) == ("vm1", "vm1: two\nlines", "4")
            assert parsed(reader.recv(65536))["MESSAGE"].startswith("Traceback")
            other.close()
            assert stream.recv(1) == b""


def test_a_journal_that_was_restarted_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as first:
        first.bind(str(path))
        ours = JournalSocket(path)
        assert ours.write(b"A=1\n") == 4
        assert first.recv(99) == b"A=1\n"
    with pytest.raises(ConnectionRefusedError):
        ours.write(b"B=1\n")
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
        second.bind(str(path))
        assert ours.write(b"C=1\n") == 4
        assert second.recv(99) == b"C=1\n"
    ours.close()
