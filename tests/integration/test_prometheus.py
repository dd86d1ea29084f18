"""A real Prometheus with the rules of monitoring/: a lost channel fires, and its recovery clears it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from tests.support.dashboard import expressions

from refault.lab import bare
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.driver import REFAULT, refault_driver
from refault.lab.guest import Guest
from refault.lab.process import Process, started
from refault.lab.qemu import start_pair

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(shutil.which("promtool") is None, reason="needs make prometheus"),
]

MONITORING = Path(__file__).parents[2] / "monitoring"
RULES = (MONITORING / "refault.rules.yml").read_text()
GUEST = Guest(vcpus=4, log_pages=12, tick_ns=4_000_000)
SOON = 40  # s


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as response:
        return bytes(response.read())


@contextmanager
def prometheus(directory: Path, *targets: int) -> Iterator[str]:
    """Scrapes those ports of this host five times a second; its address. Patience of alerts is a second."""
    (directory / "rules.yml").write_text(RULES.replace("for: 30s", "for: 1s").replace("for: 10s", "for: 1s"))
    (directory / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {
                    "scrape_interval": "200ms",
                    "scrape_timeout": "200ms",
                    "evaluation_interval": "200ms",
                },
                "rule_files": ["rules.yml"],
                "scrape_configs": [
                    {
                        "job_name": "refault",
                        "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in targets]}],
                    }
                ],
            }
        )
    )
    port = free_port()
    command = ["prometheus", f"--config.file={directory}/prometheus.yml"]
    command += [f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with started("prometheus", command, directory / "prometheus.log"):
        yield f"http://127.0.0.1:{port}"


def firing(server: str) -> set[tuple[str, str]]:
    """The alerts that fire now, each with its VM."""
    alerts = json.loads(get(f"{server}/api/v1/alerts"))["data"]["alerts"]
    return {(a["labels"]["alertname"], a["labels"]["vm"]) for a in alerts if a["state"] == "firing"}


def value(server: str, query: str) -> float | None:
    """Of a query with one result; None where there is none."""
    answer = json.loads(get(f"{server}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
    result = answer["data"]["result"]
    return float(result[0]["value"][1]) if result else None


def answered(server: str) -> set[str]:
    """The expressions of the dashboard that have a value now; none may be an error, which `get` raises."""
    variables = {"$vm": ".*", "$__rate_interval": "10s"}
    found = set()
    for expression in expressions():
        query = expression
        for name, filled in variables.items():
            query = query.replace(name, filled)
        assert "$" not in query
        if value(server, query) is not None:
            found.add(expression)
    return found


async def until_ready(server: str, process: Process) -> None:
    """Until it has scraped the refault in question."""
    with trio.fail_after(SOON):
        while True:
            try:
                if value(server, 'refault_qemu_connected{vm="source"}') == 1:
                    return
            except OSError:
                process.must_run()
            await trio.sleep(0.1)


async def until_firing(server: str, expected: set[tuple[str, str]]) -> None:
    with trio.fail_after(SOON):
        while firing(server) != expected:
            await trio.sleep(0.1)


async def test_a_lost_channel_fires_and_its_recovery_clears(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    options = tuple(["--metrics", f"127.0.0.1:{port}"] for port in ports)
    async with (
        start_pair(GUEST, tmp_path) as pair,
        start_channel(tmp_path, free_port()) as channel,
        refault_driver(pair, channel, tmp_path, options=(options[0], options[1])) as driver,
    ):
        with prometheus(tmp_path, *ports) as server:
            await until_ready(server, driver.processes[0])
            scrape = get(f"http://127.0.0.1:{ports[0]}/metrics")
            checked = await trio.run_process(
                ["promtool", "check", "metrics"], stdin=scrape, capture_stdout=True, capture_stderr=True
            )
            assert (checked.stdout, checked.stderr) == (b"", b"")
            await driver.source.execute("migrate-set-parameters", {"downtime-limit": 1})
            await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=1 << 20)
            assert firing(server) == set()
            since = len(driver.destination.events)
            # The other host's refault hangs: nobody recovers.
            driver.processes[1].signal(signal.SIGSTOP)
            await channel.lose(Loss.RESET)
            await until_firing(server, {("RefaultPostcopyPaused", "source")})
            shown = answered(server)
            driver.processes[1].signal(signal.SIGCONT)
            with trio.fail_after(SOON):
                await driver.destination.wait_migration("postcopy-active", since=since)
            await until_firing(server, set())
            with trio.fail_after(SOON):
                while value(server, 'refault_recovery_seconds_count{vm="source"}') != 1:
                    await trio.sleep(0.1)
                while shown != set(expressions()):
                    shown |= answered(server)
                    await trio.sleep(0.1)
            command = [*REFAULT, "events", "--no-follow", "--control", str(driver.controls[0])]
            events = await trio.run_process(command, capture_stdout=True)
            told = [json.loads(line) for line in events.stdout.splitlines()]
            assert [line["event"] for line in told] == ["lost", "recovered"]
            assert told[1]["seconds"] == pytest.approx(
                value(server, 'refault_recovery_seconds_sum{vm="source"}')
            )
        await bare.finish(driver.source)


def test_the_rules_do_what_their_tests_say() -> None:
    for arguments in (["check", "rules", "refault.rules.yml"], ["test", "rules", "refault.rules.test.yml"]):
        done = subprocess.run(
            ["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
