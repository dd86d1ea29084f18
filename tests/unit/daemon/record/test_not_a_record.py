"""What is no file of refault's, where one should be, is told or passed over, and keeps nobody."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from refault.daemon.host.errors import OperatorError
from refault.daemon.kept.journal import Journal, left
from refault.daemon.kept.taken import release
from refault.daemon.record.hand_over import load_all
from refault.daemon.record.owed_file import OwedFile
from refault.daemon.record.replaced import replace
from refault.daemon.record.state_file import StateFile


def large(path: Path) -> None:
    """Of more than there is memory for."""
    path.touch()
    os.truncate(path, 1 << 40)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def link_to_another(path: Path) -> None:
    """Of whom nothing may be lost."""
    other = path.with_name("other")
    other.write_bytes(OTHER)
    path.symlink_to(other)


OTHER = b"{}, of another"
KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "a directory": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to another file": link_to_another,
    "too large": large,
    "a socket": a_socket,
}


@pytest.fixture(params=KINDS)
def put(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return KINDS[request.param]


def test_a_migrations_record(
    put: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "vm.migration.json")
    state = StateFile(tmp_path, "vm")
    assert not state.of_a_running_qemu()
    assert state.load(os.getpid()) is None
    [line] = caplog.messages
    assert line.startswith(f"vm: ignoring {tmp_path / 'vm.migration.json'}: ")
    assert "Errno" not in line


def test_what_is_owed(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "vm.owed.json")
    assert not OwedFile(StateFile(tmp_path, "vm"), "vm").load(os.getpid(), 1).anything


def test_a_monitor_that_was_handed_over(put: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    put(tmp_path / "vm" / "handed.json")
    assert list(load_all(tmp_path)) == []


def test_a_journal(put: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "vm.clients"
    put(path)
    for reads in (left, lambda path: Journal(path).give_up_left()):
        with pytest.raises(OSError, match=r"no regular file|too large|symbolic links|No such device"):
            reads(path)
    with pytest.raises(OperatorError) as told:
        release(path)
    assert str(told.value).startswith(f"{path} cannot be read: ")
    assert "Errno" not in str(told.value)


def test_a_file_that_is_to_be_replaced_is_written_beside_it(
    put: Callable[[Path], None], tmp_path: Path
) -> None:
    path, beside = tmp_path / "vm.owed.json", tmp_path / "vm.owed.new"
    put(beside)
    if beside.is_dir():
        with pytest.raises(OSError, match="directory"):
            replace(path, b"{}")
    else:
        replace(path, b"{}")
        assert path.read_bytes() == b"{}"
        assert not path.is_symlink()
    other = tmp_path / "other"
    assert not other.exists() or other.read_bytes() == OTHER
