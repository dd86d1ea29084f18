"""refault's monitor in a process of its own: python qmp_front.py QEMU LISTEN."""

from __future__ import annotations

import sys

import trio

from refault.daemon.address import parse_address
from refault.daemon.monitor import Monitor

if __name__ == "__main__":
    monitor = Monitor("vm", parse_address(sys.argv[1]), [parse_address(sys.argv[2], server=True)])
    trio.run(monitor.run)
