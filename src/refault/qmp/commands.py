"""What a watcher may say about a client's command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """The command goes to QEMU: as the client sent it, or with other arguments.

    Of `arguments`, members that equal those decoded from the client's command go as the client spelt them.
    `on_reply` gets the reply object's bytes without an id and gives what the client gets, without an id too;
    a pure function, called once when the reply comes, also where the client has left meanwhile, and never if
    QEMU goes away.
    """

    arguments: Mapping[str, object] | None = None
    on_reply: Callable[[bytes], bytes] | None = None


@dataclass(frozen=True)
class Answer:
    """The command is answered in QEMU's place: `error` is (class, desc), else the command returns `value`."""

    error: tuple[str, str] | None = None
    value: object = None
