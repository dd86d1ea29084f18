"""What refault says in QEMU's place, in QEMU's own words (qapi/qmp-dispatch.c, monitor/qmp.c)."""

from __future__ import annotations

import msgspec

GENERIC = "GenericError"
NOT_FOUND = "CommandNotFound"

ALREADY_NEGOTIATED = "Capabilities negotiation is already complete, command ignored"
_NOT_NEGOTIATED = "Expecting capabilities negotiation with 'qmp_capabilities'"


def error(class_: str, desc: str) -> bytes:
    """An error reply without an id."""
    text = msgspec.json.encode(desc)
    return b'{"error": {"class": "%s", "desc": %s}}' % (class_.encode(), text)


def success(value: object = None) -> bytes:
    """A reply without an id; None stands for the empty object that QEMU returns where there is nothing to
    say.
    """
    return b'{"return": %s}' % msgspec.json.encode({} if value is None else value)


def is_error(reply: bytes) -> bool:
    """Whether a reply object is an error."""
    return b'"error"' in reply and "error" in msgspec.json.decode(reply)


DESCRIPTOR_LOST = error(
    GENERIC,
    "refault ended while it held the descriptor of this command, which QEMU has not got: send both again",
)
NOT_NEGOTIATED = error(NOT_FOUND, _NOT_NEGOTIATED)
NOT_OBJECT = error(GENERIC, "QMP input must be a JSON object")


def oob_unavailable() -> bytes:
    """The answer to a client that asks for out-of-band where QEMU offers none."""
    return error(GENERIC, "Capability oob not available")


def shape_error(members: dict[str, object], *, oob: bool) -> str | None:
    """What is wrong with a command object, as QEMU's qmp_dispatch_check_obj() says it; None if nothing is."""
    verb = None
    newest_first = list(reversed(members))  # as in a bucket
    for name in sorted(newest_first, key=_bucket):
        value = members[name]
        if name == "execute" or (name == "exec-oob" and oob):
            if not isinstance(value, str):
                return f"QMP input member '{name}' must be a string"
            if verb:
                return f"QMP input member '{name}' clashes with '{verb}'"
            verb = name
        elif name == "arguments":
            if not isinstance(value, dict):
                return "QMP input member 'arguments' must be an object"
        elif name != "id":
            return f"QMP input member '{name}' is unexpected"
    return None if verb else "QMP input lacks member 'execute'"


def _bucket(name: str) -> int:
    """Where QEMU keeps a key: which of several errors it finds first (qobject/qdict.c, gdbm's hash)."""
    data = name.encode()
    value = 0x238F13AF * len(data) + sum(byte << i * 5 % 24 for i, byte in enumerate(data))
    return (1103515243 * value + 12345) % 512
