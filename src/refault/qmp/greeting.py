"""QEMU's greeting: what is at the other end, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass

from refault.qmp.decoding import decode
from refault.qmp.splitter import Message


class NotQmpError(Exception):
    """What is at the other end of the upstream connection does not speak QMP."""


@dataclass(frozen=True)
class Greeting:
    """QEMU's greeting."""

    raw: bytes
    version: tuple[int, int, int]
    package: str
    oob: bool


def parse_greeting(message: Message) -> Greeting:
    """Reads {"QMP": {"version": {"qemu": {"major", "minor", "micro"}, "package"}, "capabilities"}}.

    Raises NotQmpError.
    """
    try:
        inner = decode(message.raw)["QMP"]
        qemu = inner["version"]["qemu"]
        version = (int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"]))
        return Greeting(
            message.raw, version, str(inner["version"]["package"]), "oob" in inner["capabilities"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise NotQmpError(f"its greeting is {message.raw[:200]!r}") from error
