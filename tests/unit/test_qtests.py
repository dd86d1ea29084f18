"""What stands between QEMU's own migration-test and its QEMU, and how its runs are judged."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import pytest
from tests.qtests.__main__ import Run, complaints, differs, row
from tests.qtests.wrapper import between, is_listening, refault_command

from refault.cli.main import build_parser
from refault.cli.run import configuration

# As libqtest writes it (tests/qtest/libqtest.c): a chardev that is no monitor's is behind it.
STARTED = shlex.split(
    "-qtest unix:/tmp/qtest-7.sock -qtest-log /dev/null -chardev socket,path=/tmp/qtest-7.qmp,id=char0"
    " -mon chardev=char0,mode=control -display none -accel kvm -chardev socket,id=s0,path=/tmp/serial"
    " -incoming unix:/tmp/migsocket -accel qtest"
)


def test_the_monitor_alone_is_sent_elsewhere() -> None:
    changed, program = between(STARTED, "/tmp/vm-1/qmp")
    assert program == "/tmp/qtest-7.qmp"
    assert shlex.join(changed) == shlex.join(STARTED).replace("/tmp/qtest-7.qmp", "/tmp/vm-1/qmp")


@pytest.mark.parametrize(
    "arguments", [["--version"], ["-chardev", "null,id=char0"], ["-name", "socket,path=/tmp/x,id=char0"]]
)
def test_a_qemu_without_that_monitor_is_as_it_was(arguments: list[str]) -> None:
    assert between(arguments, "/tmp/vm-1/qmp") == (arguments, None)


def test_refault_listens_for_qemu_and_dials_the_program() -> None:
    _, *command = refault_command("refault", "/tmp/vm-1/qmp", "/tmp/qtest-7.qmp", Path("/tmp/vm-1"))
    [options] = configuration(build_parser(command).parse_args(command)).vms
    assert (options.qemu.path, options.qemu.server) == ("/tmp/vm-1/qmp", True)
    assert [(each.path, each.server) for each in options.listen] == [("/tmp/qtest-7.qmp", False)]


def test_listening_is_seen_without_a_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as sock:
        assert not is_listening(path)
        sock.bind(path)
        assert not is_listening(path)
        sock.listen()
        assert is_listening(path)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.accept()


def runs(*words: str) -> list[Run]:
    return [Run(word, 1.0) for word in words]


@pytest.mark.parametrize(
    ("alone", "through", "worse"),
    [
        (["ok"], ["ok"], False),
        (["ok"], ["FAILED"], True),
        (["ok"], ["HANGS"], True),
        (["ok"], ["skipped"], True),
        (["FAILED"], ["FAILED"], False),
        (["FAILED"], ["HANGS"], True),
        (["FAILED"], ["ok"], False),
        (["skipped"], ["skipped"], False),
        (["ok", "ok"], ["ok", "FAILED"], True),
        (["ok", "FAILED"], ["FAILED", "FAILED"], True),
        (["ok", "FAILED"], ["ok", "FAILED"], False),
        (["ok", "FAILED"], ["FAILED", "ok"], False),
    ],
)
def test_what_is_worse_through_refault(alone: list[str], through: list[str], worse: bool) -> None:
    assert differs(runs(*alone), runs(*through)) is worse


def test_a_refault_that_did_not_end_well_is_worse(tmp_path: Path) -> None:
    status = tmp_path / "status"
    assert complaints("", status)
    status.write_text("-9")
    assert complaints("", status)
    status.write_text("0")
    assert complaints("vm-1: internal error; the connection to QEMU is made anew\n", status)
    assert not complaints("vm-1: SIGTERM, ending\n", status)
    through = [Run("ok", 1.0, complaints=["a refault ended with -9"])]
    assert differs(runs("ok"), through)


def test_a_row_of_the_table() -> None:
    through = [Run("ok", 2.0, {"source", "destination"}), Run("FAILED", 4.0)]
    told = row("/x86_64/migration/postcopy/plain", runs("ok", "ok"), through)
    assert told == "| postcopy/plain | ok | 1 ok, 1 FAILED | destination, source | 1, 3 |"
