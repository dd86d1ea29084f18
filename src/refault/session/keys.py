"""Proofs of a shared key in the handshake: HMAC-SHA256 over a message and the other end's nonce.

The labels keep what one end has proven from being a proof of the other's.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import replace

from refault.session.wire import NONCE_BYTES, Flag, Message

KEY_BYTES = 32
_DIALS = b"refault session 1, who dials"
_ANSWERS = b"refault session 1, who answers"


def new_nonce() -> bytes:
    """A number that was never used before."""
    return secrets.token_bytes(NONCE_BYTES)


def _tag(key: bytes, label: bytes, message: Message, nonce: bytes) -> bytes:
    return hmac.digest(key, label + nonce + message.untagged(), "sha256")


def prove_hello(key: bytes, hello: Message, nonce: bytes) -> Message:
    """HELLO with the proof that `nonce`, which came in CHALLENGE, asks for."""
    hello = replace(hello, flags=hello.flags | Flag.PROOF)
    return replace(hello, tag=_tag(key, _DIALS, hello, nonce))


def prove_welcome(key: bytes, welcome: Message, nonce: bytes) -> Message:
    """WELCOME with the proof that `nonce`, which came in HELLO, asks for."""
    welcome = replace(welcome, flags=welcome.flags | Flag.PROOF)
    return replace(welcome, tag=_tag(key, _ANSWERS, welcome, nonce))


def proves_hello(key: bytes, hello: Message, nonce: bytes) -> bool:
    """Whether HELLO was made by who has the key, after `nonce` was."""
    return bool(hello.flags & Flag.PROOF) and hmac.compare_digest(hello.tag, _tag(key, _DIALS, hello, nonce))


def proves_welcome(key: bytes, welcome: Message, nonce: bytes) -> bool:
    """Whether WELCOME was made by who has the key, after `nonce` was."""
    given = _tag(key, _ANSWERS, welcome, nonce)
    return bool(welcome.flags & Flag.PROOF) and hmac.compare_digest(welcome.tag, given)
