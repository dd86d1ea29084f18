"""Metrics: what a scrape gives, against the page that lists it, and the server."""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
import stat
import subprocess
import tempfile
import threading
import time
import urllib.request
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import msgspec
import pytest
import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.daemon.pictures import BUSY, PICTURE

from refault.daemon.host.errors import OperatorError
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.telling import metrics
from refault.daemon.telling.metrics import StatusCollector, serve_metrics
from refault.daemon.telling.snapshot import Status

DOCS = Path(__file__).parents[4] / "docs" / "metrics.md"
SUFFIXES = {"counter": "_total", "gauge": "", "histogram": ""}

LOCAL = Address(None, "127.0.0.1", server=True)


def exposition(status: Status) -> str:
    registry = CollectorRegistry()
    registry.register(StatusCollector(lambda: status))
    return generate_latest(registry).decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[(name, frozenset(labels.items()))]


def test_docs_list_every_metric_with_its_type_and_labels_and_no_other() -> None:
    rows = re.findall(r"^\| `(refault_\w+)` \| (\w+) \| (.*?) \|", DOCS.read_text(), flags=re.MULTILINE)
    documented = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    documented["refault_info"] = ("gauge", frozenset({"version"}))
    documented["refault_build_info"] = ("gauge", frozenset({"version", "python"}))
    documented["refault_channel_bytes_total"] = ("counter", frozenset({"direction"}))
    documented["refault_pages_outstanding"] = ("gauge", frozenset({"block"}))
    assert len(documented) == len(rows)
    exposed = {}
    for family in text_string_to_metric_families(exposition(PICTURE)):
        labels = frozenset().union(*(sample.labels for sample in family.samples)) - {"vm", "le"}
        exposed[family.name + SUFFIXES[family.type]] = (family.type, labels)
    assert exposed == documented


def test_values_are_those_of_the_status() -> None:
    text = exposition(PICTURE)
    assert value(text, "refault_info", version="1.2.3") == 1
    assert value(text, "refault_qemu_connected", vm="vm1") == 1
    assert value(text, "refault_qemu_connected", vm="vm2") == 0
    assert value(text, "refault_clients_connected", vm="vm1") == 2
    assert value(text, "refault_clients_total", vm="vm1") == 7
    assert value(text, "refault_clients_slow_disconnected_total", vm="vm1") == 1
    assert value(text, "refault_clients_undecided_total", vm="vm1") == 3
    assert value(text, "refault_clients_kept", vm="vm1") == 1
    assert value(text, "refault_clients_kept", vm="vm2") == 0
    assert value(text, "refault_commands_total", vm="vm1") == 31
    assert value(text, "refault_events_total", vm="vm1") == 12
    assert (
        value(text, "refault_migration_status", vm="vm1", role="destination", status="postcopy-paused") == 1
    )
    assert value(text, "refault_relay_state", vm="vm1", state="opaque") == 1
    assert value(text, "refault_leg_held", vm="vm1") == 1
    assert value(text, "refault_leg_held", vm="vm2") == 0
    assert value(text, "refault_recovery_given_up", vm="vm1") == 1
    assert value(text, "refault_recovery_given_up", vm="vm2") == 0
    assert value(text, "refault_channel_bytes_total", vm="vm1", direction="forward") == 987654321
    assert value(text, "refault_channel_bytes_total", vm="vm1", direction="return") == 4321
    assert value(text, "refault_losses_total", vm="vm1") == 4
    assert value(text, "refault_recovery_attempts_total", vm="vm1") == 6
    assert value(text, "refault_recoveries_total", vm="vm1") == 3
    assert value(text, "refault_recovery_last_seconds", vm="vm1") == 0.012
    assert value(text, "refault_recovery_seconds_bucket", vm="vm1", le="0.025") == 2
    assert value(text, "refault_recovery_seconds_count", vm="vm1") == 3
    assert value(text, "refault_recovery_seconds_sum", vm="vm1") == 0.5
    assert value(text, "refault_last_loss_timestamp_seconds", vm="vm1") == 2000.5
    assert value(text, "refault_pages_requested_total", vm="vm1") == 1120
    assert value(text, "refault_pages_repeated_total", vm="vm1") == 15
    assert value(text, "refault_pages_arrived_total", vm="vm1") == 1110
    assert value(text, "refault_pages_replayed_total", vm="vm1") == 13
    assert value(text, "refault_pages_recorded", vm="vm1") == 14
    assert value(text, "refault_kernel_waiting_threads", vm="vm1") == 8
    assert value(text, "refault_pages_outstanding", vm="vm1", block="pc.ram") == 9
    assert value(text, "refault_pages_outstanding", vm="vm1", block="/rom@etc/acpi") == 1
    name = "refault_page_request_latency_seconds"
    assert value(text, f"{name}_bucket", vm="vm1", le="0.01") == 100
    assert value(text, f"{name}_bucket", vm="vm1", le="+Inf") == 110
    assert value(text, f"{name}_count", vm="vm1") == 110
    assert value(text, f"{name}_sum", vm="vm1") == 0.75


def test_what_is_not_known_has_no_sample() -> None:
    named = {name for name, labels in samples(exposition(PICTURE)) if ("vm", "vm2") in labels}
    assert "refault_migration_status" not in named
    assert "refault_recovery_last_seconds" not in named
    assert "refault_last_loss_timestamp_seconds" not in named


def test_the_status_is_a_set_of_states_of_which_one_holds() -> None:
    text = exposition(PICTURE)
    states = {
        (labels["vm"], labels["state"]): held
        for (name, labels_), held in samples(text).items()
        if name == "refault_migration_state"
        for labels in [dict(labels_)]
    }
    assert {each for each, held in states.items() if held} == {("vm1", "postcopy-paused"), ("vm2", "none")}
    assert states["vm1", "postcopy-active"] == states["vm2", "completed"] == 0
    assert value(text, "refault_migration_role", vm="vm1", role="destination") == 1
    assert value(text, "refault_migration_role", vm="vm1", role="source") == 0
    unheard = msgspec.structs.replace(BUSY, migration=msgspec.structs.replace(BUSY.migration, status="new"))
    told = exposition(Status(vms=(unheard,)))
    assert value(told, "refault_migration_state", vm="vm1", state="new") == 1
    assert value(told, "refault_migration_state", vm="vm1", state="none") == 0


def test_no_vm_is_no_error() -> None:
    assert samples(exposition(Status(version="1"))) == {
        ("refault_info", frozenset({("version", "1")})): 1,
        ("refault_build_info", frozenset({("version", "1"), ("python", platform.python_version())})): 1,
        ("refault_log_lines_dropped_total", frozenset()): 0,
        ("refault_troubles", frozenset()): 0,
    }


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        return response.read().decode()  # type: ignore[no-any-return]


async def test_server_serves_the_last_picture_and_frees_its_port() -> None:
    picture = Status(version="1")
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_metrics, LOCAL, lambda: picture)
        scraped = await trio.to_thread.run_sync(scrape, port)
        assert 'refault_info{version="1"}' in scraped
        assert "process_cpu_seconds_total" in scraped
        picture = Status(version="2")
        assert 'refault_info{version="2"}' in await trio.to_thread.run_sync(scrape, port)
        nursery.cancel_scope.cancel()
    assert "metrics" not in {thread.name for thread in threading.enumerate()}
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_a_silent_connection_keeps_no_one_from_scraping() -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_metrics, LOCAL, lambda: PICTURE)
        with socket.create_connection(("127.0.0.1", port)):
            assert "refault_info" in await trio.to_thread.run_sync(scrape, port)
        nursery.cancel_scope.cancel()


async def test_who_takes_too_long_over_a_request_is_closed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "_REQUEST_SECONDS", 0.3)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_metrics, LOCAL, lambda: PICTURE)
        with trio.fail_after(9):
            async with await trio.open_tcp_stream("127.0.0.1", port) as slow:
                with suppress(trio.BrokenResourceError):
                    while True:
                        await slow.send_all(b"x")
                        await trio.sleep(0.05)
            async with await trio.open_tcp_stream("127.0.0.1", port) as silent:
                assert await silent.receive_some() == b""
        assert "refault_info" in await trio.to_thread.run_sync(scrape, port)
        nursery.cancel_scope.cancel()
    assert capfd.readouterr().err == ""


async def test_scrapers_leave_the_daemon_its_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CONNECTIONS", 3)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_metrics, LOCAL, lambda: PICTURE)
        with trio.fail_after(9):
            async with AsyncExitStack() as stack:
                for _ in range(4):
                    connection = await trio.open_tcp_stream("127.0.0.1", port)
                    last = await stack.enter_async_context(connection)
                assert await last.receive_some() == b""
            while any("process_request" in thread.name for thread in threading.enumerate()):
                await trio.sleep(0.01)
        assert "refault_info" in await trio.to_thread.run_sync(scrape, port)
        nursery.cancel_scope.cancel()


async def test_a_scraper_for_whom_there_is_no_descriptor_costs_nothing() -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_metrics, LOCAL, lambda: PICTURE)
        scraper = socket.socket()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with scraper:
            resource.setrlimit(resource.RLIMIT_NOFILE, (scraper.fileno(), hard))
            try:
                scraper.connect(("127.0.0.1", port))
                before = time.process_time()
                await trio.sleep(0.5)
                assert time.process_time() - before < 0.2
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        nursery.cancel_scope.cancel()


async def test_a_port_in_use_is_one_line_for_the_operator() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OperatorError, match=rf"^cannot serve metrics on 127\.0\.0\.1:{port}: .*; .*$"):
            await serve_metrics(Address(None, "127.0.0.1", port, server=True), lambda: PICTURE)


async def test_a_host_that_does_not_resolve_is_one_line_for_the_operator() -> None:
    with pytest.raises(OperatorError, match=r"^cannot serve metrics on no\.such\.host\.invalid:9: .*; .*$"):
        await serve_metrics(Address(None, "no.such.host.invalid", 9, server=True), lambda: PICTURE)


SCRAPE = b"GET /metrics HTTP/1.0\r\n\r\n"


def asked(path: Path, user: int | None = None) -> bytes:
    connect = ["socat", "-t5", "STDIO", f"UNIX-CONNECT:{path}"]
    return subprocess.run(
        connect, input=SCRAPE, user=user, group=user, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ).stdout


async def test_on_a_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_metrics, parse_address(f"unix:{path}", server=True), lambda: PICTURE)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"refault_info" in await trio.to_thread.run_sync(asked, path)
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_a_socket_file_that_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    ended: list[OperatorError] = []

    async def serve(*, task_status: trio.TaskStatus[int]) -> None:
        address = parse_address(f"unix:{path}", server=True)
        try:
            await serve_metrics(address, lambda: PICTURE, task_status=task_status)
        except OperatorError as error:
            ended.append(error)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            path.unlink()
    assert "was removed or replaced" in str(ended)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
async def test_to_whom_a_socket_file_tells_them(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path lets no other user in
        os.chmod(directory, 0o755)
        path = Path(directory) / "metrics"
        address = parse_address(f"unix:{path},allow-user=65534", server=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_metrics, address, lambda: PICTURE)
            assert b"refault_info" in await trio.to_thread.run_sync(asked, path, 65534)
            assert await trio.to_thread.run_sync(asked, path, 4242) == b""
            assert await trio.to_thread.run_sync(asked, path) == b""
            nursery.cancel_scope.cancel()
    assert "uid 4242" in caplog.text
