"""What each ALERT of the log is called in the journal: its MESSAGE_ID, under which the catalogue explains it.

systemd/refault.catalog has the texts (journalctl -x shows them, or `journalctl --catalog --dump-catalog`). An
id is an interface: it stays with its alert whatever becomes of the words.
"""

from __future__ import annotations

MESSAGE_IDS: dict[str, str] = {
    "holding QEMU's leg open": "baa3b8f158934170ab7a8b1cb6263c16",
    "ALERT: QEMU holds its leg open": "345fd6ba21bc8e326ca874c258fd15be",
    "the channel was lost while the source waited to hear": "aa1a1d86e161411a95bbc6ea9ea9b2d1",
    "the channel was lost in the switchover": "238d4223998e4cbf841a4fc78b442e92",
    "the channel was lost before all device state had left QEMU": "2222a3bfd2604f319492f30d080629b5",
    "the guest could not be taken back": "b9fd2dcc064741bdafc2e915586b8c08",
    "the source migration failed after postcopy began": "cc1a5ed6e3f242bfa14a86ae1443f626",
    "could not stop the source's guest": "159ee03691ee445397fe1f34540bd607",
    "answers for another VM": "f24d4a8e927342da86314cd121ffffa1",
    "gave up after": "d6bb3fecec3948ab896adab9e29b66ea",
}
"""By words of the alert's own, which no other alert has."""

_MARK = "ALERT:"


def message_id(text: str) -> str | None:
    """Of a log message, as it stands in the code; None where it is no alert."""
    if _MARK not in text:
        return None
    return next((found for words, found in MESSAGE_IDS.items() if words in text), None)
