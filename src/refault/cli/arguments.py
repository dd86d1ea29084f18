"""Values on command lines, read as they are in files. All raise `argparse.ArgumentTypeError`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from refault.config import values

T = TypeVar("T")


def checked(read: Callable[[str], T]) -> Callable[[str], T]:
    """`read` for argparse, which tells the text of no ValueError."""

    def convert(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


path = checked(values.path)
socket_path = checked(values.socket_path)
vm_name = checked(values.vm_name)
