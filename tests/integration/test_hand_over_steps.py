"""refault stopped, or killed, at each step of a hand-over: libvirt is answered, by refault or by QEMU itself.

A step is a line of hand_overs.py that a hand-over passes.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.test_hand_over import QEMU, Domain, build_wrapper, next_refault
from tests.integration.test_serve import Served
from tests.support.until import until

from refault.daemon import hand_overs

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

SAVED = 'send_with(connection, b"ok"'
GIVEN = "with trio.move_on_after(TAKEN_WITHIN)"
TAKEN = "undo.pop_all()"
PATIENCE = {"impatient": 300, "patient": 20_000}
"""Milliseconds that a wrapper has."""
STEPPING = """
import os, sys
from pathlib import Path
from refault.cli.main import main
from refault.daemon import hand_overs
directory = Path(sys.argv.pop(1))
passed, stop = (directory / name for name in ("passed", "stop"))

def step(frame, event, _):
    if event == "line":
        with passed.open("a") as steps:
            print(frame.f_lineno, file=steps)
        if stop.exists():
            line, number = map(int, stop.read_text().split())
            if line == frame.f_lineno:
                stop.unlink()
                os.kill(os.getpid(), number)
    return step

sys.settrace(lambda frame, *_: step if frame.f_code.co_filename == hand_overs.__file__ else None)
sys.exit(main())
"""
"""Says in `passed` which lines it passes, and has a signal at that which `stop` names, once."""


class Stepping:
    """One, in a directory, and the wrappers that come to it."""

    def __init__(self, directory: Path, *wrappers: str) -> None:
        self.directory = directory
        self.wrappers = {name: self._wrapper(name) for name in wrappers}
        (directory / "refault.toml").write_text(f'[daemon]\nexec = "{directory}/run/exec"\n')
        self.served = Served(directory, sys.executable, "-c", STEPPING, str(directory))

    def _wrapper(self, name: str) -> Path:
        (self.directory / name).mkdir()
        return build_wrapper(self.directory / name, self.directory, f"-DREFAULT_PATIENCE={PATIENCE[name]}")

    def steps(self) -> list[int]:
        """All of a hand-over that nothing befalls, up to where libvirt is served."""
        (self.directory / "passed").unlink()
        with contextlib.closing(self.start("undisturbed", "patient")):
            passed = (self.directory / "passed").read_text()
        self.served.until(lambda status: status.vms == ())
        return list(dict.fromkeys(map(int, passed.split())))

    def befalls(self, line: int, number: signal.Signals) -> None:
        """At a step, once."""
        (self.directory / "stop.new").write_text(f"{line} {number.value}")
        (self.directory / "stop.new").rename(self.directory / "stop")

    def start(
        self, name: str, wrapper: str, started: Callable[[subprocess.Popen[bytes]], None] = lambda _: None
    ) -> Domain:
        """A domain of libvirt's."""
        return Domain(self.directory, str(self.wrappers[wrapper]), name, started=started)


@contextlib.contextmanager
def stepping(directory: Path, *wrappers: str) -> Iterator[Stepping]:
    directory.mkdir(exist_ok=True)
    refault = Stepping(directory, *wrappers)
    with refault.served.manager, refault.served.process as process:
        try:
            refault.served.until_ready()
            refault.served.reload()
            yield refault
        finally:
            process.kill()


def at(text: str) -> int:
    """The line of hand_overs.py that begins so, as the only one."""
    lines, first = inspect.getsourcelines(hand_overs)
    [number] = [number for number, line in enumerate(lines, max(first, 1)) if line.strip().startswith(text)]
    return number


def is_qemu(process: subprocess.Popen[bytes]) -> bool:
    return os.path.basename(os.readlink(f"/proc/{process.pid}/exe")) == QEMU


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].startswith("T")


def lives_to_its_end(domain: Domain) -> bytes:
    """Is libvirt's as any other; its errors."""
    assert b"QMP" in domain.greeting
    assert domain.ask("qmp_capabilities") == {"return": {}}
    assert domain.ask("query-status")["return"]["running"]
    domain.say("quit")
    _, code, errors = domain.end()
    assert code == 0
    return errors


def stopped_at_each(refault: Stepping, steps: list[int]) -> None:
    served = refault.served
    given = steps.index(at(GIVEN))
    for number, step in enumerate(steps):

        def goes_on(emulator: subprocess.Popen[bytes]) -> None:
            until(lambda: is_stopped(served.process), served.log.read_text)
            until(lambda: is_qemu(emulator), served.log.read_text)
            served.process.send_signal(signal.SIGCONT)

        refault.befalls(step, signal.SIGSTOP)
        name, wrapper = f"vm{number}", "patient" if number >= given else "impatient"
        with contextlib.closing(refault.start(name, wrapper, goes_on)) as domain:
            errors = lives_to_its_end(domain)
        assert not errors or b"QEMU starts without refault: " in errors
        fronted = f"{name}: libvirt's monitor is handed over" in served.log.read_text()
        assert fronted is (errors == b""), (step, errors)
        served.until(lambda status: status.vms == ())
    # What it had begun leaves nothing either.
    until(lambda: not [*(refault.directory / "run").glob("vm*")], served.log.read_text)


def killed_at(directory: Path, step: int) -> bytes:
    """What QEMU's errors are."""
    with stepping(directory, "patient") as refault, contextlib.ExitStack() as stack:

        def is_followed(emulator: subprocess.Popen[bytes]) -> None:
            refault.served.process.wait(20)
            until(lambda: is_qemu(emulator), refault.served.log.read_text)
            stack.enter_context(next_refault(directory))

        refault.befalls(step, signal.SIGKILL)
        with contextlib.closing(refault.start("vm", "patient", is_followed)) as domain:
            return lives_to_its_end(domain)


def test_a_refault_that_is_stopped_in_a_hand_over_and_goes_on_later_moves_no_domain(tmp_path: Path) -> None:
    with stepping(tmp_path, "impatient", "patient") as refault:
        stopped_at_each(refault, [at(SAVED), at(GIVEN), at(TAKEN)])


@pytest.mark.nightly
def test_it_moves_none_whatever_the_step(tmp_path: Path) -> None:
    with stepping(tmp_path, "impatient", "patient") as refault:
        steps = refault.steps()
        assert len(steps) > 50
        stopped_at_each(refault, steps)


@pytest.mark.parametrize("step", [SAVED, GIVEN])
def test_a_refault_that_is_killed_in_a_hand_over_is_followed_by_one_that_serves_it(
    tmp_path: Path, step: str
) -> None:
    errors = killed_at(tmp_path, at(step))
    assert (errors == b"") is (step == GIVEN), errors  # from then on QEMU has what refault gave


@pytest.mark.nightly
def test_it_is_served_or_goes_its_own_way_whatever_the_step(tmp_path: Path) -> None:
    with stepping(tmp_path / "steps", "patient") as refault:
        steps = refault.steps()
    for step in steps:
        killed_at(tmp_path / str(step), step)
