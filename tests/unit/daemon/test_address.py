from __future__ import annotations

import pytest

from refault.daemon.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/vm.qmp", Address("/run/vm.qmp")),
        ("unix:/run/vm.qmp", Address("/run/vm.qmp")),
        ("unix:relative", Address("relative")),
        ("./relative", Address("./relative")),
        ("tcp:localhost:4444", Address(None, "localhost", 4444)),
        ("tcp:[::1]:4444", Address(None, "::1", 4444)),
        ("unix:/run/vm.qmp,server=on", Address("/run/vm.qmp", server=True)),
        ("unix:/run/vm.qmp,server=on,wait=off", Address("/run/vm.qmp", server=True)),
        ("/run/vm.qmp,server=off", Address("/run/vm.qmp")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address), server=address.server) == address


def test_a_listener_listens_unless_told_otherwise() -> None:
    assert parse_address("tcp::4444", server=True) == Address(None, "", 4444, server=True)
    assert not parse_address("/run/vm.qmp,server=off", server=True).server


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected unix:/path, /path or tcp:HOST:PORT"),
        ("unix:", "expected unix:/path"),
        ("vm.qmp", "expected unix:/path"),
        ("udp:localhost:1", "expected unix:/path"),
        ("tcp:localhost", "expected tcp:HOST:PORT"),
        ("tcp:localhost:qmp", "expected tcp:HOST:PORT"),
        ("tcp:localhost:65536", "a port up to 65535"),
        ("tcp:::1:4444", "stands in brackets"),
        ("tcp::4444", "no host"),
        ("unix:/run/vm.qmp,reconnect=1", "'reconnect=1' is not known here"),
        ("unix:/" + "x" * 107, "at most 107 bytes, this has 108"),
        ("/a\0b", "zero bytes"),
    ],
)
def test_what_is_no_address(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="address ") as caught:
        parse_address(text)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_longest_path() -> None:
    assert parse_address("unix:/" + "x" * 106)
