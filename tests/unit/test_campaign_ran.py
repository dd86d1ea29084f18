"""The restart campaign finds what QEMU ran too often, not at all, or for nobody."""

from __future__ import annotations

import json

import pytest
from tests.campaign.ran import Said, miscounted

Command = dict[str, object]

OURS, OTHER = "0x55d0", "0x55e0"
NEGOTIATED: Command = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "refault-1f"}
LOOKED: Command = {"execute": "qom-list", "arguments": {"path": "/one-0"}, "id": 1}
ASKED: Command = {"execute": "query-qmp-schema", "id": 2}
PASSED: Command = {"execute": "getfd", "arguments": {"fdname": "refault-1f-3-mine"}, "id": 3}
KEPT: Command = {"execute": "getfd", "arguments": {"fdname": "refault-kept-77-0"}, "id": 4}
TAKEN_BACK: Command = {"execute": "remove-fd", "arguments": {"fdset-id": 0}, "id": 6}
OWN: Command = {"execute": "query-status", "id": 5}


def trace(*commands: Command) -> str:
    lines = [f"1@2.000003:handle_qmp_command mon {OURS} req: {json.dumps(each)}" for each in commands]
    lines.append(f'1@2.000003:handle_qmp_command mon {OTHER} req: {{"execute": "stop"}}')
    return "\n".join(lines)


def said() -> Said:
    client = Said()
    client.command("qom-list", "a", path="/one-0")
    client.command("query-qmp-schema", "b")
    client.command("getfd", "c", fdname="mine")
    client.answered("a")
    client.answered("c")
    return client


@pytest.mark.parametrize("asked", [(), (ASKED,)], ids=["not run", "run, its reply unread"])
def test_each_once_and_refaults_own(asked: tuple[Command, ...]) -> None:
    ran = (NEGOTIATED, KEPT, LOOKED, *asked, PASSED, OWN, OWN, TAKEN_BACK)
    assert miscounted(trace(*ran), [said()]) == (len(ran), [])


@pytest.mark.parametrize(
    ("ran", "told"),
    [
        ((NEGOTIATED, LOOKED, PASSED, LOOKED), 'ran qom-list {"path": "/one-0"} 2 times'),
        ((NEGOTIATED, LOOKED, PASSED, ASKED, ASKED), "ran query-qmp-schema 2 times"),
        ((NEGOTIATED, LOOKED, KEPT, PASSED, KEPT), 'ran getfd {"fdname": "refault-kept-77-0"} 2 times'),
        ((NEGOTIATED, LOOKED), 'ran getfd {"fdname": "mine"} 0 times'),
        ((NEGOTIATED, LOOKED, PASSED, {"execute": "quit"}), "ran quit 1 times"),
        ((NEGOTIATED, LOOKED, PASSED, NEGOTIATED), 'ran qmp_capabilities {"enable": ["oob"]} 2 times'),
    ],
    ids=["twice", "a question twice", "refault's own twice", "not at all", "for nobody", "anew"],
)
def test_what_is_not_as_it_was_said_is_told(ran: tuple[Command, ...], told: str) -> None:
    _, [wrong] = miscounted(trace(*ran), [said()])
    assert told in wrong
