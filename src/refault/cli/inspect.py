"""`refault inspect FILE`: what a saved migration stream consists of."""

from __future__ import annotations

import argparse
import os
import stat
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

    Raises `OperatorError` if the file cannot be read, or is none.
    """
    summary = Summary()
    try:
        # A pipe is not waited for; of a device nobody knows where it ends.
        with open(saved, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise OperatorError(f"{saved} is no regular file; save the stream in one")
            left = about.st_size  # what is written from now on is not waited for either
            decoder: ForwardDecoder | None = None
            while summary.opaque is None and (data := file.read(min(_READ, left))):
                left -= len(data)
                if decoder is None:
                    decoder = ForwardDecoder(guess_mode(data))
                for event in decoder.feed(data):
                    summary.add(event)
    except OSError as error:
        raise OperatorError(f"{saved} cannot be read: {error.strerror}") from error
    if about.st_size == 0:
        raise OperatorError(f"{saved} is empty; save a stream with QEMU's migrate to exec:cat>{saved}")
    print("\n".join(render(summary, about.st_size)))
    return 0
