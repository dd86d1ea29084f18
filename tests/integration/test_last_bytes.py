"""What lies in a kernel when its sender is killed arrives: the short form of `make campaign-last_bytes`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.campaign.last_bytes import source_killed

from refault.lab.qemu import DEFAULT_BINARY

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]


async def test_a_source_killed_after_its_last_byte_costs_no_page(tmp_path: Path) -> None:
    assert "all right" in await source_killed(tmp_path, DEFAULT_BINARY)
