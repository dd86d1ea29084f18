"""Where sockets and state are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refault.daemon.host.errors import OperatorError, operator_errors
from refault.daemon.host.paths import (
    SUN_PATH,
    control_socket,
    make_again,
    make_default_directory,
    must_be_writable,
    runtime_directories,
    runtime_directory,
    short_name,
    state_directory,
)


@pytest.mark.parametrize(
    ("environment", "uid", "expected"),
    [
        ({"RUNTIME_DIRECTORY": "/run/refault/vm1"}, 0, "/run/refault/vm1"),
        ({"RUNTIME_DIRECTORY": "/run/a:/run/b"}, 7, "/run/a"),
        ({}, 0, "/run/refault"),
        ({"XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/run/refault"),
        ({"XDG_RUNTIME_DIR": "/tmp/x"}, 1000, "/tmp/x/refault"),
        ({"XDG_RUNTIME_DIR": ""}, 1000, "/run/user/1000/refault"),
    ],
)
def test_runtime_directory(environment: dict[str, str], uid: int, expected: str) -> None:
    assert runtime_directory(environment, uid) == Path(expected)
    assert control_socket("vm", environment, uid) == Path(expected) / "vm.control"
    assert state_directory(environment, uid) == Path(expected)
    assert state_directory({**environment, "STATE_DIRECTORY": "/s:/t"}, uid) == Path("/s")


def test_daemons_of_root_are_found_by_others_too() -> None:
    own = {"XDG_RUNTIME_DIR": "/tmp/x"}
    assert runtime_directories(own, 1000) == [Path("/tmp/x/refault"), Path("/run/refault")]
    assert runtime_directories({}, 0) == [Path("/run/refault")]
    assert runtime_directories({"RUNTIME_DIRECTORY": "/run/refault/vm1"}, 0) == [Path("/run/refault/vm1")]


def test_a_name_that_does_not_fit_has_a_digest_in_its_place() -> None:
    directory = Path("/run/refault") / ("n" * 64)
    assert short_name(Path("/run/refault"), "n" * 64, ".control") == "n" * 64 + ".control"
    short = short_name(directory, "n" * 64, ".control")
    assert short == short_name(directory, "n" * 64, ".control")
    assert short != short_name(directory, "n" * 63 + "m", ".control")
    assert len(str(directory / short)) < SUN_PATH
    # Each byte counts, and so does what is to come behind.
    for length in range(20, 64):
        for behind in (0, 9):
            whole = str(directory / ("m" * length + ".legs")) + "x" * behind
            kept = short_name(directory, "m" * length, ".legs", behind) == "m" * length + ".legs"
            assert kept is (len(whole) < SUN_PATH)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_the_default_directory_has_its_mode_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        make_default_directory(tmp_path / "refault")
    finally:
        os.umask(before)
    assert (tmp_path / "refault").stat().st_mode & 0o777 == (0o755 if os.getuid() == 0 else 0o700)


@pytest.mark.parametrize("parent", [0o700, 0o755, 0o750])
def test_of_another_user_than_root_it_is_as_open_as_what_it_lies_in(
    tmp_path: Path, parent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    tmp_path.chmod(parent)
    make_again(tmp_path / "vm1")
    assert (tmp_path / "vm1").stat().st_mode & 0o777 == parent


def test_the_default_directory_is_made_once_and_kept(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        make_default_directory(tmp_path / "refault")
    finally:
        os.umask(mask)
    assert (tmp_path / "refault").stat().st_mode & 0o777 == (0o755 if os.getuid() == 0 else 0o700)
    (tmp_path / "refault" / "x").touch()
    make_default_directory(tmp_path / "refault")
    assert (tmp_path / "refault" / "x").exists()


def test_where_it_cannot_be_made_the_operator_is_told(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"cannot make .*/missing/refault: .*; make it, or name"):
        make_default_directory(tmp_path / "missing" / "refault")


def test_operator_errors_are_found_in_groups_unless_a_bug_is_among_them() -> None:
    one, two = OperatorError("1"), OperatorError("2")
    assert operator_errors(one) == [one]
    assert operator_errors(BaseExceptionGroup("", [one, ExceptionGroup("", [two])])) == [one, two]
    assert operator_errors(BaseExceptionGroup("", [one, ValueError()])) == []
    assert operator_errors(ValueError()) == []


def test_a_state_directory_that_cannot_be_written_to_is_told_of_at_the_start(tmp_path: Path) -> None:
    must_be_writable(tmp_path)
    with pytest.raises(
        OperatorError, match=r"cannot keep state in .*/missing: No such file or directory; make"
    ):
        must_be_writable(tmp_path / "missing")


@pytest.mark.skipif(os.getuid() != 0, reason="root becomes another user")
def test_nor_one_that_another_user_may_write_to_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(OperatorError, match="Permission denied; make it a directory that uid 65534 can"):
            must_be_writable(tmp_path)
    finally:
        os.seteuid(0)
