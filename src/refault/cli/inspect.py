"""`refault inspect FILE`: what a saved migration stream consists of."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from refault.channel.forward import ForwardDecoder
from refault.channel.inspect import Summary, guess_mode, render
from refault.cli.arguments import path
from refault.daemon.host.errors import OperatorError

_READ = 1 << 20


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="what a saved migration stream consists of",
        description="What a saved migration stream consists of: sections, RAM blocks, pages by kind, "
        "commands, and where and why it can no longer be read. Save one with QEMU's `migrate` to "
        "exec:cat>FILE.",
    )
    parser.add_argument("file", type=path, metavar="FILE")
    parser.set_defaults(execute=lambda options: inspect(options.file))


def inspect(saved: Path) -> int:
    """Prints what is in the stream; 0 also where it cannot be read to its end, for the output says so.

    Raises `OperatorError` if the file cannot be read.
    """
    summary = Summary()
    size = 0
    decoder: ForwardDecoder | None = None
    try:
        with saved.open("rb") as file:
            while data := file.read(_READ):
                size += len(data)
                if decoder is None:
                    decoder = ForwardDecoder(guess_mode(data))
                for event in decoder.feed(data):
                    summary.add(event)
    except OSError as error:
        raise OperatorError(f"{saved} cannot be read: {error.strerror}") from error
    if size == 0:
        raise OperatorError(f"{saved} is empty; save a stream with QEMU's migrate to exec:cat>{saved}")
    print("\n".join(render(summary, size)))
    return 0
