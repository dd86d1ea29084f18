"""What `refault watch` shows: one picture of all VMs, as wide and as high as the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from refault.cli.words import printable, seconds, size
from refault.daemon.telling.snapshot import BlockStatus, Status, VmStatus

_OVER = frozenset({None, "none", "completed", "failed", "cancelled"})
_LOST = ("postcopy-paused", "postcopy-recover")
_CELLS = " ▁▂▃▄▅▆▇█"
_BAR = 40
_LABEL = 12
_GOOD, _BAD, _BUSY = "green", "bold red", "yellow"


@dataclass(frozen=True)
class Picture:
    """What was told last, and the rates since the time before."""

    status: Status
    errors: Sequence[str] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    """Bytes of the channel per second, by VM."""
    at: float = 0.0
    """Unix time, s."""


def is_lost(vm: VmStatus) -> bool:
    """Whether its guest is split between two hosts."""
    return (vm.migration.status or "").startswith(_LOST)


def is_migrating(vm: VmStatus) -> bool:
    """Whether a migration is under way."""
    return vm.migration.status not in _OVER


def view(picture: Picture, width: int, height: int) -> RenderableType:
    """The picture in at most ``height`` lines of ``width`` columns; VMs that want looking at come first."""
    vms = sorted(picture.status.vms, key=lambda vm: (not _trouble(vm), not is_migrating(vm), vm.name))
    lines: list[RenderableType] = [_head(picture, width)]
    lines += [_line([("ERROR", _BAD), (text, "")]) for text in picture.errors]
    lines += [_line([("TROUBLE", _BUSY), (text, "")]) for text in picture.status.troubles]
    left = len(vms)
    for vm in vms:
        told = [Text(""), *_vm(vm, picture.rates.get(vm.name), width)]
        room = height - len(lines) - (left > 1)
        if len(told) > room and left < len(vms):
            break
        lines += told[: max(room, 0)]
        left -= 1
    if left:
        lines.append(
            _line([(f"and {_count(left, 'more VM')}: a higher terminal, or `refault status`", "dim")])
        )
    return Group(*lines[:height])


def _trouble(vm: VmStatus) -> bool:
    return is_lost(vm) or vm.migration.held is not None or vm.recovery.given_up or not vm.qemu.connected


def _head(picture: Picture, width: int) -> RenderableType:
    vms = picture.status.vms
    counts = (
        f"{_count(len(vms), 'VM')}, {sum(map(is_migrating, vms))} migrating, {sum(map(is_lost, vms))} lost"
    )
    right = f"{time.strftime('%H:%M:%S', time.localtime(picture.at))}  q quits"
    table = Table.grid(expand=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", no_wrap=True)
    table.add_row(Text(f"refault watch   {counts}", "bold"), Text(right, "dim"))
    return table


def _vm(vm: VmStatus, rate: float | None, width: int) -> list[RenderableType]:
    """Two lines for each VM, and more for one that migrates."""
    migration, recovery = vm.migration, vm.recovery
    qemu = f"QEMU {vm.qemu.version or ''}" if vm.qemu.connected else "NO QEMU"
    lines: list[RenderableType] = [
        _line(
            [
                (vm.name, "bold"),
                (qemu.rstrip(), _GOOD if vm.qemu.connected else _BAD),
                (_count(vm.clients.connected, "client"), ""),
            ]
        )
    ]
    if migration.status is None:
        return [*lines, _line([("  no migration", "dim")])]
    lines.append(
        _line(
            [
                (f"  {migration.role}", ""),
                (f"{'LOST: ' if is_lost(vm) else ''}{migration.status}", _status_style(vm)),
                (f"phase {migration.phase}" if migration.phase and is_migrating(vm) else "", "dim"),
                (f"relay {migration.relay}", "" if migration.relay == "tracking" else _BUSY),
            ]
        )
    )
    if migration.held:
        lines.append(_line([(f"  HELD: {migration.held}", _BAD)]))
    if recovery.given_up:
        lines.append(_line([("  GIVEN UP: no further attempt is made for this loss", _BAD)]))
    if is_migrating(vm):
        lines += _channel(vm, rate, width)
    if recovery.losses:
        lost = _count(recovery.losses, "loss", "losses")
        last = f", the last in {seconds(recovery.last_seconds)}" if recovery.last_seconds else ""
        lines.append(_line([(f"  {lost}, {recovery.recoveries} recovered{last}", "")]))
        if recovery.last_error:
            lines.append(_line([(f"  last error: {recovery.last_error}", _BUSY)]))
    return lines


def _channel(vm: VmStatus, rate: float | None, width: int) -> list[RenderableType]:
    pages, latency = vm.pages, vm.latency_seconds
    speed = "" if rate is None else f"{size(round(rate))}/s"
    lines: list[RenderableType] = []
    total = sum(block.size_bytes for block in pages.blocks)
    if total and vm.migration.relay == "tracking":
        present = min(sum(block.present_bytes for block in pages.blocks), total)
        amount = f"{size(present)} of {size(total)}   {speed}".rstrip()
        room = max(min(width - _LABEL - len(amount) - 5, _BAR), 1)
        done = room * present // total
        bar = Text.assemble(("|", "dim"), ("█" * done, _GOOD), ("·" * (room - done), "dim"), ("|", "dim"))
        lines.append(_labelled("memory", bar, Text(f" {amount}")))
    else:
        lines.append(_labelled("channel", Text(f"{size(vm.channel.bytes_forward)} passed   {speed}")))
    threads = (
        "" if pages.kernel_waiting is None else _count(pages.kernel_waiting, "thread waits", "threads wait")
    )
    said = f"{pages.outstanding} outstanding of {pages.requested}"
    times = f"p50 {seconds(latency.p50)}, p99 {seconds(latency.p99)}"
    lines.append(_labelled("requests", Text("   ".join(filter(None, (said, threads, times))))))
    room = max(width - _LABEL - 2, 1)
    lines += [_cells(block, room) for block in pages.blocks if block.outstanding and block.outstanding_cells]
    return lines


def _cells(block: BlockStatus, room: int) -> Text:
    """Where in the block requests are outstanding."""
    cells = block.outstanding_cells
    each = -(-len(cells) // min(room, len(cells)))
    counts = [sum(cells[at : at + each]) for at in range(0, len(cells), each)]
    top = max(counts)
    marks = "".join(_CELLS[-(-count * 8 // top)] for count in counts)
    return _labelled(block.name, Text.assemble(("|", "dim"), (marks, "cyan"), ("|", "dim")))


def _labelled(label: str, *parts: Text) -> Text:
    line = Text(f"  {printable(label)[: _LABEL - 3]:<{_LABEL - 2}}", no_wrap=True, overflow="ellipsis")
    for part in parts:
        line.append_text(part)
    return line


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _line(words: Sequence[tuple[str, str]]) -> Text:
    said = [Text(printable(text), style) for text, style in words if text]
    line = Text("   ").join(said)
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _status_style(vm: VmStatus) -> str:
    if is_lost(vm) or vm.migration.status == "failed":
        return _BAD
    return _GOOD if vm.migration.status in ("postcopy-active", "completed") else _BUSY
