import pytest

from refault.migration.endpoint import Inet, Other, endpoint_of, parse_uri, with_uri


@pytest.mark.parametrize(
    ("uri", "endpoint"),
    [
        ("tcp:10.0.0.2:4444", Inet("10.0.0.2", 4444)),
        ("tcp:host-b:4444", Inet("host-b", 4444)),
        ("tcp::4444", Inet("", 4444)),
        ("tcp:0:0", Inet("0", 0)),
        ("tcp:[::1]:4444", Inet("::1", 4444)),
    ],
)
def test_plain_tcp_is_understood_and_spelt_again(uri: str, endpoint: Inet) -> None:
    assert parse_uri(uri) == endpoint
    assert endpoint.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "unix:/run/x",
        "fd:7",
        "exec:cat",
        "rdma:h:1",
        "tcp:h:99999",
        "tcp:h:1,ipv4=on",
        "tcp:::1:4",
        "tcp:h",
        "defer",
        "",
    ],
)
def test_anything_else_is_left_alone(uri: str) -> None:
    assert parse_uri(uri) == Other(uri)


def test_channels() -> None:
    channel = {
        "channel-type": "main",
        "addr": {"transport": "socket", "type": "inet", "host": "10.0.0.2", "port": "4444"},
    }
    assert endpoint_of({"channels": [channel]}) == Inet("10.0.0.2", 4444)
    assert isinstance(endpoint_of({"channels": [channel, channel]}), Other)
    kept_alive = {**channel, "addr": {**channel["addr"], "keep-alive": True}}  # type: ignore[dict-item]
    assert isinstance(endpoint_of({"channels": [kept_alive]}), Other)
    assert endpoint_of({}) is None


def test_only_the_address_is_replaced() -> None:
    arguments = {"uri": "tcp:h:1", "resume": True, "detach": True}
    assert with_uri(arguments, "fd:refault-1") == {"uri": "fd:refault-1", "resume": True, "detach": True}
    assert with_uri({"channels": [1], "resume": True}, "fd:x") == {"uri": "fd:x", "resume": True}
