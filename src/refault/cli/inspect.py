"""`refault inspect FILE`: what a saved migration stream consists of."""

from __future__ import annotations

import argparse
import os
import stat
import sys
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
        "exec:cat>FILE. A pipe is read until who writes to it is done, or it can no longer be read: "
        "zcat FILE.gz | refault inspect /dev/stdin",
    )
    parser.add_argument("file", type=path, metavar="FILE")
    parser.set_defaults(execute=lambda options: inspect(options.file))


def inspect(saved: Path) -> int:
    """Prints what is in the stream; 0 also where it cannot be read to its end, for the output says so.

    Raises `OperatorError` if it cannot be read, or is neither a file nor a pipe.
    """
    summary = Summary()
    size = 0
    try:
        # A pipe to which nobody writes is not waited for; of a device nobody knows where it ends.
        with open(saved, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            about = os.fstat(file.fileno())
            is_pipe = stat.S_ISFIFO(about.st_mode)
            if not (is_pipe or stat.S_ISREG(about.st_mode)):
                raise OperatorError(f"{saved} is neither a file nor a pipe; save the stream in a file")
            os.set_blocking(file.fileno(), True)
            most = sys.maxsize if is_pipe else about.st_size  # what is written from now on is not waited for
            decoder: ForwardDecoder | None = None
            while summary.opaque is None and (data := file.read(min(_READ, most - size))):
                size += len(data)
                if decoder is None:
                    decoder = ForwardDecoder(guess_mode(data))
                for event in decoder.feed(data):
                    summary.add(event)
    except OSError as error:
        raise OperatorError(f"{saved} cannot be read: {error.strerror}") from error
    if size == 0:
        raise OperatorError(f"{saved} is empty; save a stream with QEMU's migrate to exec:cat>FILE")
    more_may_come = is_pipe and summary.opaque is not None
    print("\n".join(render(summary, size if is_pipe else about.st_size, more_may_come=more_may_come)))
    return 0
