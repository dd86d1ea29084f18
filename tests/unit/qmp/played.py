"""A QEMU that is played to a multiplexer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from refault.qmp.access import FREE, Rule
from refault.qmp.multiplexer import Multiplexer
from refault.qmp.session import Client, Limits, Request
from refault.qmp.splitter import Splitter, compact

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "v"},'
    b' "capabilities": [%s]}}\r\n'
)


class Played:
    """A multiplexer, what it sends to its QEMU, and what it asks."""

    def __init__(
        self, *, oob: bool = True, watch: tuple[str, ...] = (), limits: Limits | None = None
    ) -> None:
        self.asked: list[Request] = []
        self.audited: list[Request] = []
        self.closed: list[int] = []
        self.events: list[tuple[str, Mapping[str, object]]] = []
        self.connects = 0
        self.core = Multiplexer(
            limits=limits or Limits(),
            watch=watch,
            ask=self.asked.append,
            discard=self.closed.append,
            on_event=lambda name, data: self.events.append((name, data)),
            on_ready=lambda: None,
            audit=self.audited.append,
        )
        self.splitter = Splitter()
        self.fds: list[int] = []
        self.oob = oob
        self.connect()

    def connect(self) -> None:
        self.connects += 1
        self.negotiation = b'"negotiation-%d"' % self.connects
        self.core.upstream_connected(self.negotiation)
        self.core.receive_upstream(GREETING % (b'"oob"' if self.oob else b""))
        [(sent, _)] = self.take()
        enable = ["oob"] if self.oob else []
        assert json.loads(sent)["arguments"] == {"enable": enable}
        self.core.receive_upstream(b'{"return": {}, "id": %s}\r\n' % self.negotiation)

    def client(self, *enable: str, rule: Rule = FREE) -> Client:
        client = self.core.join(rule=rule)
        command = {"execute": "qmp_capabilities", "arguments": {"enable": list(enable)}}
        self.core.receive(client, json.dumps(command).encode())
        greeting, reply = self.replies(client)
        assert "QMP" in greeting
        assert reply == {"return": {}}
        return client

    def take(self) -> list[tuple[bytes, int]]:
        out, self.core.upstream_out = self.core.upstream_out, []
        return out

    def commands(self) -> list[dict[str, Any]]:
        """What came to QEMU."""
        found = []
        for data, fd in self.take():
            if fd >= 0:
                self.fds.append(fd)
            found.append(json.loads(compact(data)))
        return found

    def reply(self, number: object, value: object = None) -> None:
        self.core.receive_upstream(json.dumps({"return": value or {}, "id": number}).encode() + b"\r\n")

    @staticmethod
    def replies(client: Client) -> list[dict[str, Any]]:
        lines = b"".join(client.out).split(b"\r\n")
        client.unsent = 0
        client.out.clear()
        assert lines.pop() == b""
        return [json.loads(line) for line in lines]


def command(name: str, spelling: object = None, **arguments: object) -> bytes:
    members: dict[str, object] = {"execute": name}
    if spelling is not None:
        members["id"] = spelling
    if arguments:
        members["arguments"] = arguments
    return json.dumps(members).encode()
