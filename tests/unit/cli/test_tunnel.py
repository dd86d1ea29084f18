"""The command line of `refault tunnel`, and its key."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from refault.cli.main import build_parser
from refault.cli.tunnel import read_key, tunnel_options
from refault.daemon.host.errors import OperatorError
from refault.daemon.tunnel.options import TunnelOptions


def _parsed(listen: str, to: str, *more: str) -> TunnelOptions:
    arguments = ["tunnel", "--listen", listen, "--to", to, *more]
    parsed: argparse.Namespace = build_parser(arguments).parse_args(arguments)
    return tunnel_options(parsed)


def test_each_command_says_which_end_it_is() -> None:
    dials = _parsed("/run/near", "session:[2001:db8::1]:4446", "--session-patience", "7")
    assert (dials.answers, dials.to.host, dials.to.port, dials.patience) == (False, "2001:db8::1", 4446, 7.0)
    answers = _parsed("session:0.0.0.0:4446,ipv6=off", "tcp:localhost:22")
    assert (answers.answers, answers.listen.host, str(answers.to)) == (True, "0.0.0.0", "tcp:localhost:22")


@pytest.mark.parametrize(
    ("listen", "to", "more"),
    [
        ("tcp:a:1", "tcp:b:2", ()),
        ("session:a:1", "session:b:2", ()),
        ("session:a:1", "tcp:b:0", ()),
        ("session:a:1", "tcp:b:2,server=on", ()),
        ("tcp:a:1,wait=on", "session:b:2", ()),
        ("tcp:a:1,server=off", "session:b:2", ()),
        ("tcp:a:1", "session:b:2,ipv4=on", ()),
        ("tcp:a:1", "session:b", ()),
        ("tcp:a:1", "session:/run/socket", ()),
        ("tcp:a:1", "session:a:1", ()),
        ("tcp:a:1", "session:b:2", ("--key-optional",)),
        ("/run/near,read_only=on", "session:b:2", ()),
        ("nothing", "session:b:2", ()),
    ],
)
def test_what_describes_no_end(listen: str, to: str, more: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"."):
        _parsed(listen, to, *more)


def test_a_key_has_32_bytes_and_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "name"
    with pytest.raises(OperatorError, match="cannot be read"):
        read_key(str(file))
    file.write_bytes(bytes(32))
    file.chmod(0o604)
    with pytest.raises(OperatorError, match="for everybody"):
        read_key(str(file))
    file.chmod(0o640)
    assert read_key(str(file)) == bytes(32)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(OperatorError, match="LoadCredential"):
        read_key("credential:name")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_key("credential:name") == bytes(32)
    for wrong in (31, 33, 0):
        file.write_bytes(bytes(wrong))
        with pytest.raises(OperatorError, match="must hold 32 bytes"):
            read_key(str(file))
