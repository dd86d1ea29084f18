"""The short form of `make campaign-troubles`: one VM's trouble is no other's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.campaign.troubles import HANGS, MOST, Times, host

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

SECONDS = 20.0
"""For one trouble, on a machine that does much else: then a percentile needs many round trips."""
LEAST = 300
"""Round trips, of each kind."""


def test_the_others_do_not_notice(tmp_path: Path) -> None:
    with host(tmp_path, vms=5) as fronted:
        for trouble in ("QEMU floods events", "client floods what is no JSON", HANGS):
            end = time.monotonic() + SECONDS

            def enough(times: Times, end: float = end) -> bool:
                few = len(times.trouble) < LEAST or len(times.quiet) < LEAST
                return time.monotonic() > end or not (few or times.ratio > MOST)

            times = fronted.during(trouble, enough)
            assert times.ratio <= MOST, trouble
