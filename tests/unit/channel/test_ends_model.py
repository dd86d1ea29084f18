"""The short form of `make ends` (tests/model/ends.py)."""

import random

from tests.model import ends


def test_no_byte_fewer_comes_through_the_pump_than_through_a_plain_socket() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    assert ends.run(1000, seed) > 0
