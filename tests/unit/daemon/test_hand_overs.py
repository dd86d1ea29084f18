"""What a wrapper says when it hands a monitor over."""

from __future__ import annotations

import pytest

from refault.daemon.hand_overs import Offer, Refused


def test_the_packet_of_wrapper_hand_over_h() -> None:
    assert Offer.read(b"refault-exec 1\0vm1\0c0ffee\x0027\0") == Offer("vm1", "c0ffee", 27)
    assert Offer.read(b"refault-exec 1\0\0\x003\0") == Offer("", "", 3)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"refault-exec 2\0vm1\0u\x003\0",
        b"refault-exec 1\0vm1\0u\x003",
        b"refault-exec 1\0vm1\0u\0\0",
        b"refault-exec 1\0vm1\0u\0-3\0",
        b"refault-exec 1\0vm1\0u\x003\0more",
        b"refault-exec 1\0vm1\0u\x003\0\0",
        b"refault-exec 1\0\xff\0u\x003\0",
        b"refault-exec 1\0vm1\0u\x009999999999\0",
    ],
)
def test_anything_else_is_refused(packet: bytes) -> None:
    with pytest.raises(Refused):
        Offer.read(packet)
