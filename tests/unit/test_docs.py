"""The pages for people name what there is: options, commands, make targets, files."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
from tests.integration.blocks import BLOCKS, left_over

from refault.cli import run
from refault.cli.main import COMMANDS
from refault.migration.legs import RULES, Verdict
from refault.qmp.access import READS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
CAMPAIGNS = re.findall(r"\w+", re.findall(r"^CAMPAIGNS := ((?:.*\\\n)*.*)$", MAKEFILE, flags=re.MULTILINE)[0])
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE)) | {
    f"campaign-{name}" for name in CAMPAIGNS
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_and_commands_exist(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r"(?:`|^    )make ([\w-]+)", text, flags=re.MULTILINE)) <= TARGETS
    assert set(re.findall(r"(?:`|^    )refault (\w+)", text, flags=re.MULTILINE)) <= set(COMMANDS)


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_each_block_is_run_by_a_test_or_left_out_with_a_reason(page: str) -> None:
    there, planned = list(left_over(page)), [block.begins for block in BLOCKS.get(page, [])]
    assert len(there) == len(planned), [block.partition("\n")[0] for block in there]
    for text, begins in zip(there, planned, strict=True):
        assert text.startswith(begins)


def test_make_help_names_every_target() -> None:
    assert set(re.findall(r"make ([\w-]+)  ", MAKEFILE)) == TARGETS - {"help", "build"}


def test_every_option_of_run_is_in_running_md() -> None:
    options = set(re.findall(r"--[a-z-]+", _run_usage()))
    rows = re.findall(r"^\| `(--[a-z-]+)", (ROOT / "docs" / "running.md").read_text(), flags=re.MULTILINE)
    assert set(rows) == options - {"--help", "--version"}


DEADLINE = re.compile(r"^\| `([a-z_.]+)\.(\w+|\w+\.\w+)` \| ([\d.]+|inf) \|", re.MULTILINE)


def test_the_deadlines_in_architecture_md_are_those_of_the_code() -> None:
    rows = DEADLINE.findall((ROOT / "docs" / "architecture.md").read_text())
    for module, name, value in rows:
        found = attrgetter(name)(importlib.import_module(f"refault.daemon.{module}"))
        assert found == float(value), (module, name)
    constant = re.compile(r"^(_?(?:[A-Z]+_)*(?:TIMEOUT|PATIENCE)) = ", re.MULTILINE)
    daemon = ROOT / "src" / "refault" / "daemon"
    there = {
        (".".join(file.relative_to(daemon).with_suffix("").parts), name)
        for file in daemon.rglob("*.py")
        for name in constant.findall(file.read_text())
    }
    assert len(there) > 15
    assert there <= {(module, name) for module, name, _ in rows}


def test_the_files_that_architecture_md_names_are_there() -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.\w+)`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 50
    assert [
        file for file in named if not any((ROOT / at / file).exists() for at in ("", "src/refault"))
    ] == []


def test_running_md_says_what_to_do_about_every_alert() -> None:
    page = (ROOT / "docs" / "running.md").read_text()
    alerts = [text for text in _texts(ROOT / "src") if "ALERT: " in text]
    assert len(alerts) > 8
    for alert in alerts:
        parts = re.split(r"%\w|[:;,.(]", alert.partition("ALERT: ")[2])
        assert next(part.strip() for part in parts if len(part.split()) > 2) in page, alert
    held = {phase for (phase, _), rule in RULES.items() if rule.verdict is not Verdict.CLOSE}
    assert all(f"`in {phase}`" in page for phase in held)


def _texts(directory: Path) -> Iterator[str]:
    for file in directory.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _run_usage() -> str:
    parser = argparse.ArgumentParser()
    run.add_parser(parser.add_subparsers())
    actions = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return str(actions.choices["run"].format_usage())


def test_what_read_only_allows_is_in_access_md() -> None:
    page = (ROOT / "docs" / "access.md").read_text()
    allowed = page.partition("allows `query-*` and")[2].partition("and refuses all else")[0]
    assert dict(re.findall(r"^\| `([\w-]+)` \| (.+) \|$", allowed, flags=re.MULTILINE)) == dict(READS)
