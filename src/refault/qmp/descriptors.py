"""Passed file descriptors: which command takes which, how QEMU knows it, and what becomes of fd sets.

New ones replace unread ones at QEMU's socket, so one command that takes one is with QEMU at a time, and none
goes with another command, for the next getfd would inherit it.
"""

from __future__ import annotations

from collections.abc import Callable

from refault.qmp.decoding import decode, decode_arguments
from refault.qmp.fdnames import TAKES_FD, FdNames, rename
from refault.qmp.fdsets import Call, FdSets
from refault.qmp.session import GONE, Client, Request
from refault.qmp.splitter import ERROR, EXECUTE, RETURN, VERB_MASK, Message


class Descriptors:
    """Those of all clients of one QEMU. `discard` closes one, `call` sends a command about fd sets, and
    `free` is called when a command that takes one may go again."""

    def __init__(self, discard: Callable[[int], None], call: Call, free: Callable[[], None]) -> None:
        self._discard = discard
        self._call = call
        self._free = free
        self.request: Request | None = None
        """The in-band one with QEMU that takes one."""
        self.names = FdNames()
        self.sets = FdSets(call, free)

    def hand_out(self, client: Client, requests: list[Request], fd: int, *, ends: bool) -> None:
        """`ends`: the last of `requests` came with the last byte, so `fd` came no later than that.

        A command that is refused takes one whatever it is: none that came with it goes on to another.
        """
        takes = [
            request
            for request in requests
            if request.refusal is not None
            or (request.name in TAKES_FD and request.message.shape & VERB_MASK == EXECUTE)
        ]
        replaced = ends and fd >= 0 and len(takes) == 1 and takes[0] is requests[-1]
        if takes and client.fd != -1 and not replaced:
            self.give(takes.pop(0), client.fd)
            client.fd = -1
        if fd < 0:
            return
        if client.fd >= 0:
            self._discard(client.fd)
        client.fd = -1
        if takes:
            self.give(takes[-1], fd)
        else:
            client.fd = fd

    def give(self, request: Request, fd: int) -> None:
        """It has come for this command."""
        request.fd = fd
        request.client.queued_fds += fd >= 0

    def drop(self, request: Request) -> None:
        """The command does not go to QEMU."""
        fd, request.fd = request.fd, -1
        if fd >= 0:
            self._discard(fd)
            request.client.queued_fds -= 1

    def may_go(self, request: Request) -> bool:
        """Whether a getfd or add-fd may go now: one at a time, and not before older fd sets are known."""
        if self.request:
            return False
        if request.name == b"add-fd" and not self.sets.may_add:
            self.sets.ask_older()
            return False
        return True

    def take(self, request: Request) -> int:
        """The descriptor to send with the command. One that the command will not take would be the next
        command's.
        """
        if not request.oob:
            self.request = request
        fd = request.fd
        if fd < 0 or request.oob or not _takes_its_fd(request):
            self.drop(request)
            return -1
        request.fd = -1
        request.client.queued_fds -= 1
        return fd

    @staticmethod
    def is_lost(request: Request) -> bool:
        """Whether QEMU would take a descriptor with it that is lost."""
        return request.fd == GONE and _takes_its_fd(request)

    def take_back(self) -> Request | None:
        """The command that is with QEMU and takes one has not gone there; None where there is none."""
        request, self.request = self.request, None
        if request is not None:
            if request.new_name:
                self.names.forget(request.client.number, request.new_name)
            self._free()
        return request

    def rename(self, request: Request, own: int) -> None:
        """Has a command name descriptors as QEMU knows them. `own`: the number of refault itself."""
        names, number = self.names, request.client.number
        defines = request.name == b"getfd"
        if not names and not request.names and not defines:
            return
        prefixes: set[str] = set()

        def change(name: str) -> str:
            if defines:
                request.new_name = None if names.has(number, name) else name
                upstream = names.define(number, name)
            elif request.rebuilt and names.has(own, name):
                upstream = names.use(own, name)  # the watcher put it in
            elif number == own and not names.has(own, name):
                upstream = name  # refault itself means what QEMU calls so
            else:
                upstream = request.names.get(name) or names.use(number, name)
            if upstream != name:
                prefixes.add(upstream.removesuffix(name))
            return upstream

        message = request.message
        arguments = (
            decode_arguments(message) if request.data is None else decode(request.data).get("arguments", {})
        )
        renamed = rename(arguments, change)
        if prefixes:
            request.rebuild(renamed)
            request.prefixes = frozenset(prefix.encode() for prefix in prefixes)

    def answered(self, request: Request, reply: Message, returned: Callable[[Message], object]) -> None:
        """QEMU has answered a command, and it is known what it did."""
        if request is self.request:
            self.request = None
            self._free()
        if request.name == b"getfd" and request.new_name and reply.shape & VERB_MASK == ERROR:
            self.names.forget(request.client.number, request.new_name)
        elif request.name == b"closefd" and reply.shape & VERB_MASK == RETURN:
            self.names.forget(request.client.number, str(request.arguments().get("fdname")))
        elif request.name == b"add-fd":
            self.sets.added(request, returned(reply))

    def lost(self) -> None:
        """QEMU went away, and its descriptors with it."""
        self.request = None
        self.names.clear()
        self.sets = FdSets(self._call, self._free)


def _takes_its_fd(request: Request) -> bool:
    """Whether getfd or add-fd has arguments with which QEMU runs it at all."""
    arguments = decode_arguments(request.message)
    if request.name == b"getfd":
        return set(arguments) == {"fdname"} and isinstance(arguments["fdname"], str)
    number = arguments.get("fdset-id", 0)
    return (
        not set(arguments) - {"fdset-id", "opaque"}
        and isinstance(number, int)
        and not isinstance(number, bool)
        and isinstance(arguments.get("opaque", ""), str)
    )
