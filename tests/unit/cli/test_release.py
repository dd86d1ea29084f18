"""`refault release` where nothing is held; tests/integration/test_kept_clients.py has the rest."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from tests.unit.daemon.relayed.test_handover import Left

from refault.cli.main import main
from refault.daemon.kept.taken import SUFFIX


@pytest.mark.parametrize("vm", ["\u00b2", "9" * 5000, "None", "-0", "vm2"])
def test_what_is_nobodys_name_or_process_is_one_line(
    vm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"vm1{SUFFIX}").touch()
    assert main(["release", "--state-dir", str(tmp_path), "--", vm]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"refault: nothing is held for {vm} by what is in {tmp_path}")
    assert told.count("\n") == 1


@pytest.mark.parametrize("vm", ["vm", str(os.getpid())], ids=["name", "process"])
def test_the_leg_of_a_migration_is_found_where_nothing_is_left_of_clients(
    vm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qemu, held = socket.socketpair()
    with qemu, held:
        left = Left(tmp_path, qemu, held)
        left.write(may_end=True)
        assert main(["release", "--state-dir", str(tmp_path), vm]) == 0
        assert not left.lives
        told = capsys.readouterr().err
        assert told == f"vm: the channel of its migration is ended, which QEMU, process {os.getpid()}, held\n"
        assert main(["release", "--state-dir", str(tmp_path), vm]) == 1
