"""What `refault inspect` tells of streams of several kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.channel import streams
from tests.unit.channel.streams import PAGE

from refault.cli.main import main


def told_of(stream: bytes, directory: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    (directory / "stream").write_bytes(stream)
    assert main(["inspect", str(directory / "stream")]) == 0
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_a_whole_postcopy_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = streams.postcopy_stream()
    told = told_of(stream, tmp_path, capsys)
    assert told[0] == f"stream: {len(stream)} bytes, version 3"
    assert [line.split() for line in told if line.startswith("pc.ram ")] == [
        ["pc.ram", str(64 * PAGE), "host's", "3", "1", "0", "0", str(2 * PAGE)]
    ]
    [end] = [line for line in told if "end of the package, " in line]
    assert end.split(maxsplit=1)[1] == "end of the package, with POSTCOPY_RUN"
    assert told[-1] == f"read to its end: EOF at byte {len(stream) - 1}"


def test_commands_that_repeat_have_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opening = streams.HEADER + streams.configuration(uuid=bytes(range(16))) + streams.ping(1)
    discards = streams.discard(b"pc.ram", [(0, PAGE)]) * 500 + streams.discard(b"vga.vram", [(0, PAGE)])
    told = told_of(opening + discards + streams.ping(2), tmp_path, capsys)
    assert "uuid: 00010203-0405-0607-0809-0a0b0c0d0e0f" in told
    commands = [line.split(maxsplit=1)[1] for line in told[told.index("commands") + 1 : -2]]
    assert commands == ["PING 1", "RAM_DISCARD pc.ram (500 times)", "RAM_DISCARD vga.vram", "PING 2"]


def test_a_recovered_channel_does_not_say_how_large_its_blocks_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = streams.recv_bitmap(b"pc.ram") + streams.command(9)
    pages = streams.part() + streams.page(PAGE, b"pc.ram") + streams.EOS + streams.footer()
    told = told_of(resume + pages, tmp_path, capsys)
    assert told[0].endswith(", a recovered channel")
    assert [line.split() for line in told if line.startswith("pc.ram ")] == [
        ["pc.ram", "-", "-", "1", "0", "0", "0", "0"]
    ]


def test_a_device_is_not_read_to_an_end_that_never_comes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/dev/zero"]) == 1
    told = capsys.readouterr()
    wanted = "refault: /dev/zero is neither a file nor a pipe; save the stream in a file\n"
    assert (told.out, told.err) == ("", wanted)


def test_a_pipe_to_which_nobody_writes_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert main(["inspect", str(tmp_path / "pipe")]) == 1
    assert f"{tmp_path / 'pipe'} is empty" in capsys.readouterr().err


def from_pipe(command: str) -> list[str]:
    """What is told of what a command writes, which is to end soon."""
    inspect = ["sh", "-c", f"{command} | {sys.executable} -m refault inspect /dev/stdin"]
    done = subprocess.run(inspect, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def test_a_pipe_is_read_to_its_end_as_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it comes in pieces."""
    stream = streams.postcopy_stream()
    told = told_of(stream, tmp_path, capsys)
    file = tmp_path / "stream"
    in_pieces = f"(head -c 9 {file}; sleep 0.2; tail -c +10 {file})"
    assert [line.strip() for line in from_pipe(in_pieces)] == told


def test_of_a_pipe_without_an_end_no_more_is_read_than_tells_that_it_is_no_stream() -> None:
    told = from_pipe("yes")
    assert told[0] == "stream: 1048576 bytes or more"
    assert told[-1].startswith("cannot be read from byte 0 on")


def test_of_a_file_that_is_no_stream_no_more_is_read_than_tells_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stream"
    path.touch()
    os.truncate(path, 1 << 40)
    assert main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"stream: {1 << 40} bytes"
    assert told[-1].startswith("cannot be read from byte 0 on")
