"""The status model and the page that documents it."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refault.daemon.telling import snapshot
from refault.daemon.telling.snapshot import (
    BlockStatus,
    ChannelStatus,
    ClientsStatus,
    LatencyStatus,
    ListenerStatus,
    LossStatus,
    MigrationStatus,
    PagesStatus,
    PagesTotalStatus,
    QemuStatus,
    RecoveryStatus,
    Status,
    VmStatus,
)

DOCS = Path(__file__).parents[4] / "docs" / "status.md"


def documented(section: str) -> set[str]:
    """The field names in the first column of one section's table."""
    text = DOCS.read_text()
    part = re.split(r"^## ", text, flags=re.MULTILINE)
    (body,) = [p for p in part if p.startswith(section)] if section else [part[0]]
    names: set[str] = set()
    for row in re.findall(r"^\| (`.+?) \|", body, flags=re.MULTILINE):
        names.update(re.findall(r"`([^`]+)`", row))
    return names


def fields(struct: type[msgspec.Struct]) -> set[str]:
    return set(struct.__struct_fields__)


@pytest.mark.parametrize(
    ("section", "struct"),
    [
        ("`vms[].qemu`", QemuStatus),
        ("`vms[].clients`", ClientsStatus),
        ("`vms[].listeners[]`", ListenerStatus),
        ("`vms[].migration`", MigrationStatus),
        ("`vms[].latency_seconds`", LatencyStatus),
        ("`vms[].pages_total`", PagesTotalStatus),
        ("`vms[].channel`", ChannelStatus),
    ],
)
def test_docs_name_every_field_and_no_other(section: str, struct: type[msgspec.Struct]) -> None:
    assert documented(section) == fields(struct)


def test_docs_name_every_field_of_pages_and_blocks() -> None:
    blocks = {f"blocks[].{name}" for name in fields(BlockStatus)}
    assert documented("`vms[].pages`") == (fields(PagesStatus) - {"blocks"}) | {"blocks[]"} | blocks


def test_docs_name_every_field_of_recovery_and_its_losses() -> None:
    losses = {f"recent[].{name}" for name in fields(LossStatus)}
    assert documented("`vms[].recovery`") == (fields(RecoveryStatus) - {"recent"}) | {"recent[]"} | losses


def test_docs_name_every_object_of_a_vm() -> None:
    plain = {"name", "leaving", "internal_errors", "internal_error"}
    assert documented("") == (fields(Status) - {"vms"}) | {"vms[]"} | {f"vms[].{name}" for name in plain}
    sections = set(re.findall(r"^## `vms\[\]\.(\w+)(?:\[\])?`", DOCS.read_text(), flags=re.MULTILINE))
    assert sections == fields(VmStatus) - plain


text = st.text(st.characters(codec="utf-8"))
vms = st.builds(
    VmStatus,
    name=text,
    qemu=st.builds(QemuStatus, connected=st.booleans(), address=text, pid=st.none() | st.integers(1, 2**22)),
    migration=st.builds(MigrationStatus, status=st.none() | text, held=st.none() | text),
    latency_seconds=st.builds(LatencyStatus, buckets=st.just(((0.001, 1), (1.0, 2)))),
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # so it is on a busy machine
@given(st.lists(vms, max_size=3))
def test_document_is_one_line_and_reads_back(listed: list[VmStatus]) -> None:
    status = Status(vms=tuple(listed))
    document = snapshot.encode(status)
    assert document.count(b"\n") == 1
    assert document.endswith(b"\n")
    assert snapshot.decode(document) == status


def test_unknown_fields_of_a_newer_refault_are_ignored() -> None:
    assert snapshot.decode(b'{"version":"9","vms":[],"sessions":[]}') == Status(version="9")


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b'{"vms":[{"name":1}]}'])
def test_anything_else_raises_decode_error(document: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        snapshot.decode(document)


def test_a_picture_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Status().vms = ()  # type: ignore[misc]
