"""`refault demo` and its scenario on real QEMUs, the floor (a script recovers), and checks that must fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from refault.lab.guest import ARENA_BASE
from refault.lab.qemu import Pair
from refault.lab.scenario import Options, ScenarioFailed, run
from refault.lab.story import Story

from .qemus import BINARIES

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

SMALL = Options(losses=3, memory=32 << 20, who="script")
DEMO = [sys.executable, "-m", "refault", "demo"]


async def told(options: Options, directory: Path) -> Story:
    story = Story(options.losses, options.who)
    await run(options, story, directory)
    return story


@pytest.mark.parametrize("binary", BINARIES)
async def test_the_floor_a_script_recovers(tmp_path: Path, binary: str) -> None:
    story = await told(replace(SMALL, binary=binary), tmp_path)
    assert story.ok
    assert [loss.loss.value for loss in story.losses] == ["reset", "close", "killed carrier"]
    assert story.losses[2].bytes_inside > 0
    assert story.status("source") == story.status("destination") == "completed"


async def test_where_nobody_recovers_the_run_stays_paused_and_says_so(tmp_path: Path) -> None:
    story = Story(3, "nobody")
    with pytest.raises(ScenarioFailed, match=r"loss 1 \(reset\) was not recovered in 5 s.*postcopy-paused"):
        await run(replace(SMALL, who="nobody", recovery_deadline=5), story, tmp_path)
    assert not story.ok
    assert story.recoveries == 0


async def test_a_byte_changed_behind_the_guests_back_is_told(tmp_path: Path) -> None:
    def meddle(pair: Pair) -> None:
        pair.destination.memory.flip(ARENA_BASE + 8192 + 4095)

    story = await told(replace(SMALL, losses=0, meddle=meddle), tmp_path)
    assert not story.ok
    assert story.verdict is not None
    assert story.verdict.wrong == 1
    assert f"pc.ram offset {ARENA_BASE + 8192:#x}" in str(story.verdict)


@pytest.mark.parametrize("relay", ["auto", "off"])
@pytest.mark.parametrize("binary", BINARIES)
def test_refault_alone_recovers(tmp_path: Path, binary: str, relay: str) -> None:
    page = tmp_path / "page.html"
    options = ["--losses", "3", "--memory", "32M", "--qemu", binary, "--relay", relay, "--report", str(page)]
    done = subprocess.run(
        [*DEMO, *options, "--json"], capture_output=True, text=True, timeout=140, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert (document["recoveries"], document["relay"]) == (3, relay)
    assert document["memory"]["pages_wrong"] == 0
    assert [finding["subject"] for finding in document["host"]][:3] == ["QEMU", "KVM", "userfaultfd"]
    for loss in document["losses"]:
        assert loss["recovered_seconds"] < 10  # a timeout of ours must not be part of it
        counts = [loss[f"requests_{what}"] for what in ("outstanding", "repeated_by_qemu", "replayed")]
        if relay == "off":
            assert counts == [None, None, None]
        elif loss["return_path_bytes_lost"]:  # what was lost has been asked for again, by one or the other
            assert counts[0] > 0
            assert counts[1] + counts[2] > 0
    assert "loss 3: killed carrier" in done.stderr
    assert "3 of 3 losses recovered by refault" in page.read_text()
    assert not any(tmp_path.glob("refault-*"))


def test_with_sessions_losses_are_pauses_that_no_qemu_notices() -> None:
    options = ["--losses", "3", "--memory", "32M", "--session", "auto", "--json"]
    done = subprocess.run([*DEMO, *options], capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["ok"], document["session"], document["recoveries"]) == (True, "auto", 3)
    assert not any(loss["noticed_by_qemu"] for loss in document["losses"])
    for side in ("source", "destination"):
        assert {status for _, status in document["statuses"][side]} <= {
            "setup",
            "active",
            "device",
            "postcopy-active",
            "completed",
        }
    assert "3 of 3 losses were pauses in the bytes, which no QEMU noticed" in done.stderr


def test_starve_shows_who_is_blocked_without_the_replay_and_runs_with_it() -> None:
    done = subprocess.run(
        [*DEMO, "--starve", "--json"], capture_output=True, text=True, timeout=140, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    helped, left = document["migrations"]
    assert (helped["replay"], left["replay"]) == (True, False)
    assert helped["blocked_seconds"] < document["looked_seconds"] <= left["blocked_seconds"]
    assert left["threads_waiting"] > 0  # a thread of another process, and still counted
    assert helped["memory_right"] is left["memory_right"] is True


def belonging_to(directory: Path) -> list[str]:
    """The command lines of processes that work in the directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(os.fsencode(directory) in word for word in words):
            found.append(b" ".join(words).decode(errors="replace"))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_demo_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [*DEMO, "--memory", "64M", "--json"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as demo:
        deadline = time.monotonic() + 60
        while len(belonging_to(tmp_path)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(belonging_to(tmp_path)) >= 4
        demo.send_signal(number)
        _, said = demo.communicate(timeout=60)
    if number is not signal.SIGKILL:
        assert demo.returncode == 130
        assert said.endswith(b"refault: interrupted; everything that was started has been ended\n")
        assert b"Traceback" not in said
        assert not any(tmp_path.iterdir())
    deadline = time.monotonic() + 30
    while belonging_to(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert belonging_to(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--qemu", "no-such-qemu"], 1, "refault: the demo cannot run here: there is no no-such-qemu"),
        (
            ["--report", "/no/such/page.html"],
            1,
            "refault: --report /no/such/page.html: there is no directory",
        ),
        (["--memory", "3M"], 2, "'3M' is out of range: 16M to 2G"),
        (["--memory", "much"], 2, "'much' is not a size such as 64M or 1G"),
        (["--losses", "-1"], 2, "'-1' is not a number from 0 to 1000"),
        (["--starve", "--losses", "2"], 2, "--losses is not for --starve"),
        (["--relay", "off", "--session", "auto"], 2, "--session auto needs the relay"),
    ],
)
def test_what_cannot_be_is_one_clear_line(options: list[str], status: int, says: str) -> None:
    done = subprocess.run([*DEMO, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
