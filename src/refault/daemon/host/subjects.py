"""What lines of the log may be about: the VMs that are served, each with the recovery under way.

A line begins with the VM's name; here is which words are such a name.
"""

from __future__ import annotations

_recoveries: dict[str, str | None] = {}
"""By VM: the id of its loss that has not been recovered. Read in any thread."""


def served(vm: str) -> None:
    """Lines may be about this VM from here on."""
    _recoveries.setdefault(vm, None)


def recovering(vm: str, loss: str | None) -> None:
    """Its lines are about this loss from here on; None: about none."""
    if vm in _recoveries:
        _recoveries[vm] = loss


def is_vm(name: str) -> bool:
    """Whether a VM of that name is, or was, served."""
    return name in _recoveries


def loss_of(vm: str) -> str | None:
    """The loss that lines of this VM are about."""
    return _recoveries.get(vm)
