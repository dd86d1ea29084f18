"""What memory is made of and how its pages travel: each through the relay, with losses, memory equal.

All of them on all QEMUs: `make matrix`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import memory_kinds as kinds
from .qemus import BINARIES

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]


@pytest.fixture
def huge_pages() -> Iterator[None]:
    try:
        with kinds.huge_pages(kinds.HUGE_PAGES):
            yield
    except OSError as error:
        pytest.skip(f"no huge pages here: {error}")


async def test_many_blocks(tmp_path: Path) -> None:
    await kinds.migrate(tmp_path, kinds.MANY_BLOCKS)


async def test_xbzrle(tmp_path: Path) -> None:
    await kinds.migrate(tmp_path, kinds.XBZRLE)


@pytest.mark.xdist_group("huge pages")  # the machine's pool is one
@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("binary", BINARIES)
async def test_huge_pages(tmp_path: Path, binary: str) -> None:
    await kinds.migrate(tmp_path, kinds.HUGE_PAGES, binary)


async def test_zero_pages(tmp_path: Path) -> None:
    await kinds.ask_for_zero_pages(tmp_path)


@pytest.mark.parametrize("binary", BINARIES)
async def test_shared_memory_that_stays(tmp_path: Path, binary: str) -> None:
    await kinds.stay_in_shared_memory(tmp_path, binary)
