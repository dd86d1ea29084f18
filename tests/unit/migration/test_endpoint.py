import pytest

from refault.migration.endpoint import (
    Inet,
    Other,
    endpoint_of,
    is_of_no_address,
    is_refused,
    parse_uri,
    with_no_address,
    with_uri,
)


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
        f"tcp:{'n' * 65}:1",
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


@pytest.mark.parametrize(
    ("addr", "uri"),
    [
        ({"transport": "socket", "type": "unix", "path": "/run/x"}, "unix:/run/x"),
        ({"transport": "socket", "type": "vsock", "cid": "3", "port": "4"}, "vsock:3:4"),
        ({"transport": "socket", "type": "fd", "str": "mine"}, "fd:mine"),
        (
            {"transport": "socket", "type": "inet", "host": "::1", "port": "1", "keep-alive": True},
            "tcp:[::1]:1,keep-alive=on",
        ),
        ({"transport": "rdma", "host": "h", "port": "1"}, "rdma:h:1"),
        ({"transport": "exec", "args": ["/bin/sh", "-c", "cat >x"]}, "exec:cat >x"),
        ({"transport": "file", "filename": "/x", "offset": 0}, "file:/x,offset=0"),
    ],
)
def test_channels_that_are_not_relayed_are_spelt_as_a_recovery_takes_them(
    addr: dict[str, object], uri: str
) -> None:
    assert endpoint_of({"channels": [{"channel-type": "main", "addr": addr}]}) == Other(uri)


def test_channels_that_no_uri_says_are_not_taken_for_others() -> None:
    for addr in (
        {"transport": "socket", "type": "unix", "path": "x", "abstract": True},
        {"transport": "exec", "args": ["/bin/cat"]},
        {"transport": "socket", "type": "inet", "host": "h", "port": "1", "to": 9},
    ):
        channels = [{"channel-type": "main", "addr": addr}]
        assert endpoint_of({"channels": channels}) == Other(str(channels))


def test_only_the_address_is_replaced() -> None:
    arguments = {"uri": "tcp:h:1", "resume": True, "detach": True}
    assert with_uri(arguments, "fd:refault-1") == {"uri": "fd:refault-1", "resume": True, "detach": True}
    channel = {
        "channel-type": "main",
        "more": 1,
        "addr": {"transport": "socket", "type": "inet", "host": "h", "port": "1"},
    }
    assert with_uri({"channels": [channel], "resume": True}, "fd:x") == {
        "channels": [{**channel, "addr": {"transport": "socket", "type": "fd", "str": "x"}}],
        "resume": True,
    }
    unix = with_uri({"channels": [channel]}, "unix:/run/x")
    assert unix == {
        "channels": [{**channel, "addr": {"transport": "socket", "type": "unix", "path": "/run/x"}}]
    }
    assert endpoint_of(with_uri({"channels": [channel]}, "tcp:[::1]:5")) == Inet("::1", 5)


def test_what_qemu_is_to_refuse_is_left_for_it_to_see() -> None:
    both = {"uri": "tcp:h:1", "channels": [1]}
    assert with_uri(both, "fd:x") == {"uri": "fd:x", "channels": [1]}
    assert endpoint_of({"uri": 5, "channels": [1]}) is None


def test_a_command_without_an_address_is_known_by_qemus_answer() -> None:
    assert with_no_address({"uri": "tcp:h:1", "exit-on-error": False})["exit-on-error"] is False
    unknown = f"unknown migration protocol: {with_no_address({'uri': 'tcp:h:1'})['uri']}"
    assert is_of_no_address(unknown)
    assert is_of_no_address("Channel list must have only one entry, for type 'main'")
    assert not is_of_no_address("'-incoming' was not specified on the command line")


def test_what_qemu_refuses_for_its_arguments_alone() -> None:
    refused: tuple[dict[str, object], ...] = (
        {},
        {"resume": True},
        {"uri": "tcp:h:1", "bogus": 1},
        {"uri": "tcp:h:1", "detach": 1},
        {"uri": 4},
        {"uri": "tcp:h:1", "channels": []},
        {"channels": {}},
    )
    for arguments in refused:
        assert all(is_refused(arguments, version) for version in ((7, 2, 0), (10, 0, 0)))
    since: tuple[tuple[dict[str, object], bool, bool], ...] = (
        ({"uri": "tcp:h:1", "resume": True, "detach": False}, False, False),
        ({"uri": "tcp:h:1", "blk": True, "inc": False}, False, True),
        ({"channels": []}, True, False),
    )
    for arguments, old, new in since:
        assert (is_refused(arguments, (7, 2, 0)), is_refused(arguments, (10, 0, 0))) == (old, new)
