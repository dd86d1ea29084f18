"""Files for others, of who may give files away and of who may not."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from refault.daemon.kernel.giving import give, is_given

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="files are given to others")
USER, GROUP, STRANGER = 4242, 4343, 4444


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for each in (tmp_path, *tmp_path.parents[:3]):
        each.chmod(0o755)
    made = tmp_path / "file"
    made.touch(0o777)
    return made


@pytest.fixture
def may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def chown(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", chown)


def rights(file: Path, uid: int, gid: int = STRANGER) -> str:
    """What the kernel lets a user with that one group do."""
    script = 'for right in r w; do if test -$right "$1"; then printf $right; fi; done'
    command = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "sh", "-c", script, "-"]
    return subprocess.run([*command, str(file)], stdout=subprocess.PIPE, text=True, check=True).stdout


@ROOT
def test_it_is_theirs(file: Path) -> None:
    give(file, 0o640, USER, GROUP)
    status = file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (USER, GROUP, 0o640)
    assert not is_given(file, 0o600, USER)
    assert is_given(file, 0o640, USER)


@ROOT
@pytest.mark.usefixtures("may_not")
def test_it_stays_ours_and_is_open_to_them_alone(file: Path) -> None:
    give(file, 0o640, USER, GROUP)
    assert (file.stat().st_uid, file.stat().st_gid) == (os.geteuid(), os.getegid())
    assert rights(file, USER) == "rw"
    assert rights(file, STRANGER, GROUP) == "r"
    assert rights(file, STRANGER, os.getegid()) == ""  # our own group is not the one that was said
    assert rights(file, STRANGER) == ""


@ROOT
@pytest.mark.usefixtures("may_not")
@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_it_is_open_to_a_user_alone(file: Path, mode: int) -> None:
    assert not is_given(file, mode, USER)
    give(file, mode, USER)
    assert is_given(file, mode, USER)
    assert not is_given(file, mode, STRANGER)
    assert rights(file, USER) == "rw"
    assert rights(file, STRANGER) == ("rw" if mode == 0o666 else "")


@pytest.mark.usefixtures("may_not")
def test_where_neither_can_be_the_first_error_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def setxattr(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", setxattr)
    with pytest.raises(PermissionError, match="Operation not permitted"):
        give(file, 0o600, USER)
