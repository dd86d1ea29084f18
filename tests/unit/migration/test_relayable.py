import pytest

from refault.migration.endpoint import Endpoint, Inet, Other, endpoint_of
from refault.migration.phase import Role
from refault.migration.relayable import enabled_capabilities, has_virtio_mem, why_not, why_not_recoverable

NEW = (7, 2, 0)
HERE = Inet("127.0.0.1", 4444)


def test_a_plain_postcopy_migration_is_relayed() -> None:
    enabled = {"postcopy-ram", "events"}
    for role in Role:
        assert why_not(HERE, enabled, {"tls-creds": ""}, role=role, version=NEW, process_is_seen=True) is None


@pytest.mark.parametrize(
    "uri", ["exec:" + "x" * 1000, "exec:x\n<2>vm: all is lost", "tcp:a\nb:1", f"tcp:{'a' * 300}:1"]
)
def test_an_address_is_no_more_than_a_line_of_the_log(uri: str) -> None:
    channels = {
        "channel-type": "main",
        "addr": {"transport": "socket", "type": "inet", "host": uri, "port": "1"},
    }
    for arguments in ({"uri": uri}, {"channels": [channels]}):
        endpoint = endpoint_of(arguments)
        reason = why_not(endpoint, set(), {}, role=Role.SOURCE, version=NEW, process_is_seen=True)
        assert reason is not None
        assert reason.isprintable()
        assert len(reason) < 300


def test_with_tls_a_source_must_be_told_whom_it_speaks_to() -> None:
    tls = {"tls-creds": "tls0", "tls-hostname": ""}
    assert why_not(HERE, set(), tls, role=Role.SOURCE, version=NEW, process_is_seen=True) is None
    for endpoint, given in ((HERE, True), (Inet("", 4444), False)):  # where nothing tells the name
        reason = why_not(
            endpoint, set(), tls, role=Role.SOURCE, version=NEW, process_is_seen=True, given=given
        )
        assert "tls-hostname" in (reason or "")
    assert why_not(HERE, set(), tls, role=Role.DESTINATION, version=NEW, process_is_seen=True) is None
    old = why_not(HERE, set(), tls, role=Role.DESTINATION, version=(5, 2, 0), process_is_seen=True)
    assert "TLS handshake" in (old or "")
    named = {**tls, "tls-hostname": "host-b"}
    assert why_not(HERE, set(), named, role=Role.SOURCE, version=NEW, process_is_seen=True) is None


def test_each_reason_is_told() -> None:
    def why(
        enabled: set[str],
        parameters: dict[str, object] | None = None,
        *,
        endpoint: Endpoint = HERE,
        process_is_seen: bool = True,
    ) -> str:
        reason = why_not(
            endpoint,
            enabled,
            parameters or {},
            role=Role.SOURCE,
            version=NEW,
            process_is_seen=process_is_seen,
        )
        return reason or ""

    tls = {"tls-creds": "tls0", "tls-hostname": "host-b", "multifd-channels": 2}
    assert "rdma-pin-all" in why({"rdma-pin-all"})
    assert "multifd" in why({"multifd", "postcopy-ram"})
    assert "TLS" in why({"multifd"}, tls)
    assert "TLS" in why({"postcopy-ram", "postcopy-preempt"}, tls)
    assert "monitor" in why(set(), process_is_seen=False)
    assert "rdma:h:1" in why(set(), endpoint=Other("rdma:h:1"))


def test_what_qemu_could_not_recover_is_announced() -> None:
    assert why_not_recoverable({"postcopy-ram"}) is None
    assert why_not_recoverable(set()) is None
    assert "release-ram" in (why_not_recoverable({"postcopy-ram", "release-ram"}) or "")
    assert "dirty-bitmaps" in (why_not_recoverable({"dirty-bitmaps"}) or "")


def test_capabilities_are_read_from_qemus_answer() -> None:
    reply = [{"capability": "xbzrle", "state": False}, {"capability": "events", "state": True}]
    assert enabled_capabilities(reply) == {"events"}
    assert enabled_capabilities(None) == frozenset()


@pytest.mark.parametrize(
    ("reply", "has"),
    [
        ([], False),
        ([{"type": "dimm", "data": {}}], False),
        ([{"type": "dimm"}, {"type": "virtio-mem", "data": {}}], True),
        ({}, True),
        ([3], True),
    ],
)
def test_virtio_mem_is_seen_and_what_cannot_be_read_counts_as_it(reply: object, has: bool) -> None:
    assert has_virtio_mem(reply) is has
