"""The first process of a host of the lab (hosts.py): lays what the host sees at its place, and reaps.

Run in mount, UTS, IPC and PID namespaces of its own: NAME DIRECTORY ROOT. ROOT, unless it is empty, is that
of another Debian, which is given at their places what the machine's own root is given. Says `ready`, and
runs until it is killed, which ends all processes of the host.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

LAID = {
    "etc/libvirt": "/etc/libvirt",
    "etc/passwd": "/etc/passwd",
    "etc/group": "/etc/group",
    "etc/hosts": "/etc/hosts",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}
"""What of the host's directory stands where."""
SHARED = ("/proc", "/sys", "/dev", "/run")
"""What is one in both roots."""


def mount(*arguments: str) -> None:
    subprocess.run(["mount", "-n", *arguments], check=True)


def main() -> None:
    name, directory, other = sys.argv[1:]
    mount("--make-rprivate", "/")
    mount("-t", "sysfs", "sysfs", "/sys")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for root in ("", other) if other else ("",):
        for ours, place in LAID.items():
            if (Path(directory) / ours).is_dir():
                Path(f"{root}{place}").mkdir(parents=True, exist_ok=True)
            elif root:
                Path(f"{root}{place}").touch()  # of /etc/hosts there may be none
            mount("--bind", f"{directory}/{ours}", f"{root}{place}")
    if other:
        mount("-t", "tmpfs", "tmpfs", f"{other}/tmp")
        for place in SHARED:
            mount("--rbind", place, f"{other}{place}")
    Path("/run/lab").mkdir()
    socket.sethostname(name)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            signal.pause()


if __name__ == "__main__":
    main()
