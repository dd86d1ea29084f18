"""The record against QEMU's own trace events, and received bitmaps against what the decoder counted.

The short form; tests/campaign/truth.py runs both for long.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from refault.lab.channel import Loss
from refault.lab.guest import Guest

from .in_flight import compare_bitmaps
from .qemus import ALL_BINARIES, BINARIES
from .truth import compare_with_trace

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

GUEST = Guest(vcpus=8, log_pages=10, tick_ns=8_000_000)


@pytest.mark.parametrize("binary", ALL_BINARIES)
async def test_the_record_is_what_qemu_asked_for_and_has_not_got(tmp_path: Path, binary: str) -> None:
    pauses = await compare_with_trace(GUEST, tmp_path, [Loss.KILL, Loss.RESET], binary)
    assert pauses[0].record
    assert pauses[0].wanted


@pytest.mark.parametrize("binary", BINARIES)
async def test_received_is_a_part_of_forwarded_and_the_rest_was_in_flight(
    tmp_path: Path, binary: str
) -> None:
    for differences in await compare_bitmaps(GUEST, tmp_path, list(Loss), binary):
        assert all(difference.received > 0 for difference in differences if difference.block == b"pc.ram")
