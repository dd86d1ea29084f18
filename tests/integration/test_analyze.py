"""The forward decoder beside QEMU's own scripts/analyze-migration.py, on streams that real QEMUs saved.

`make analyze` fetches the script of each QEMU out of Debian's source packages and runs this. The script reads
no XBZRLE, no compressed pages and no postcopy.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from refault.channel.forward import Event, ForwardDecoder, Frame, Kind, Section
from refault.lab import bare
from refault.lab.guest import Guest
from refault.lab.qemu import DEFAULT_BINARY, start_qemu

from .qemus import BINARIES

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

SCRIPTS = Path(__file__).parents[2] / ".qemus"
VERSIONS = {DEFAULT_BINARY: "7.2", "qemu-10": "10"}
ROUNDS = 3
GUEST = Guest(vcpus=2, log_pages=10, tick_ns=300_000)
SECOND = 4 << 20
"""Bytes of a second RAM block, of which the first half is not zero."""


def script(binary: str) -> Path:
    found = SCRIPTS / f"analyze-migration-{VERSIONS[binary]}.py"
    if not found.exists():
        pytest.skip(f"{found.name} is not there: run 'make analyzers'")
    return found


@dataclass
class Decoded:
    """What our decoder makes of a stream."""

    memory: dict[str, bytearray] = field(default_factory=dict)
    frames: Counter[Frame] = field(default_factory=Counter)
    cleared: set[tuple[str, int]] = field(default_factory=set)
    """Pages sent as zeros that had held something else: the script leaves them as they were."""
    page_size: int = 4096
    sections: list[str] = field(default_factory=list)
    """As the script tells them: name and id, in the order of the stream."""
    parts: Counter[int] = field(default_factory=Counter)


def decoded(stream: bytes) -> Decoded:
    out = Decoded()
    names: dict[int, str] = {}
    for event in ForwardDecoder().feed(stream):
        match event.kind:
            case Kind.TARGET_PAGE_BITS:
                out.page_size = 1 << event.value
            case Kind.BLOCK:
                names[event.block] = event.name.decode()
                out.memory[names[event.block]] = bytearray(event.length)
            case Kind.PAGE:
                place(out, names[event.block], event, stream)
            case Kind.SECTION if event.code == Section.START:
                # Between the name and the version; the script takes no other for "ram".
                assert int.from_bytes(stream[event.end - 8 : event.end - 4]) == 0
                assert (event.name, event.value) == (b"ram", 4)
                out.sections.append(f"ram ({event.id})")
            case Kind.SECTION:
                out.parts[event.id] += 1
            case Kind.OPAQUE:
                out.sections.append(f"{event.name.decode()} ({event.id})")
    return out


def place(out: Decoded, name: str, event: Event, stream: bytes) -> None:
    out.frames[Frame(event.code)] += 1
    memory, where = out.memory[name], slice(event.offset, event.offset + event.length)
    if event.code == Frame.ZERO:
        if any(memory[where]):
            out.cleared.add((name, event.offset))
        memory[where] = bytes(event.length)
    else:
        assert event.code == Frame.PAGE
        out.cleared.discard((name, event.offset))
        memory[where] = stream[event.end - event.length : event.end]


async def saved(directory: Path, binary: str, capabilities: tuple[str, ...]) -> tuple[Path, dict[str, int]]:
    """A stream with a second RAM block and with pages that were sent more than once, and QEMU's own count."""
    second = directory / "second"
    second.write_bytes(random.Random(1).randbytes(SECOND // 2).ljust(SECOND, b"\0"))
    extra = (
        *("-object", f"memory-backend-file,id=second,mem-path={second},size={SECOND},share=on"),
        *("-device", "ivshmem-plain,memdev=second,master=on"),
    )
    file = directory / "stream"
    async with start_qemu(GUEST, directory, binary=binary, extra=extra) as qemu:
        await qemu.wait_guest()
        await bare.set_capabilities(qemu.qmp, *capabilities)
        await qemu.qmp.execute("migrate-set-parameters", {"max-bandwidth": 30 << 20, "downtime-limit": 1})
        await qemu.qmp.execute("migrate", {"uri": f"exec:cat >{file}.part && mv {file}.part {file}"})
        with trio.fail_after(30):
            while (answer := await bare.wait_status(qemu.qmp, "active", "completed"))["status"] == "active":
                if answer["ram"]["dirty-sync-count"] >= ROUNDS:
                    break
                await trio.sleep(0.05)
        await qemu.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 34, "downtime-limit": 2000})
        with trio.fail_after(30):
            sent = (await bare.wait_status(qemu.qmp, "completed"))["ram"]
            while not file.exists():  # cat has all of it a little later
                await trio.sleep(0.01)
    return file, sent


CASES: list[tuple[str, tuple[str, ...]]] = [(binary, ()) for binary in BINARIES]
# The script of 7.2 does not know of the address that each block then has.
CASES += [(binary, ("x-ignore-shared",)) for binary in BINARIES if binary != DEFAULT_BINARY]


@pytest.mark.parametrize(("binary", "capabilities"), CASES)
async def test_it_agrees_with_qemus_own_script(
    tmp_path: Path, binary: str, capabilities: tuple[str, ...]
) -> None:
    """Every byte of every RAM block, and the sections as far as we read them: to the first device's."""
    command = [sys.executable, str(script(binary)), "--file", str(tmp_path / "stream"), "--extract"]
    file, sent = await saved(tmp_path, binary, capabilities)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    await trio.run_process(command, cwd=theirs, capture_stdout=True)

    ours = decoded(file.read_bytes())
    state = json.loads((theirs / "state.json").read_text())
    description = json.loads((theirs / "desc.json").read_text())
    lengths = {name: f"0x{len(memory):016x}" for name, memory in ours.memory.items()}
    assert state[ours.sections[0]]["section sizes"] == lengths
    assert description["page_size"] == ours.page_size
    assert sum(ours.parts.values()) >= ROUNDS
    assert (ours.frames[Frame.PAGE], ours.frames[Frame.ZERO]) == (sent["normal"], sent["duplicate"])
    assert ours.frames[Frame.PAGE] * ours.page_size > GUEST.written_bytes

    assert len(ours.sections) == 2
    assert ours.sections == list(state)[:2]

    for name, memory in ours.memory.items():
        extracted = bytearray((theirs / name.lstrip("/")).read_bytes())
        for block, offset in ours.cleared:
            if block == name:
                extracted[offset : offset + ours.page_size] = memory[offset : offset + ours.page_size]
        assert extracted == memory, name
    second = next(name for name in ours.memory if name.endswith("second"))
    there = bytes(SECOND) if capabilities else (tmp_path / "second").read_bytes()
    assert ours.memory[second] == there
