"""Where the file that clients' connections are written down in cannot be had, or has gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.test_kept_clients import Client, served, started, status, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(90)]


def test_what_cannot_be_written_down_anew_is_gone_on_with_once(tmp_path: Path) -> None:
    """Never a second time from what is no longer true."""
    journal = tmp_path / "state" / "vm.clients"
    in_the_way = journal.with_name("vm.clients.new")
    with served(tmp_path) as (_, process, client):
        client.sock.sendall(b'{"execute": "query-name"}' * 40)
        process.kill()
        process.wait()
        in_the_way.mkdir()
        with started(tmp_path) as second:
            assert [client.line() for _ in range(40)] == [{"return": {}}] * 40
            assert "return" in client.say("query-status")
            wait_until(lambda: status(tmp_path).get("kept") is False)
            wait_until(lambda: not journal.exists())
            second.kill()
            assert client.file.read() == b""
        in_the_way.rmdir()
        (tmp_path / "f").unlink()
        with started(tmp_path):
            again = Client(tmp_path / "f")
            with again.sock, again.file:
                assert "QMP" in again.line()
                assert again.say("qmp_capabilities") == {"return": {}}
                assert again.say("query-name") == {"return": {}}
