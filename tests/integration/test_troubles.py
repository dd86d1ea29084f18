"""The short form of `make campaign-troubles`: one VM's trouble is no other's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.campaign.troubles import HANGS, MOST, Times, cores, host

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

SECONDS = 45.0
"""For one trouble, on a machine that does much else: then a percentile needs many round trips."""
LEAST = 300
"""Round trips of each kind, in one window."""


def are_enough(times: Times) -> bool:
    return min(len(times.trouble), len(times.quiet)) >= LEAST


def test_the_others_do_not_notice(tmp_path: Path) -> None:
    with cores() as elsewhere, host(tmp_path, 5, elsewhere) as fronted:
        for trouble in ("QEMU floods events", "client floods what is no JSON", HANGS):
            end = time.monotonic() + SECONDS
            # What else the machine does befalls one window or another, a loop that is held up every one.
            ratios = [fronted.during(trouble, are_enough).ratio]
            while min(ratios) > MOST and time.monotonic() < end:
                ratios.append(fronted.during(trouble, are_enough).ratio)
            assert min(ratios) <= MOST, (trouble, ratios)
