"""One VM's trouble is its own: how long `query-status` takes at the others behind the same `refault serve`
while one VM's QEMU or client misbehaves, beside how long it takes while all is quiet.

    make campaign-troubles CAMPAIGN="--vms 99 --seconds 10"

Quiet and trouble take turns, so that what else the machine does befalls both. Who makes trouble takes a core
from everybody on the host, whatever stands in front of him: so he and his QEMU have one of their own, and
refault, the others and who asks them another. Beside each stands the same with the troubled VM behind a
`refault serve` of its own, on the troubled core: nothing of the trouble can reach the others there but what
the host lets through.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign.many import REFAULT, connected, processes, until
from tests.support.troublemaker import KINDS, QEMUS, QUIET

HANGS = "QEMU hangs"
TROUBLES = (HANGS, *KINDS)
BAD = "bad"
MEMORY = "/dev/shm"
"""As /run is, where the state directories are."""
STRETCH = 0.15
"""Seconds of quiet, and of trouble, by turns."""
SETTLES = 0.05
"""Seconds for what has been sent to be read."""
IDLE = 0.05
"""Share of a core that a daemon has at most which has read all."""
MOST = 2.0
"""How many times the quiet 99th percentile that of the trouble may be."""


@dataclass
class Times:
    """Round trips, in seconds."""

    quiet: list[float] = field(default_factory=list)
    trouble: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Of the 99th percentiles."""
        return percentile(self.trouble, 99) / percentile(self.quiet, 99)


def percentile(times: list[float], percent: int) -> float:
    """The smallest that is not smaller than so many of all."""
    return sorted(times)[-(-len(times) * percent // 100) - 1]


class Client:
    """One who is always there, and asks one thing at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        assert b"QMP" in self._socket.recv(4096)
        self._told(b'{"execute": "qmp_capabilities"}')

    def _told(self, command: bytes) -> bytes:
        self._socket.sendall(command)
        return self._socket.recv(4096)

    def ask(self) -> float:
        """How long query-status takes. Raises AssertionError where it is not answered."""
        began = time.perf_counter()
        reply = self._told(b'{"execute": "query-status"}')
        took = time.perf_counter() - began
        assert b"running" in reply, reply
        return took

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def cores() -> Iterator[list[str]]:
    """This process, and what it starts, has one core until the end; what starts a command on another one."""
    before = os.sched_getaffinity(0)
    ours, others = min(before), max(before)
    os.sched_setaffinity(0, {ours})
    try:
        yield ["taskset", "--cpu-list", str(others)]
    finally:
        os.sched_setaffinity(0, before)


class Host:
    """A `refault serve` in front of so many idle VMs, and of one that is in trouble."""

    def __init__(
        self, directory: Path, clients: list[Client], daemons: list[int], elsewhere: list[str]
    ) -> None:
        self.bad = directory / BAD
        self._elsewhere = elsewhere
        """What starts a command on the troubled core."""
        self._daemons = daemons
        self._directory = directory
        self._clients = clients
        self._asked = 0

    def _ask_for(self, seconds: float, times: list[float]) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            times.append(self._clients[self._asked % len(self._clients)].ask())
            self._asked += 1

    def _until_idle(self) -> None:
        """Who floods has left much to be read."""

        def is_idle() -> bool:
            before = self._ran()
            time.sleep(SETTLES)
            return self._ran() - before < IDLE * SETTLES

        until(is_idle)

    def _ran(self) -> float:
        """Seconds for which the daemons have had a core."""
        stats = (Path(f"/proc/{daemon}/schedstat").read_text() for daemon in self._daemons)
        return sum(int(stat.split()[0]) for stat in stats) / 1e9

    def during(self, trouble: str, enough: Callable[[Times], bool]) -> Times:
        """How long the others take, until it is `enough`."""
        times = Times()
        with self._making(trouble) as (begin, end):
            while True:
                end()
                self._until_idle()
                self._ask_for(STRETCH, times.quiet)
                begin()
                time.sleep(SETTLES)
                self._ask_for(STRETCH, times.trouble)
                if enough(times):
                    return times

    @contextlib.contextmanager
    def _making(self, trouble: str) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
        """How the trouble is begun and ended."""
        self.bad.unlink(missing_ok=True)
        qemu = [*QUIET, "-qmp", f"unix:{self.bad},server=on,wait=off"]
        maker = [sys.executable, "-m", "tests.support.troublemaker", trouble, str(self.bad)]
        commands = [maker] if trouble in QEMUS else [qemu] if trouble == HANGS else [qemu, maker]
        with processes([[*self._elsewhere, *each] for each in commands], self._directory) as running:
            until(self.bad.exists)

            def tell(process: subprocess.Popen[bytes], number: int) -> Callable[[], None]:
                return lambda: process.send_signal(number)

            begin, end = signal.SIGCONT, signal.SIGSTOP
            if trouble == HANGS:
                begin, end = end, begin
            time.sleep(STRETCH)  # it is in the midst of it
            yield tell(running[-1], begin), tell(running[-1], end)
            running[-1].send_signal(signal.SIGCONT)


@contextlib.contextmanager
def host(directory: Path, vms: int, elsewhere: list[str], *, apart: bool = False) -> Iterator[Host]:
    """Runs them, until the end. `apart`: the one in trouble has a daemon of its own, `elsewhere`."""
    names = [f"vm{number}" for number in range(vms)]
    daemons = {"refault": [*names, *([] if apart else [BAD])], **({"apart": [BAD]} if apart else {})}
    for daemon, fronted in daemons.items():
        tables = [
            f'[vm.{name}]\nqemu = "{directory}/{name}"\nlisten = "{directory}/{name}.qmp"\n'
            f'state_dir = "{directory}/{name}.d"\n'
            for name in fronted
        ]
        control = f'[daemon]\ncontrol = "{directory}/{daemon}.control"\n'
        (directory / f"{daemon}.toml").write_text("".join((control, *tables)))
    qemus = [[*QUIET, "-qmp", f"unix:{directory}/{name},server=on,wait=off"] for name in names]
    serve = [[*REFAULT, "serve", "--config", str(directory / f"{daemon}.toml")] for daemon in daemons]
    if apart:
        serve[-1] = [*elsewhere, *serve[-1]]
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(processes([*qemus, *serve], directory))
        until(lambda: connected([directory / "refault.control"]) == vms)
        clients = [
            stack.enter_context(contextlib.closing(Client(directory / f"{name}.qmp"))) for name in names
        ]
        yield Host(directory, clients, [daemon.pid for daemon in running[len(qemus) :]], elsewhere)


def main() -> None:
    """Prints a table, and exits with 1 where one VM's trouble is another's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--vms", type=int, default=99, help="others")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each trouble")
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    head = "one VM's trouble | others, p50, quiet, ms | in trouble | p99, quiet, ms | in trouble | ratio"
    print(f"| {head} | ratio, apart |")
    print("|---|---|---|---|---|---|---|")
    with contextlib.ExitStack() as stack:
        elsewhere = stack.enter_context(cores())
        hosts = []
        for apart in (False, True):
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="refault-", dir=MEMORY))
            hosts.append(stack.enter_context(host(Path(path), options.vms, elsewhere, apart=apart)))
        for trouble in TROUBLES:
            measured = []
            for fronted in hosts:
                until_then = time.monotonic() + options.seconds
                measured.append(fronted.during(trouble, lambda _, end=until_then: time.monotonic() > end))  # type: ignore[misc]
            cells = [
                f"{1000 * percentile(each, percent):.2f}"
                for percent in (50, 99)
                for each in (measured[0].quiet, measured[0].trouble)
            ]
            ratios[trouble] = [times.ratio for times in measured]
            print(
                f"| {trouble} | {' | '.join(cells)} | {' | '.join(f'{r:.2f}' for r in ratios[trouble])} |",
                flush=True,
            )
    wrong = [trouble for trouble, (beside, _) in ratios.items() if beside > MOST]
    if wrong:
        sys.exit(f"more than {MOST:g} times: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
