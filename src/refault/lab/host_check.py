"""What the demo needs of this host, and what is known to be dangerous with its QEMU."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Version = tuple[int, int, int]
Grade = Literal["ok", "note", "danger", "missing"]

_CAP_SYS_PTRACE = 19
_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "ppc64le": 364, "s390x": 355, "riscv64": 282}
_SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
_DEVICE = Path("/dev/userfaultfd")
_DEVICE_SINCE: Version = (8, 0, 0)  # QEMU's util/userfaultfd.c, uffd_open
_FIRST: Version = (3, 0, 0)  # qapi/migration.json, migrate-recover
_NEVER: Version = (999, 0, 0)


@dataclass(frozen=True)
class Finding:
    """One fact about the host; `missing` means that the demo cannot run, and the text says what to do."""

    subject: str
    grade: Grade
    text: str

    def document(self) -> dict[str, Any]:
        """Its part of the JSON document."""
        return {"subject": self.subject, "grade": self.grade, "text": self.text}


# What a bare QEMU does from one version until before another. Tried on 5.2, 7.2, 10.0 and 11.1: a bound
# between two of these is the first version not known to be like the older one.
_DANGERS: tuple[tuple[Version, Version, str], ...] = (
    (_FIRST, (5, 2, 0), "page requests in flight when the channel breaks are forgotten"),
    (_FIRST, _NEVER, "requests of vhost-user back ends in flight when the channel breaks are forgotten"),
    (
        _FIRST,
        (7, 2, 0),
        "a second failed resume aborts the source; one failed migrate-recover spoils all later",
    ),
    (_FIRST, _NEVER, "a channel lost in the switchover can end the destination"),
    (
        _FIRST,
        (8, 2, 0),
        "a channel lost in the handshake of a recovery ends the destination, and so the guest",
    ),
    (_FIRST, _NEVER, "a stray connection to a destination that waits for its recovery can end it"),
    (_FIRST, (8, 0, 0), "a channel lost after the source's last byte leaves the migration hanging"),
    ((8, 0, 0), _NEVER, "a channel lost after the source's last byte can run the guest on both hosts"),
    (_FIRST, (8, 2, 0), "migrate_cancel while the migration is paused hangs"),
)


def check_host(binary: str) -> tuple[list[Finding], Version | None]:
    """Looks at the host; gives what was found, and the version of QEMU where there is one."""
    qemu, version = _qemu(binary)
    findings = [qemu, _kvm()]
    if version is not None:
        findings += [_userfaultfd(version), *_dangers(version)]
    return findings, version


def _qemu(binary: str) -> tuple[Finding, Version | None]:
    install = "install it (Debian: apt install qemu-system-x86)"
    if shutil.which(binary) is None:
        return Finding(
            "QEMU", "missing", f"there is no {binary}; {install} or name another with --qemu"
        ), None
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=False)
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", done.stdout)
    if found is None:
        said = (done.stdout + done.stderr).strip().splitlines()[:1]
        return Finding("QEMU", "missing", f"{binary} --version says {said}; {install} again"), None
    version: Version = (int(found[1]), int(found[2]), int(found[3]))
    text = f"{'.'.join(map(str, version))} ({binary})"
    if version < _FIRST:
        return Finding(
            "QEMU", "missing", f"{text} cannot recover a postcopy migration; 3.0 and later can"
        ), None
    return Finding("QEMU", "ok", text), version


def _kvm() -> Finding:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Finding("KVM", "ok", "/dev/kvm may be used")
    if Path("/dev/kvm").exists():
        return Finding(
            "KVM", "note", "/dev/kvm may not be used by this user (group kvm?); TCG emulates, slowly"
        )
    return Finding("KVM", "note", "this host has none; TCG emulates, slowly")


def _userfaultfd(version: Version) -> Finding:
    """Whether QEMU may catch faults that the kernel makes for it (KVM's), which postcopy needs."""
    if os.uname().machine not in _USERFAULTFD:
        return Finding("userfaultfd", "note", f"not known how to ask on {os.uname().machine}; QEMU will tell")
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_USERFAULTFD[os.uname().machine], os.O_CLOEXEC)
    if descriptor >= 0:
        os.close(descriptor)
        why = "CAP_SYS_PTRACE" if _has_capability(_CAP_SYS_PTRACE) else "vm.unprivileged_userfaultfd = 1"
        return Finding("userfaultfd", "ok", f"the system call is permitted ({why})")
    error = ctypes.get_errno()
    if error == errno.ENOSYS:
        return Finding("userfaultfd", "missing", "this kernel has none; postcopy needs CONFIG_USERFAULTFD")
    if version >= _DEVICE_SINCE and os.access(_DEVICE, os.R_OK | os.W_OK):
        return Finding("userfaultfd", "ok", f"permitted through {_DEVICE}")
    setting = _SYSCTL.read_text().strip() if _SYSCTL.exists() else "not there"
    ways = "run as root, or sysctl vm.unprivileged_userfaultfd=1"
    if version >= _DEVICE_SINCE:
        ways += f", or give this user {_DEVICE}"
    return Finding(
        "userfaultfd",
        "missing",
        f"not permitted ({os.strerror(error)}; vm.unprivileged_userfaultfd is {setting}); {ways}",
    )


def _has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> number & 1)


def _dangers(version: Version) -> list[Finding]:
    name = ".".join(map(str, version))
    return [
        Finding(f"QEMU {name} alone", "danger", text)
        for since, until, text in _DANGERS
        if since <= version < until
    ]
