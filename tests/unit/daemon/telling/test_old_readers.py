"""A `refault status` of the release before `refault serve` reads what a daemon of today tells: fields are
added, and none goes, has another type or says a word that was not known."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import pytest
from tests.unit.daemon.pictures import BUSY, PICTURE

from refault.daemon.telling.snapshot import QemuStatus, Status, VmStatus, encode


def struct(title: str, /, **fields: Any) -> Any:
    """As the reader had it, and more: each field must be there."""
    return msgspec.defstruct(title, list(fields.items()), kw_only=True)


def many(each: Any) -> Any:
    """As many of them as there are."""
    return tuple.__class_getitem__((each, ...))


BLOCK = struct(
    "Block",
    **dict.fromkeys(
        ["size_bytes", "page_size_bytes", "requested", "arrived", "replayed", "outstanding", "present_bytes"],
        int,
    ),
    name=str,
    outstanding_cells=many(int),
)
PAGES = struct(
    "Pages",
    **dict.fromkeys(["requested", "repeated", "arrived", "replayed", "outstanding", "recorded"], int),
    kernel_pending=int | None,
    kernel_waiting=int | None,
    blocks=many(BLOCK),
)
LATENCY = struct(
    "Latency",
    **dict.fromkeys(["p50", "p99", "max"], float | None),
    count=int,
    sum=float,
    buckets=many(tuple[float, int]),
)
RECOVERY = struct(
    "Recovery",
    **dict.fromkeys(["losses", "attempts", "recoveries"], int),
    last_seconds=float | None,
    last_error=str | None,
    given_up=bool,
)
VM = struct(
    "Vm",
    name=str,
    qemu=struct("Qemu", connected=bool, address=str, pid=int | None, version=str | None),
    listeners=many(struct("Listener", address=str, listening=bool, trouble=str | None)),
    clients=struct(
        "Clients",
        **dict.fromkeys(["connected", "total", "commands", "events", "slow_disconnected"], int),
    ),
    migration=struct(
        "Migration",
        role=Literal["source", "destination", "none"],
        relay=Literal["tracking", "opaque", "off"],
        **dict.fromkeys(["status", "relay_reason", "phase", "held"], str | None),
    ),
    pages=PAGES,
    latency_seconds=LATENCY,
    recovery=RECOVERY,
    channel=struct("Channel", bytes_forward=int, bytes_return=int),
    state=struct("State", error=str | None, errors=int, torn=int),
)
OLD = struct("Status", version=str, log_lines_dropped=int, troubles=many(str), vms=many(VM))

EMPTY = VmStatus(name="vm", qemu=QemuStatus(connected=False, address="unix:/q"))


@pytest.mark.parametrize("told", [PICTURE, Status(vms=(EMPTY, BUSY)), Status(troubles=("t",))])
def test_an_old_status_reads_the_new_control_socket(told: Status) -> None:
    read = msgspec.json.decode(encode(told), type=OLD)
    assert read.troubles == told.troubles
    assert [vm.name for vm in read.vms] == [vm.name for vm in told.vms]
    for old, new in zip(read.vms, told.vms, strict=True):
        assert msgspec.to_builtins(old.pages).items() <= msgspec.to_builtins(new.pages).items()
