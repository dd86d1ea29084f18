"""A client's `qmp_capabilities`: it negotiates with refault, and QEMU has negotiated with that before."""

from __future__ import annotations

from refault.qmp import replies
from refault.qmp.decoding import decode, decode_arguments
from refault.qmp.session import Client, Request


def negotiate(client: Client, request: Request, *, offered: bool) -> bytes | None:
    """The answer, or None where QEMU has something to say on the arguments: `negotiated_by_qemu`. `offered`:
    whether QEMU takes out-of-band commands."""
    arguments = decode_arguments(request.message) if request.message.arguments_end else {}
    enable = arguments.get("enable", [])
    if set(arguments) - {"enable"} or not isinstance(enable, list) or any(item != "oob" for item in enable):
        request.negotiates = True
        return None
    return _negotiated(client, enable, offered=offered)


def negotiated_by_qemu(request: Request, reply: bytes, *, offered: bool) -> bytes:
    """The answer where QEMU was asked: it checks the arguments first, and then finds that refault has
    negotiated before."""
    error = decode(reply).get("error", {})
    if error.get("desc") != replies.ALREADY_NEGOTIATED:
        return reply
    return _negotiated(request.client, request.arguments().get("enable", []), offered=offered)


def _negotiated(client: Client, enable: object, *, offered: bool) -> bytes:
    oob = isinstance(enable, list) and "oob" in enable
    if oob and not offered:
        return replies.oob_unavailable()
    client.negotiated = True
    client.oob = oob
    return replies.success()
