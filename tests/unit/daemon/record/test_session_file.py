"""What a planned restart writes of a channel: read once, by the next refault alone, and never half."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refault.daemon.record.session_file import HandedChannel, SessionFile
from refault.daemon.record.state_file import StateFile

ABOUT = HandedChannel(
    generation="one",
    leg=b"cookie",
    handed="first",
    peer_inode=1,
    session=bytes(16),
    recovered=False,
    runs_told=True,
    status="postcopy-active",
)
WHICH = ("one", b"cookie", "first")
CHANNEL = bytes(range(256)) * 4


def written(directory: Path) -> SessionFile:
    file = SessionFile(directory, "vm")
    with file.reserved(1 << 16) as write:
        write(ABOUT, CHANNEL)
    return file


def test_it_is_good_for_once(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.take(*WHICH) == (ABOUT, CHANNEL)
    assert file.take(*WHICH) is None
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_half_written_does_not_stay(tmp_path: Path) -> None:
    """It has guest memory, too."""
    state = StateFile(tmp_path, "vm")
    state.session.half.write_bytes(CHANNEL)
    assert state.session.take(*WHICH) is None
    assert list(tmp_path.iterdir()) == []
    state.session.half.write_bytes(CHANNEL)
    state.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "which", [("two", b"cookie", "first"), ("one", b"another", "first"), ("one", b"cookie", "second")]
)
def test_that_of_another_channel_or_hand_over_is_none(tmp_path: Path, which: tuple[str, bytes, str]) -> None:
    file = written(tmp_path)
    assert file.look(*which) is None
    assert file.take(*which) is None
    assert not file.path.exists()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> SessionFile:
    return written(tmp_path_factory.mktemp("state"))


@given(st.data())
@settings(max_examples=100)
def test_a_torn_one_is_none(file: SessionFile, data: st.DataObject) -> None:
    """Cut, longer, or with a byte that is another, wherever."""
    whole = written(file.path.parent).path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    torn = data.draw(
        st.sampled_from(
            [whole[:at], whole + b"\0", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], b""]
        )
    )
    file.path.write_bytes(torn)
    assert file.take(*WHICH) is None
    assert not file.path.exists()


def test_one_that_others_may_have_written_is_none(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.path.chmod(0o620)
    assert file.take(*WHICH) is None


def test_where_there_is_no_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="full"), SessionFile(tmp_path, "vm").reserved(1 << 16):
        pytest.fail("there is no room")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_written_in_the_end_is_not_there(tmp_path: Path) -> None:
    with SessionFile(tmp_path, "vm").reserved(1 << 16):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
