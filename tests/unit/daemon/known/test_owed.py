"""What refault has set at a QEMU is set back, whoever comes between."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from refault.daemon.kernel.process import process_started
from refault.daemon.known.owed import Owed
from refault.daemon.monitor.monitor import Monitor, MonitorLost, QmpError
from refault.daemon.monitor.passed import Passed
from refault.daemon.record.owed_file import OwedFile
from refault.daemon.record.state_file import StateFile

OK = b'{"return": {}}'
REFUSED = b'{"error": {"class": "GenericError", "desc": "no"}}'
ME = os.getpid(), process_started(os.getpid())


class Qemu:
    """A source with descriptors and one parameter."""

    def __init__(self) -> None:
        self.name = ""
        self.descriptors = {"a", "b"}
        self.fails: Exception | None = None
        self.passed = Passed()
        self.asked: list[str] = []
        self.tasks: list[Callable[[], Awaitable[None]]] = []

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, **_: object) -> object:
        await trio.lowlevel.checkpoint()
        self.asked.append(command)
        if self.fails is not None:
            raise self.fails
        if command == "closefd" and arguments is not None:
            if arguments["fdname"] not in self.descriptors:
                raise QmpError("GenericError", "not found")
            self.descriptors.remove(arguments["fdname"])
        if command == "migrate-set-parameters" and arguments is not None:
            self.name = arguments["tls-hostname"]
        return {"tls-hostname": self.name, "max-bandwidth": 1}

    def shown_by(self, owed: Owed) -> object:
        """What a client reads."""
        reply = owed.hide(msgspec.json.encode({"return": {"tls-hostname": self.name, "max-bandwidth": 1}}))
        told = msgspec.json.decode(reply)["return"]
        assert told["max-bandwidth"] == 1
        return told["tls-hostname"]


def owed_to(qemu: Qemu, directory: Path, pid: tuple[int, int | None] = ME) -> Owed:
    """As the next refault has it, too."""
    owed = Owed(
        "vm", lambda: cast(Monitor, qemu), OwedFile(StateFile(directory, "vm"), "vm"), qemu.tasks.append
    )
    owed.met(*pid)
    return owed


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_the_name_is_hidden_and_put_back(tmp_path: Path) -> None:
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    await owed.name_other_host(self := object(), "host-b")
    assert (qemu.name, qemu.shown_by(owed), files(tmp_path)) == ("host-b", "", ["vm.owed.json"])
    await owed.put_back(object())  # another's
    assert qemu.name == "host-b"
    await owed.put_back(self)
    assert (qemu.name, qemu.shown_by(owed), files(tmp_path)) == ("", "", [])
    asked = len(qemu.asked)
    await owed.put_back(self)
    assert len(qemu.asked) == asked


async def test_the_next_refault_hides_it_and_puts_it_back(tmp_path: Path) -> None:
    qemu = Qemu()
    await owed_to(qemu, tmp_path).name_other_host(object(), "host-b")
    again = owed_to(qemu, tmp_path)
    assert (qemu.shown_by(again), again.tls_hostname) == ("", "host-b")
    await again.put_back()
    assert (qemu.name, files(tmp_path)) == ("", [])


async def test_another_qemu_is_owed_nothing(tmp_path: Path) -> None:
    qemu = Qemu()
    first = owed_to(qemu, tmp_path)
    first.will_close("a")
    assert ME[1] is not None
    other = owed_to(qemu, tmp_path, (ME[0], ME[1] + 1))
    await other.pay()
    assert (qemu.descriptors, files(tmp_path)) == ({"a", "b"}, [])
    first.met(ME[0], ME[1] + 1)
    await first.pay()
    assert qemu.descriptors == {"a", "b"}


async def test_a_qemu_that_may_not_be_looked_at_any_more_is_owed_what_it_was(tmp_path: Path) -> None:
    qemu = Qemu()
    owed_to(qemu, tmp_path).will_close("a")
    await owed_to(qemu, tmp_path, (ME[0], None)).pay()
    assert (qemu.descriptors, files(tmp_path)) == ({"b"}, [])


async def test_since_when_qemu_runs_is_told_once_it_is_known(tmp_path: Path) -> None:
    """Else what the next QEMU with its number has by these names would be closed."""
    qemu = Qemu()
    assert ME[1] is not None
    owed_to(qemu, tmp_path, (ME[0], None)).will_close("a")
    again = owed_to(qemu, tmp_path)
    again.will_close("b")
    again.met(ME[0], ME[1] + 1)
    await again.pay()
    await owed_to(qemu, tmp_path, (ME[0], ME[1] + 1)).pay()
    assert (qemu.descriptors, files(tmp_path)) == ({"a", "b"}, [])


async def test_a_client_that_sets_a_name_has_it(tmp_path: Path) -> None:
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    await owed.name_other_host(self := object(), "host-b")
    verdict = owed.set_by_client({"tls-hostname": "host-b"})
    assert verdict.arguments is None
    assert verdict.on_reply is not None
    assert verdict.on_reply(REFUSED) == REFUSED
    assert qemu.shown_by(owed) == ""
    assert verdict.on_reply(OK) == OK
    assert qemu.shown_by(owed) == "host-b"
    await owed.put_back(self)
    assert (qemu.name, files(tmp_path)) == ("host-b", [])


@pytest.mark.parametrize("none", ["", None])
async def test_a_client_that_sets_none_while_one_is_needed_gets_none_later(
    tmp_path: Path, none: str | None
) -> None:
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    assert owed.set_by_client({"tls-hostname": none}).arguments is None
    await owed.name_other_host(self := object(), "host-b")
    assert owed.set_by_client({"max-bandwidth": 2}).arguments is None
    kept = owed.set_by_client({"tls-hostname": none, "max-bandwidth": 2})
    assert kept.arguments == {"tls-hostname": "host-b", "max-bandwidth": 2}
    await owed.put_back(self)
    assert owed.set_by_client({"tls-hostname": none}).arguments is None


async def test_a_clients_command_that_was_on_its_way_does_not_bring_it_back(tmp_path: Path) -> None:
    """Clients say so as a migration ends (libvirt: qemuMigrationParamsReset)."""
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    await owed.name_other_host(self := object(), "host-b")
    late = owed.set_by_client({"tls-hostname": ""}).arguments
    assert late is not None
    execute = qemu.execute

    async def then_it_comes(command: str, arguments: Any = None, **_: object) -> object:
        reply = await execute(command, arguments)
        if command == "migrate-set-parameters":
            vars(qemu).pop("execute")
            await execute(command, late)
        return reply

    vars(qemu)["execute"] = then_it_comes
    await owed.put_back(self)
    assert qemu.name == ""


async def test_what_somebody_else_has_set_stays(tmp_path: Path) -> None:
    """By human-monitor-command, which refault does not read."""
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    await owed.name_other_host(self := object(), "host-b")
    qemu.name = "theirs"
    assert qemu.shown_by(owed) == "theirs"
    await owed.put_back(self)
    assert (qemu.name, files(tmp_path)) == ("theirs", [])


async def test_a_qemu_that_does_not_answer_is_owed_it_yet(tmp_path: Path) -> None:
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    owed.will_close("a")
    await owed.name_other_host(self := object(), "host-b")
    for qemu.fails in (MonitorLost(), trio.TooSlowError()):
        await owed.pay()
        await owed.put_back(self)
        assert (qemu.shown_by(owed), files(tmp_path)) == ("", ["vm.owed.json"])
    qemu.fails = None
    owed.met(*ME)  # connected to again
    await owed.pay()
    await owed.put_back()
    assert (qemu.descriptors, qemu.name, files(tmp_path)) == ({"b"}, "", [])


async def busy_at_the_end(qemu: Qemu, directory: Path, fails: Exception) -> Owed:
    """A migration is over, and QEMU does not set the name back."""
    owed = owed_to(qemu, directory)
    await owed.name_other_host(self := object(), "host-b")
    qemu.fails = fails
    await owed.put_back(self)
    assert (qemu.name, qemu.shown_by(owed), len(qemu.tasks)) == ("host-b", "", 1)
    return owed


@pytest.mark.parametrize("fails", [trio.TooSlowError(), QmpError("GenericError", "not now")])
async def test_a_qemu_that_is_busy_is_asked_until_it_has_set_it_back(
    fails: Exception, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    qemu = Qemu()
    await busy_at_the_end(qemu, tmp_path, fails)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(qemu.tasks[0])
        await trio.sleep(300)
        assert (qemu.name, files(tmp_path)) == ("host-b", ["vm.owed.json"])
        qemu.fails = None
        with trio.fail_after(61):
            while files(tmp_path):
                await trio.sleep(1)
    assert qemu.name == ""


async def test_it_is_not_asked_once_the_next_migration_needs_the_name(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    qemu = Qemu()
    owed = await busy_at_the_end(qemu, tmp_path, trio.TooSlowError())
    qemu.fails = None
    await owed.name_other_host(self := object(), "host-b")
    await qemu.tasks[0]()
    assert (qemu.name, qemu.shown_by(owed)) == ("host-b", "")
    await owed.put_back(self)
    assert qemu.name == ""


async def test_it_is_not_asked_once_the_monitor_is_lost(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    qemu = Qemu()
    owed = await busy_at_the_end(qemu, tmp_path, trio.TooSlowError())
    qemu.fails = MonitorLost()
    await qemu.tasks[0]()
    qemu.fails = None
    owed.met(*ME)
    await owed.put_back()
    assert (qemu.name, files(tmp_path)) == ("", [])


@pytest.mark.parametrize("none", ["", None])
async def test_a_client_clears_what_qemu_has_not_set_back(
    none: str | None, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    qemu = Qemu()
    owed = await busy_at_the_end(qemu, tmp_path, trio.TooSlowError())
    verdict = owed.set_by_client({"tls-hostname": none})
    assert verdict.arguments is None
    assert verdict.on_reply is not None
    assert verdict.on_reply(REFUSED) == REFUSED
    assert files(tmp_path) == ["vm.owed.json"]
    assert verdict.on_reply(OK) == OK
    assert files(tmp_path) == []
    asked = len(qemu.asked)
    await qemu.tasks[0]()
    assert len(qemu.asked) == asked


async def test_a_clients_none_that_is_answered_late_is_not_of_the_next_migration(tmp_path: Path) -> None:
    qemu = Qemu()
    owed = await busy_at_the_end(qemu, tmp_path, trio.TooSlowError())
    late = owed.set_by_client({"tls-hostname": ""}).on_reply
    assert late is not None
    qemu.fails = None
    await owed.name_other_host(self := object(), "host-c")
    late(OK)
    assert (owed.tls_hostname, qemu.shown_by(owed)) == ("host-c", "")
    await owed.put_back(self)
    assert (qemu.name, files(tmp_path)) == ("", [])


async def test_the_same_name_that_is_set_by_somebody_else_later_is_shown(tmp_path: Path) -> None:
    """By human-monitor-command or at another monitor of QEMU's."""
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    await owed.name_other_host(self := object(), "host-b")
    await owed.put_back(self)
    qemu.name = "host-b"
    assert qemu.shown_by(owed) == "host-b"
    await owed.name_other_host(object(), "host-b")
    owed.over()
    assert qemu.shown_by(owed) == "host-b"


async def test_a_name_that_takes_the_place_of_another_leaves_neither(tmp_path: Path) -> None:
    qemu = Qemu()
    owed = await busy_at_the_end(qemu, tmp_path, trio.TooSlowError())
    with pytest.raises(trio.TooSlowError):
        await owed.name_other_host(self := object(), "host-c")
    qemu.fails = None
    await owed.put_back(self)
    assert (qemu.name, files(tmp_path)) == ("", [])


async def test_a_connection_that_is_closed_meanwhile_does_not_take_the_name_off_the_record(
    tmp_path: Path,
) -> None:
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    owed.will_close("a")
    await owed.name_other_host(self := object(), "host-b")
    answers = trio.Event()
    execute = qemu.execute

    async def stuck(command: str, arguments: Any = None, **_: object) -> object:
        if command == "query-migrate-parameters":
            await answers.wait()
        return await execute(command, arguments)

    vars(qemu)["execute"] = stuck
    async with trio.open_nursery() as nursery:
        nursery.start_soon(owed.put_back, self)
        await trio.testing.wait_all_tasks_blocked()
        await owed.pay()
        assert owed_to(qemu, tmp_path).tls_hostname == "host-b"  # the next refault's, after a kill
        answers.set()
    assert (qemu.name, files(tmp_path)) == ("", [])


async def test_a_connection_that_qemu_was_to_close_is_closed_by_the_next_refault(tmp_path: Path) -> None:
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    owed.will_close("a")
    owed.will_close("b")
    owed.keeps("b")  # QEMU has refused the command
    again = owed_to(qemu, tmp_path)
    await again.pay()
    assert (qemu.descriptors, files(tmp_path)) == ({"b"}, [])


async def test_one_that_is_closed_already_is_owed_no_more(tmp_path: Path) -> None:
    qemu = Qemu()
    owed = owed_to(qemu, tmp_path)
    owed.will_close("gone")
    await owed.pay()
    assert files(tmp_path) == []
