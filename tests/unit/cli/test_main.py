"""The command line's own manners."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.unit.daemon.pictures import BUSY

import refault
from refault.cli import main as main_module
from refault.cli.main import main
from refault.daemon.host.errors import OperatorError
from refault.daemon.telling.snapshot import Status, encode


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"refault {refault.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["--frobnicate"], "required: COMMAND"),
        (["status", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["status", "--control"], "--control: expected one argument"),
        (["status", "--js"], "unrecognized arguments: --js"),
        (["--ver"], "required: COMMAND"),
        (["status", "--control", "/a", "--control", "/b"], "--control: given more than once"),
        (["demo", "--losses", "1", "--losses", "1"], "--losses: given more than once"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in usage_error(arguments, capsys)


def test_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "refault", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"refault {refault.__version__}\n"


@pytest.mark.parametrize("command", main_module.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: refault {command} ")


FULL = "refault: cannot write to standard output: No space left on device\n"
CLOSED = "refault: cannot write to standard output: Bad file descriptor\n"


@pytest.mark.parametrize(
    ("command", "streams", "status", "told"),
    [
        ("status --control $0/control", "> /dev/full", 1, FULL),
        ("status --control $0/control", ">&-", 1, CLOSED),
        ("status --control $0/control", "<&- >&- 2>&-", 1, ""),
        ("status --control $0/control", "> $1 2>&-", 0, ""),
        ("status --control $0/control", "> $1 2> /dev/full", 0, ""),
        ("inspect $0/stream", "> /dev/full", 1, FULL),
        ("inspect $0/stream", ">&-", 1, CLOSED),
        ("inspect $0/none", "> /dev/full 2> /dev/full", 1, ""),
        ("--version", "> /dev/full", 1, FULL),
        ("run --help", ">&-", 1, CLOSED),
        ("run", "<&- >&- 2>&-", 2, ""),
        ("status --control $0/control", "> no-reader", 1, ""),
        ("inspect $0/stream", "> no-reader", 1, ""),
        ("--help", "> no-reader", 1, ""),
    ],
)
def test_output_that_cannot_be_written_is_a_line_at_most(
    command: str, streams: str, status: int, told: str, tmp_path: Path
) -> None:
    (tmp_path / "stream").write_bytes(bytes(64))
    reader, writer = os.pipe()
    os.close(reader)
    script = f"{shlex.quote(sys.executable)} -m refault {command} {streams.replace('> no-reader', '')}"
    with answering(tmp_path / "control"):
        done = subprocess.run(
            ["sh", "-c", script, tmp_path, os.devnull],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    os.close(writer)
    assert done.stderr == told
    assert done.returncode == status


@contextlib.contextmanager
def answering(path: Path) -> Iterator[Path]:
    """A daemon that tells one peer a status."""

    def serve() -> None:
        with contextlib.suppress(OSError), server.accept()[0] as peer:
            peer.sendall(encode(Status(vms=(BUSY,))))

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def execute(_: object) -> int:
        raise error

    parser = SimpleNamespace(parse_args=lambda _: SimpleNamespace(execute=execute))
    monkeypatch.setattr(main_module, "build_parser", lambda _: parser)
    return main([])


def test_operator_errors_are_lines_even_out_of_nurseries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = ExceptionGroup("", [OperatorError("this; do that"), OperatorError("so; do so")])
    assert raising(ExceptionGroup("", [inner]), monkeypatch) == 1
    assert capsys.readouterr().err == "refault: this; do that\nrefault: so; do so\n"


def test_a_bug_among_them_is_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExceptionGroup):
        raising(ExceptionGroup("", [OperatorError("this"), KeyError("bug")]), monkeypatch)


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert raising(KeyboardInterrupt(), monkeypatch) == 130
