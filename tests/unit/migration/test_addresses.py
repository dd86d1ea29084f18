from refault.migration.addresses import Addresses
from refault.migration.endpoint import Inet, Other

A, B, C = Inet("192.0.2.2", 1), Inet("198.51.100.2", 2), Other("unix:/run/c")


def test_the_lost_channels_own_address_then_the_alternatives_in_order_then_again() -> None:
    addresses = Addresses(A, [B, C])
    tried = []
    for _ in range(4):
        tried.append(addresses.order()[0])
        addresses.tried(tried[-1])
    assert tried == [A, B, C, A]


def test_what_recovered_comes_first_the_next_time() -> None:
    addresses = Addresses(A, [B, C])
    addresses.tried(B)
    assert addresses.order() == [C, A, B]
    addresses.recovered()
    assert addresses.order() == [B, C, A]
    addresses.recovered()
    assert addresses.order() == [B, C, A]


def test_one_that_is_named_twice_is_tried_once() -> None:
    addresses = Addresses(A, [A, B, B])
    assert addresses.order() == [A, B]
    assert addresses.alternatives == [B]


def test_without_any() -> None:
    addresses = Addresses(None, [])
    addresses.tried(A)
    addresses.recovered()
    assert addresses.order() == []
    assert Addresses(None, [B]).order() == [B]


def test_a_client_that_moves_the_channel_moves_what_comes_first() -> None:
    addresses = Addresses(A, [B])
    addresses.tried(B)
    addresses.recovered()
    addresses.moved(C)
    assert addresses.first == C
    assert addresses.order() == [C, B]
