"""Where the file that clients' connections are written down in cannot be had, or has gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.test_kept_clients import Client, greeted, served, started, status, wait_until

from refault.daemon.kept.orphans import end_orphans

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]


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


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_what_is_held_for_a_refault_that_has_left_no_record_is_nobodys(tmp_path: Path, damage: str) -> None:
    """Not QEMU's monitor, nor the address where clients come."""
    journal = tmp_path / "state" / "vm.clients"
    with served(tmp_path) as (_, process, client):
        assert end_orphans(str(tmp_path / "q")) == 0  # it is somebody's
        assert "return" in client.say("query-status")
        process.kill()
        process.wait()
        if damage == "gone":
            journal.unlink()
        else:
            journal.write_bytes(journal.read_bytes()[:300])
        with started(tmp_path):
            assert client.file.read() == b""
            wait_until(lambda: greeted(tmp_path / "f"))
            wait_until(lambda: bool(status(tmp_path).get("kept")))
            wait_until(lambda: "has left no record" in (tmp_path / "log").read_text())
