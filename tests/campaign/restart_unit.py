"""The campaign of restarts with a refault that is a unit of the service manager's.

    python -m tests.campaign.restart_unit DIRECTORY --unit refault --control /run/refault/refault.control

Runs as root where the unit is; `tests/integration/test_systemd.py` runs it in its Debian. The unit's VM has
its monitor at DIRECTORY/q and listens at DIRECTORY/f. Killed, it is the manager that starts it again
(Restart=).
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import trio
from tests.campaign.restart import NOTICED_WITHIN, campaign


class Unit:
    """As `systemctl` starts, kills and restarts it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last = 0
        self._since = f"@{time.time():.6f}"

    async def start(self) -> None:
        """The first time; after that the manager does it, which is waited for."""
        if not self._last:
            await trio.to_thread.run_sync(self._systemctl, "start")
        with trio.fail_after(NOTICED_WITHIN):
            while (now := await self._main_process()) in (0, self._last):
                await trio.sleep(0.005)
        self._last = now

    async def end(self, *, planned: bool) -> None:
        process = os.pidfd_open(self._last)
        try:
            how = ("restart", "--no-block") if planned else ("kill", "--signal=KILL")
            await trio.to_thread.run_sync(self._systemctl, *how)
            with trio.fail_after(NOTICED_WITHIN):
                await trio.lowlevel.wait_readable(process)
        finally:
            os.close(process)

    def over(self) -> None:
        self._systemctl("stop")

    def log(self) -> str:
        return self._run("journalctl", "--output=cat", f"--since={self._since}", "--unit", self._name)

    async def _main_process(self) -> int:
        told = await trio.to_thread.run_sync(self._systemctl, "show", "--value", "--property=MainPID")
        return int(told)

    def _systemctl(self, *what: str) -> str:
        return self._run("systemctl", *what, self._name)

    @staticmethod
    def _run(*command: str) -> str:
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> int:
    """The campaign, by the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--unit", required=True)
    parser.add_argument("--control", type=Path, required=True, help="where it tells its status")
    parser.add_argument("--qemu", default="qemu-system-x86_64", help="a program that becomes QEMU")
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--planned", action="store_true", help="systemctl restart in place of SIGKILL")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    directory: Path = options.directory
    (directory / "control").symlink_to(options.control)
    daemon = Unit(options.unit)
    wrong = trio.run(
        lambda: campaign(
            options.qemu, options.kills, options.seed, directory, planned=options.planned, daemon=daemon
        )
    )
    print("\n".join(wrong) or "nobody has noticed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
