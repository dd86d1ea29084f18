"""Values on command lines that more than one command takes. All raise `argparse.ArgumentTypeError`."""

from __future__ import annotations

import argparse
from pathlib import Path


def path(text: str) -> Path:
    """A path; a ~ that the shell has left, as in ``--control=~/x``, is a home directory to it too."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def vm_name(text: str) -> str:
    """A name that can be part of a file's: refault puts sockets and state under it."""
    if not text or text in (".", "..") or "/" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: it must be printable, without '/'")
    if len(text.encode()) > 64:
        raise argparse.ArgumentTypeError(f"{text!r} is too long for a name: at most 64 bytes")
    return text
