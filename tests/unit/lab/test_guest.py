from __future__ import annotations

import shutil
import struct
import subprocess
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refault.lab.guest import ARENA_BASE, PAGE, Guest, Progress


def write(guest: Guest, vcpu: int, steps: int) -> tuple[bytearray, Progress]:
    """Memory and state after a number of steps, done one by one as the guest does them."""
    arena = bytearray(guest.arena_bytes)
    ranks = guest.ranks()
    for step in range(steps):
        sweep, page = step // len(ranks) + 1, ranks[step % len(ranks)] * PAGE
        struct.pack_into("<II", arena, page + sweep % 512 * 8, sweep, guest.arena(vcpu) + page + vcpu + 1)
    return arena, Progress(steps // len(ranks) + 1, steps % len(ranks))


def found(guest: Guest, vcpu: int, state: Progress, arena: bytearray) -> list[str]:
    return [str(each) for each in guest.check_arena(vcpu, state, bytes(arena))]


def test_the_source_makes_the_shipped_bytes(tmp_path: Path) -> None:
    assert shutil.which("as"), "GNU as is needed (binutils)"
    source = resources.files("refault.lab").joinpath("guest.S")
    (tmp_path / "guest.S").write_bytes(source.read_bytes())
    subprocess.run(["as", "--32", "-o", "guest.o", "guest.S"], cwd=tmp_path, check=True)
    link = ["ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0xffe00", "-o", "guest.bin", "guest.o"]
    subprocess.run(link, cwd=tmp_path, check=True)
    made = (tmp_path / "guest.bin").read_bytes()
    assert len(made) == 512
    assert made == resources.files("refault.lab").joinpath("guest.bin").read_bytes()


@pytest.mark.parametrize("log_pages", [2, 3, 8, 13])
def test_a_sweep_visits_each_page_once(log_pages: int) -> None:
    assert sorted(Guest(1, log_pages).ranks()) == list(range(1 << log_pages))


@settings(deadline=None)
@given(st.integers(0, 3), st.one_of(st.integers(0, 40), st.integers(4 * 510, 4 * 515), st.integers(0, 5000)))
def test_what_is_written_step_by_step_is_what_is_expected(vcpu: int, steps: int) -> None:
    guest = Guest(4, 2)
    arena, state = write(guest, vcpu, steps)
    assert found(guest, vcpu, state, arena) == []
    # The next write may be there already; the one after it not.
    assert found(guest, vcpu, state, write(guest, vcpu, steps + 1)[0]) == []
    assert len(found(guest, vcpu, state, write(guest, vcpu, steps + 2)[0])) >= 1


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, (4 << 2) * 1024 - 1), st.integers(1, 255))
def test_one_changed_byte_is_found_where_it_is(steps: int, where: int, change: int) -> None:
    guest = Guest(4, 2)
    arena, state = write(guest, 1, steps)
    arena[where] ^= change
    mismatches = list(guest.check_arena(1, state, bytes(arena)))
    assert [each.address + each.first for each in mismatches] == [guest.arena(1) + where]


def test_a_mismatch_says_which_page_and_offset() -> None:
    guest = Guest(1, 2)
    arena, state = write(guest, 0, 4)
    arena[2 * PAGE + 100] = 7
    (text,) = found(guest, 0, state, arena)
    assert f"page {ARENA_BASE // PAGE + 2} (pc.ram offset {ARENA_BASE + 2 * PAGE:#x}): byte 0x64" in text


def test_a_page_of_another_vcpu_and_a_lost_sweep_are_found() -> None:
    guest = Guest(2, 3)
    arena, state = write(guest, 0, 30)
    assert len(found(guest, 1, state, arena)) == 8
    assert len(found(guest, 0, state, write(guest, 0, 30 - 8)[0])) >= 7


def test_firmware_holds_the_parameters_and_ends_with_the_code() -> None:
    firmware = Guest(4, 13, 250_000).firmware()
    assert len(firmware) == 64 << 10
    assert struct.unpack_from("<IIB", firmware, len(firmware) - 512 + 0x1E0) == (250_000, (1 << 13) - 1, 13)
    assert firmware[-16] == 0xEA  # the reset vector's far jump


@pytest.mark.parametrize(
    ("vcpus", "log_pages", "tick"),
    [(0, 12, 0), (65, 2, 0), (4, 1, 0), (4, 19, 0), (1, 20, 0), (1, 12, 1 << 32)],
)
def test_a_guest_that_cannot_be_is_refused(vcpus: int, log_pages: int, tick: int) -> None:
    with pytest.raises(ValueError, match="the guest"):
        Guest(vcpus, log_pages, tick)


def test_size_is_shared_by_the_vcpus() -> None:
    assert Guest.of_size(256 << 20, vcpus=4).written_bytes == 256 << 20
    assert Guest.of_size(100 << 20, vcpus=4).written_bytes == 64 << 20


def test_what_is_outside_does_not_meet_what_is_written() -> None:
    guest = Guest(3, 5)
    written = set(range(0x10000, 0x13000, PAGE)) | set(
        range(ARENA_BASE, ARENA_BASE + guest.written_bytes, PAGE)
    )
    outside = {page for start, length in guest.outside() for page in range(start, start + length, PAGE)}
    hole = set(range(0xA0000, 0x100000, PAGE))
    assert not outside & (written | hole)
    assert outside | written | hole == set(range(0, guest.ram_bytes, PAGE))
