"""Man pages and completion say what the help says."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from refault.cli import pages
from refault.cli.main import COMMANDS, build_parser


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("share")
    pages.main(directory)
    return directory


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        build_parser([command]).parse_args([command, "--help"])
    return set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_page_with_all_its_options(
    share: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (share / f"man/man1/refault-{command}.1").read_text()
    assert re.search(rf"^\.SH NAME\nrefault\\-{command} \\- \S.*$", page, re.MULTILINE)  # lexgrog(1)
    named = re.findall(r"\\fB((?:\\-){2}[a-z\\-]+)\\fR", page)
    assert {name.replace("\\", "") for name in named} == options_of(command, capsys)
    assert not re.findall(r"^'|^\.(?!TH|SH|TP|B )", page, re.MULTILINE)


def test_the_page_of_all_names_each(share: Path) -> None:
    page = (share / "man/man1/refault.1").read_text()
    assert re.findall(r"^\\fBrefault\\-(\w+)\\fR\(1\)$", page, re.MULTILINE) == list(COMMANDS)


def completed(share: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words."""
    script = f"""
        source {share}/bash-completion/completions/refault
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) && _refault && printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script, "bash", "refault", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=share,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_commands_options_choices_and_files(
    share: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(share, "") >= {*COMMANDS, "--version"}
    assert completed(share, "run", "--r") == {"--relay", "--recover-uri"}
    assert completed(share, "status", "") - {"-h"} == options_of("status", capsys)
    assert completed(share, "run", "--relay", "") == {"auto", "off"}
    assert completed(share, "run", "--control", "m") == {"man"}
    assert completed(share, "inspect", "m") == {"man"}
    assert completed(share, "inspect", "--") == {"--help"}
    assert completed(share, "run", "--dead-after", "") == set()


ZSHRC = """
fpath=("$SHARE/zsh/site-functions" $fpath)
autoload -Uz compinit && compinit -D -u
refault() { print -r -- "ran:$*:" }
PS1="ready "
"""


@pytest.mark.nightly  # for CI has no zsh
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_commands_options_choices_and_files(share: Path, tmp_path: Path) -> None:
    (tmp_path / ".zshrc").write_text(ZSHRC)
    for name in ("one.toml", "two.toml"):
        (tmp_path / name).touch()
    ours, theirs = pty.openpty()
    environment = {
        **os.environ,
        "ZDOTDIR": str(tmp_path),
        "SHARE": str(share),
        "TERM": "xterm",
    }
    shell = subprocess.Popen(
        ["zsh", "-d", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment
    )
    os.close(theirs)
    with shell, open(ours, "r+b", buffering=0) as terminal:
        try:
            until_said(terminal, b"ready ")
            for typed, ran in (
                ("eve\t", "events"),
                ("run --rela\tof\t", "run --relay off"),
                ("check on\ttw\t", "check one.toml two.toml"),
                ("run --contr\ttw\t", "run --control two.toml"),
                ("inspect on\t", "inspect one.toml"),
            ):
                terminal.write(f"refault {typed}\n".encode())
                until_said(terminal, f"ran:{ran}:".encode())
        finally:
            shell.kill()


def until_said(terminal: IO[bytes], what: bytes) -> None:
    told = b""
    while what not in told:
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, told
        told += terminal.read(4096)


def test_the_defaults_are_not_those_of_who_installs(tmp_path: Path) -> None:
    environment = {**os.environ, "RUNTIME_DIRECTORY": "/build/run", "STATE_DIRECTORY": "/build/state"}
    command = [sys.executable, "-m", "refault.cli.pages", str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=30)
    said = "".join(page.read_text() for page in tmp_path.rglob("*.1"))
    assert "/run/refault/NAME.control" in said
    assert "build" not in said
