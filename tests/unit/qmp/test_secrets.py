"""Which commands nothing is kept of."""

from __future__ import annotations

import pytest

from refault.qmp.secrets import may_have_secret


@pytest.mark.parametrize(
    ("command", "arguments", "may"),
    [
        (b"migrate-set-parameters", {"cpr-exec-command": ["qemu", "-object", "secret,data=hush"]}, True),
        (b"blockdev-add", {"driver": "rbd", "password-secret": "hush"}, True),
        (b"a-command-of-tomorrow", {"key": "hush"}, True),
        (b"", {}, True),
        (b"query-status", {}, False),
        (b"set_link", {"name": "net0", "up": True}, False),
    ],
)
def test_what_was_not_reviewed_may_have_one(command: bytes, arguments: dict[str, object], may: bool) -> None:
    assert may_have_secret(command, has_arguments=bool(arguments), arguments=lambda: arguments) is may
