"""What `refault watch` shows, without colour; tests/integration/test_watch.py has it on a terminal."""

from __future__ import annotations

import io
import sys

import msgspec
import pytest
from rich.console import Console
from tests.unit.daemon.pictures import BUSY, IDLE, PICTURE

from refault.cli.main import main
from refault.cli.watch_view import Picture, view
from refault.daemon.telling.snapshot import Status, VmStatus

replace = msgspec.structs.replace
BLOCKS = tuple(
    replace(block, present_bytes=block.size_bytes // 4, outstanding_cells=(9, *(0,) * 62, 1))
    for block in BUSY.pages.blocks
)
ACTIVE = replace(
    BUSY,
    name="vm0",
    migration=replace(BUSY.migration, status="postcopy-active", relay="tracking", held=None),
    pages=replace(BUSY.pages, blocks=BLOCKS),
    recovery=replace(BUSY.recovery, given_up=False, last_error=None),
)


def shown(*vms: VmStatus, width: int = 80, height: int = 30, **further: object) -> list[str]:
    out = io.StringIO()
    picture = Picture(Status(vms=vms), rates={"vm0": 4096.0}, **further)  # type: ignore[arg-type]
    Console(file=out, width=width, height=height).print(view(picture, width, height))
    lines = out.getvalue().splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    return lines


def line_with(lines: list[str], text: str) -> str:
    (line,) = [line for line in lines if text in line]
    return line


def test_a_migration_has_its_progress_its_latency_and_its_map() -> None:
    lines = shown(ACTIVE)
    assert "1 VM, 1 migrating, 0 lost" in lines[0]
    assert "vm0   QEMU 7.2.0   2 clients" in lines
    assert line_with(lines, "memory").endswith("| 256.5 MiB of 1.002 GiB   4 KiB/s")
    bar = line_with(lines, "memory").split("|")[1]
    assert bar.count("█") == len(bar) // 4
    requests = line_with(lines, "requests")
    assert "10 outstanding of 120   8 threads wait   p50 0.002 s, p99 0.031 s" in requests
    assert line_with(lines, "pc.ram") == f"  pc.ram    |█{' ' * 62}▁|"


def test_a_map_wider_than_the_terminal_is_drawn_closer() -> None:
    assert line_with(shown(ACTIVE, width=50), "pc.ram") == f"  pc.ram    |█{' ' * 30}▁|"


def test_what_is_wrong_is_said_in_words() -> None:
    lines = shown(BUSY, IDLE, errors=("the daemon is gone",))
    assert line_with(lines, "LOST").startswith("  destination   LOST: postcopy-paused")
    for said in ("HELD: the recovery handshake", "GIVEN UP", "last error: QEMU said no", "NO QEMU", "ERROR"):
        line_with(lines, said)


def test_who_wants_looking_at_comes_first_and_who_has_no_room_is_counted() -> None:
    quiet = [replace(IDLE, name=f"q{n}", qemu=replace(IDLE.qemu, connected=True)) for n in range(20)]
    lines = shown(*quiet, ACTIVE, BUSY, height=24)
    heads = [line.split()[0] for line in lines if " client" in line]
    assert heads[:3] == ["vm1", "vm0", "q0"]
    assert lines[-1] == f"and {22 - len(heads)} more VMs: a higher terminal, or `refault status`"


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20, 3), (40, 10), (300, 100)])
def test_any_terminal_is_kept_to(width: int, height: int) -> None:
    shown(*PICTURE.vms, ACTIVE, width=width, height=height)


def test_names_do_not_steer_the_terminal() -> None:
    lines = shown(replace(ACTIVE, name="a\x1b[2J"))
    assert "a?[2J" in "".join(lines)


def test_without_a_terminal_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch"]) == 1
    said = "refault: watch needs a terminal; `refault status` and `refault events` do not\n"
    assert capsys.readouterr().err == said


def test_on_a_terminal_on_which_nothing_can_be_drawn_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    assert main(["watch"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("refault: watch needs a terminal whose cursor can be moved")
    assert said.count("\n") == 1
