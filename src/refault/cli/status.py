"""`refault status`: what the daemons say about their VMs, for people or, with ``--json``, for programs."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

from refault.cli.daemons import (
    NO_ANSWER,
    NO_DAEMON,
    NO_QEMU,
    NOT_PERMITTED,
    add_selection,
    ask,
    exit_status,
    join,
)
from refault.cli.words import group_name, printable, seconds, size, user_name
from refault.daemon.telling import snapshot
from refault.daemon.telling.snapshot import ListenerStatus, SessionStatus, Status, VmStatus

_LABEL_WIDTH = 11


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "status",
        help="what refault knows about each VM",
        description="What refault knows about each VM.",
        epilog=f"Exit status: 0 when all is well, {NO_DAEMON} where there is no daemon, {NOT_PERMITTED} where"
        f" it may not be asked, {NO_ANSWER} where it does not answer, {NO_QEMU} where a VM has no QEMU.",
    )
    add_selection(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document (docs/status.md)")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Prints the status of the daemons asked, and the errors of those that did not answer."""
    answers, errors = ask(options.name, options.control)
    for told in errors:
        print(f"refault: {told}", file=sys.stderr)
    if answers:
        status = join(answers)
        if options.json:
            sys.stdout.write(snapshot.encode(status).decode())
        else:
            sys.stdout.write(render(status, shutil.get_terminal_size().columns))
    gone = [NO_QEMU for status in answers for vm in status.vms if not vm.qemu.connected]
    return min([*map(exit_status, errors), *gone], default=0)


def render(status: Status, width: int) -> str:
    """The status for people, in lines of at most `width` columns where the words allow it."""
    told = [_vm_lines(vm, width) for vm in status.vms]
    if not (status.vms or status.troubles):
        told.append(["no VM"])
    if status.troubles:
        told.append([f"TROUBLE      {trouble}" for trouble in status.troubles])
    if status.log_lines_dropped:
        told.append([f"{status.log_lines_dropped} lines of the log are lost: not read, or a full disk"])
    return "\n".join("".join(f"{printable(line)}\n" for line in lines) for lines in told)


def _vm_lines(vm: VmStatus, width: int) -> list[str]:
    qemu, clients, migration, channel = vm.qemu, vm.clients, vm.migration, vm.channel
    latency, recovery = vm.latency_seconds, vm.recovery
    last = f", the last in {seconds(recovery.last_seconds)}" if recovery.last_seconds is not None else ""
    version = f" {qemu.version}" if qemu.version else ""
    facts = [
        (
            "qemu",
            f"{'connected' if qemu.connected else 'NOT CONNECTED'}, QEMU{version} at {qemu.address}"
            + (f", pid {qemu.pid}" if qemu.pid is not None else ""),
        ),
        *(("listens", _listener(listener)) for listener in vm.listeners),
        (
            "clients",
            f"{clients.connected} connected, {clients.total} in all; {clients.commands} commands, "
            f"{clients.events} events; {clients.slow_disconnected} dropped for not reading"
            + (f"; an end of refault disconnects them: {clients.not_kept}" if clients.not_kept else ""),
        ),
        (
            "migration",
            f"{migration.role if migration.role != 'none' else 'neither source nor destination'}"
            + (f", {migration.status}" if migration.status else "")
            + (f", phase {migration.phase}" if migration.phase else ""),
        ),
        ("relay", migration.relay + (f": {migration.relay_reason}" if migration.relay_reason else "")),
    ]
    if vm.leaving:
        facts.append(("LEAVING", vm.leaving))
    if vm.internal_error:
        facts.append(("ERRORS", f"{vm.internal_errors} of refault's own, the last {vm.internal_error}"))
    if migration.pause_hidden_since is not None:
        since = time.strftime("%H:%M:%S", time.localtime(migration.pause_hidden_since))
        facts.append(("hidden", f"since {since} its pause, from clients that are not to know (hide-pause)"))
    if migration.held:
        facts.append(("HELD", migration.held))
    if recovery.given_up:
        facts.append(("GIVEN UP", "no further attempt for this loss; recover by hand, or restart refault"))
    if vm.state.error:
        facts.append(("NOT KEPT", vm.state.error))
    facts += [
        (
            "channel",
            f"{size(channel.bytes_forward)} forward, {size(channel.bytes_return)} return path",
        ),
        *_session(vm.session),
        (
            "recovery",
            f"{recovery.losses} losses, {recovery.attempts} attempts, {recovery.recoveries} recoveries"
            + last
            + (f"; last error: {recovery.last_error}" if recovery.last_error else ""),
        ),
        (
            "latency",
            f"p50 {seconds(latency.p50)}, p99 {seconds(latency.p99)}, max {seconds(latency.max)}, "
            f"of {latency.count} answered requests",
        ),
        ("repeats", f"{vm.pages.repeated} requests repeated by QEMU itself"),
    ]
    lines = [vm.name]
    for label, text in facts:
        lines += textwrap.wrap(
            text,
            width=max(width, 40),
            initial_indent=f"  {label:<{_LABEL_WIDTH}}",
            subsequent_indent=" " * (2 + _LABEL_WIDTH),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines + _page_table(vm, width)


def _session(session: SessionStatus) -> Iterator[tuple[str, str]]:
    """Nothing where there never was one."""
    if session.resuming_seconds is not None:
        yield (
            "RESUMING",
            f"no connection to the other refault for {seconds(session.resuming_seconds)}; QEMU waits",
        )
    if session.sessions or session.state in ("carried", "resuming"):
        yield (
            "session",
            f"{session.state}; {session.resumptions.count} resumptions,"
            f" {size(session.retransmitted_bytes)} sent again",
        )


def _listener(listener: ListenerStatus) -> str:
    where = listener.address
    if not listener.listening:
        where = f"NOT at {where}: {listener.trouble or 'there is no QEMU'}"
    return "; ".join((where, *_rules(listener)))


def _rules(listener: ListenerStatus) -> Iterator[str]:
    """Who may speak there and what, in the words of the options."""
    if listener.mode is not None:
        yield f"mode {listener.mode}"
    if listener.owner is not None:
        yield f"owner {user_name(listener.owner)}"
    if listener.group is not None:
        yield f"group {group_name(listener.group)}"
    for word, allowed, name in (
        ("users", listener.allow_users, user_name),
        ("groups", listener.allow_groups, group_name),
    ):
        if allowed:
            yield f"allowed {word} {', '.join(map(name, allowed))}"
    if listener.read_only:
        yield "read-only"
    if listener.deny:
        yield f"denied {', '.join(listener.deny)}"
    if listener.audit:
        yield "audit"
    if listener.hide_pause:
        yield f"pauses hidden for {listener.hide_pause:g} s"


def _page_table(vm: VmStatus, width: int) -> list[str]:
    pages = vm.pages
    heads = ("requested", "arrived", "replayed", "outstanding", "recorded")
    rows = [
        (
            f"{block.name} ({size(block.size_bytes)} of {size(block.page_size_bytes)})",
            (block.requested, block.arrived, block.replayed, block.outstanding),
        )
        for block in pages.blocks
    ]
    total = (pages.requested, pages.arrived, pages.replayed, pages.outstanding, pages.recorded)
    numbers = "".join(f"{{:>{len(head) + 2}}}" for head in heads)
    room = max(width, 40) - 2 - sum(len(head) + 2 for head in heads)
    names = max([len("pages"), *(len(name) for name, _ in rows)])
    lines = [f"  {'pages':<{min(names, max(room, 5))}}" + numbers.format(*heads)]
    for name, counts in [*rows, ("all", total)]:
        cells = numbers.format(*counts, *[""] * (len(heads) - len(counts)))
        if len(name) > max(room, 5):  # a long name has a line of its own, and the numbers keep their columns
            lines.append(f"  {name}")
            name = ""
        lines.append(f"  {name:<{min(names, max(room, 5))}}{cells}".rstrip())
    if pages.kernel_waiting is not None:
        lines.append(f"  threads waiting for a page, as the kernel counts: {pages.kernel_waiting}")
    return lines
