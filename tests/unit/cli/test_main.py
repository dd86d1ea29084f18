"""The command line's own manners."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import refault
from refault.cli import main as main_module
from refault.cli.main import main
from refault.daemon.errors import OperatorError


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
