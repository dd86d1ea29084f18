"""What many VMs cost: one `refault serve` in front of them all, and as many `refault run` beside it.

    make campaign-many CAMPAIGN="--vms 100 --seconds 20"

The QEMUs are real and idle (`-M none`); `--fakes 1000` measures one daemon alone, in front of as many that
one process pretends to be. Memory is what the processes have to themselves and their part of what they share
(Pss, /proc/PID/smaps_rollup); time on a core is what the kernel counts (/proc/PID/stat).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from refault.daemon.host.errors import OperatorError
from refault.daemon.telling.control import query

REFAULT = [sys.executable, "-m", "refault"]
PATIENCE = 240.0
READY_WITHIN = 5.0
"""Seconds for 100 QEMUs; of more, which one process pretends to be, that process's time is most."""
MEGABYTES_EACH = 1.0
IDLE_CORE = 0.005
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """Of all processes that front the VMs together."""

    ready: float
    """Seconds from the start until every QEMU is connected to."""
    megabytes: float
    core: float
    """Share of a core while idle."""
    switches: float
    """Times a second that a thread of theirs was run, while idle."""


def until(condition: Callable[[], object]) -> None:
    """Looks again and again. Raises TimeoutError."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


@contextlib.contextmanager
def processes(commands: Sequence[Sequence[str]], directory: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs all of `commands`, until the end."""
    environment = os.environ | {"RUNTIME_DIRECTORY": str(directory)}
    with (directory / "log").open("ab") as log, contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(end, process)
            started.append(process)
        yield started


def end(process: subprocess.Popen[bytes]) -> None:
    """A refault that is killed leaves the monitor with its QEMU: it is told to stop first."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def connected(controls: Sequence[Path]) -> int:
    """VMs whose QEMU is connected to."""
    count = 0
    for control in controls:
        with contextlib.suppress(OperatorError):
            count += sum(vm.qemu.connected for vm in query(control, 5).vms)
    return count


def pss(pid: int) -> float:
    """Megabytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def ticks(pid: int) -> int:
    """Time on a core, of all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def switches(pid: int) -> int:
    """How often the threads were put aside, of their own will or not."""
    count = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        count += sum(
            int(line.split()[1]) for line in status.read_text().splitlines() if "ctxt_switches" in line
        )
    return count


def measure(
    commands: Sequence[Sequence[str]], controls: Sequence[Path], vms: int, seconds: float, directory: Path
) -> Cost:
    """Runs what fronts the VMs, until it is ready, and then idle."""
    began = time.monotonic()
    with processes(commands, directory) as running:
        until(lambda: connected(controls) == vms)
        ready = time.monotonic() - began
        time.sleep(2)
        megabytes = sum(pss(process.pid) for process in running)
        used, run = (sum(count(process.pid) for process in running) for count in (ticks, switches))
        time.sleep(seconds)
        used = sum(ticks(process.pid) for process in running) - used
        run = sum(switches(process.pid) for process in running) - run
        return Cost(ready, megabytes, used / TICKS / seconds, run / seconds)


def tell(what: str, cost: Cost) -> None:
    """One row of the table in docs/serve.md."""
    print(
        f"| {what} | {cost.ready:.1f} | {cost.megabytes:.1f} | {100 * cost.core:.2f} | {cost.switches:.1f} |",
        flush=True,
    )


def too_much(one: Cost, all_of_them: Cost, vms: int) -> list[str]:
    """What of what one daemon costs is more than it may be."""
    each = (all_of_them.megabytes - one.megabytes) / max(vms - 1, 1)
    found = {
        f"ready after {all_of_them.ready:.1f} s": all_of_them.ready > READY_WITHIN,
        f"{each:.2f} MB for each VM over the first": each > MEGABYTES_EACH,
        f"{100 * all_of_them.core:.2f} % of a core while idle": all_of_them.core > IDLE_CORE,
    }
    return [what for what, is_so in found.items() if is_so]


def main() -> int:
    """Measures, and prints a table; 1 where one daemon costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--vms", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long idle is measured")
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--fakes", type=int, default=0)
    options = parser.parse_args()
    vms = options.fakes or options.vms
    names = [f"vm{number}" for number in range(vms)]
    with tempfile.TemporaryDirectory(prefix="refault-") as path:
        directory = Path(path)
        quiet = ["-machine", "none", "-nodefaults", "-display", "none"]
        qemus = [
            [options.qemu, *quiet, "-qmp", f"unix:{path}/{name}.real,server=on,wait=off"] for name in names
        ]
        if options.fakes:
            qemus = [
                [sys.executable, "-m", "tests.support.fake_qemus", *(f"{path}/{name}.real" for name in names)]
            ]
        with processes(qemus, directory):
            until(lambda: all((directory / f"{name}.real").exists() for name in names))
            time.sleep(2)
            print(
                "| in front of the QEMUs | ready, s | memory, MB | of a core, idle, % | wake-ups a second |"
            )
            print("|---|---|---|---|---|")
            costs = []
            for count in sorted({1, vms}):
                files = directory / f"{count}"
                files.mkdir()
                tables = [
                    f'[vm.{name}]\nqemu = "{path}/{name}.real"\nlisten = "{path}/{name}.qmp"\n'
                    for name in names[:count]
                ]
                (files / "refault.toml").write_text("".join(tables))
                command = [*REFAULT, "serve", "--config", str(files / "refault.toml")]
                control = directory / "refault.control"
                cost = measure([command], [control], count, options.seconds, directory)
                tell(f"one `refault serve`, {count}", cost)
                costs.append(cost)
            if options.fakes:
                return 0
            commands = [
                [
                    *REFAULT,
                    "run",
                    "--qemu",
                    f"{path}/{name}.real",
                    "--listen",
                    f"{path}/{name}.qmp",
                    "--name",
                    name,
                ]
                for name in names
            ]
            controls = [directory / f"{name}.control" for name in names]
            tell(
                f"{options.vms} `refault run`",
                measure(commands, controls, options.vms, options.seconds, directory),
            )
    found = too_much(costs[0], costs[-1], vms)
    if found:
        print("more than it may cost:", "; ".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
