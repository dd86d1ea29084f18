"""What of a client's commands is a line of the log."""

from __future__ import annotations

import logging

import pytest
from tests.unit.qmp.played import Played, command

from refault.daemon.host.repeats import Sparing
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.monitor.audit import Recorded
from refault.daemon.monitor.caller import Caller
from refault.qmp.access import Rule, denied


def test_refusals_do_not_fill_the_log_and_what_goes_to_qemu_is_told(caplog: pytest.LogCaptureFixture) -> None:
    played = Played()
    client = played.client(rule=Rule(deny=denied(["quit", "device_add", "device_del"]), audit=True))
    recorded = Recorded("vm1", parse_address("/front", server=True), Caller(None, None, address="somewhere"))
    for name in ("quit", "device_add", "quit", "device_del", "stop", "stop"):
        played.core.receive(client, command(name))
        for sent in played.commands():
            played.reply(sent["id"])
    sparing = Sparing(lambda: 0.0)
    with caplog.at_level(logging.INFO, logger="refault.audit"):
        for request in played.audited:
            recorded.tell(request)
    said = [line.getMessage().rpartition(": ")[2] for line in caplog.records if sparing.filter(line)]
    assert said[0] == "quit"
    assert len(said) == 3
    assert all(line.endswith("stop") for line in said[1:])
