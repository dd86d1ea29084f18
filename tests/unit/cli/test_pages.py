"""Man pages and completion say what the help says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

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
