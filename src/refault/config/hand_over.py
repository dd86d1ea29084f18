"""VMs that libvirt starts: their monitors are handed over (`exec` of [daemon])."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refault.config import values
from refault.config.options import vm_options
from refault.daemon.host.paths import SUN_PATH
from refault.daemon.monitor.address import Address
from refault.daemon.options import VmOptions
from refault.qmp.access import Rule

HIDE_PAUSE = 30.0
"""Seconds for which libvirt does not hear of a pause that refault recovers: `virsh migrate` gives up by
itself after 30 s in which the other host is not reached (keepalive of libvirtd.conf)."""


@dataclass(frozen=True)
class Handed:
    """Where they are handed over, and what is made of each."""

    address: Address
    common: tuple[tuple[str, Any], ...]
    """The options, as they are read."""
    state_dir: Path

    def names(self, name: str, uuid: str) -> list[str]:
        """The domain's name; its uuid where that is none of ours, or another has it."""
        possible = []
        for text in (name, uuid):
            try:
                possible.append(values.vm_name(text))
            except ValueError:
                continue
        return possible

    def vm(self, name: str, monitor: Address) -> VmOptions:
        """Its sockets are in its state directory: QEMU's, and one for people, for libvirt lets nobody else
        speak at a migrating destination. Raises ValueError."""
        directory = self.state_dir / name
        said = self.address.rule.hide_pause
        monitor = replace(monitor, rule=Rule(hide_pause=HIDE_PAUSE if said is None else said))
        given = {
            **dict(self.common),
            "qemu": Address(str(directory / "monitor")),
            "listen": (monitor, Address(str(directory / "qmp"), server=True)),
        }
        if len(os.fsencode(directory / "monitor")) >= SUN_PATH:
            raise ValueError(f"{directory}/monitor is too long for a socket's path")
        return vm_options(name, given, directory)
