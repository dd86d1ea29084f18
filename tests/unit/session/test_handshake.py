"""Who believes whom, with and without keys, and what an old HELLO is good for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refault.session.handshake import Answering, Dialling, Keys, Untrusted
from refault.session.wire import (
    MESSAGE_BYTES,
    VERSION,
    Code,
    Flag,
    Kind,
    Message,
    NoMessage,
    Positions,
    decode,
)

KEY, OTHER = bytes(range(32)), bytes(32)
HELLO = Message(Kind.HELLO, b"0123456789abcdef", 0, 1, flags=Flag.NEW, positions=Positions(1, 2, 3, 4, 5))


def _met(dialling: Dialling, answering: Answering, code: Code = Code.OK) -> Message:
    """WELCOME, as the dialling end hears it."""
    data = dialling.begin()
    while isinstance(asked := answering.heard(data), bytes):
        told = dialling.heard(asked)
        assert isinstance(told, bytes)
        data = told
    assert asked.positions == HELLO.positions
    heard = dialling.heard(answering.welcome(asked, code, 1, Positions(6, 7, 8, 9, 10)))
    assert isinstance(heard, Message)
    assert (heard.code, heard.positions) == (code, Positions(6, 7, 8, 9, 10))
    return heard


@pytest.mark.parametrize(
    ("dials", "answers", "proven"),
    [
        (Keys(), Keys(), False),
        (Keys(KEY), Keys(KEY), True),
        (Keys(KEY, True), Keys(KEY), True),
        (Keys(KEY), Keys(KEY, True), True),
        (Keys(KEY, True), Keys(), False),
        (Keys(), Keys(KEY, True), False),
    ],
)
def test_ends_that_meet(dials: Keys, answers: Keys, proven: bool) -> None:
    dialling, answering = Dialling(dials, HELLO, proven=False), Answering(answers)
    _met(dialling, answering)
    assert dialling.proven == answering.proven == proven


@pytest.mark.parametrize(
    ("dials", "answers"),
    [
        (Keys(KEY), Keys(OTHER)),
        (Keys(KEY, True), Keys(OTHER, True)),  # optional is for who has none
        (Keys(), Keys(KEY)),
        (Keys(KEY), Keys()),
    ],
)
def test_ends_that_do_not_meet(dials: Keys, answers: Keys) -> None:
    dialling, answering = Dialling(dials, HELLO, proven=False), Answering(answers)
    with pytest.raises(Untrusted) as told:
        _met(dialling, answering)
    if told.value.answer:
        with pytest.raises(Untrusted, match="another key, or wants one"):
            dialling.heard(told.value.answer)


def test_a_session_that_was_proven_is_not_taken_over_by_who_has_no_key() -> None:
    dialling = Dialling(Keys(KEY, True), HELLO, proven=True)
    with pytest.raises(Untrusted, match="has not proven"):
        _met(dialling, Answering(Keys()))


@pytest.mark.parametrize("code", [Code.UNKNOWN, Code.GONE, Code.STALE, Code.OK])
def test_whoever_proves_nothing_ends_nothing(code: Code) -> None:
    """A stranger that answers in the other refault's place, without a challenge or behind a real one."""
    for challenge in (None, Message(Kind.CHALLENGE, HELLO.session, 0, 1, nonce=bytes(32))):
        dialling = Dialling(Keys(KEY), HELLO, proven=False)
        dialling.begin()
        if challenge is not None:
            dialling.heard(challenge.encode())
        forged = Message(Kind.WELCOME, HELLO.session, 0, 1, code, flags=Flag.PROOF, tag=bytes(32))
        with pytest.raises(Untrusted):
            dialling.heard(forged.encode())


def test_what_was_said_before_proves_nothing() -> None:
    """Replays of a whole exchange, at either end, and an end's own proof sent back to it."""
    dialling, answering = Dialling(Keys(KEY), HELLO, proven=False), Answering(Keys(KEY))
    first = dialling.begin()
    challenge = answering.heard(first)
    assert isinstance(challenge, bytes)
    proof = dialling.heard(challenge)
    assert isinstance(proof, bytes)
    hello = answering.heard(proof)
    assert isinstance(hello, Message)
    welcome = answering.welcome(hello, Code.OK, 1)

    again = Answering(Keys(KEY))
    again.heard(proof)
    with pytest.raises(Untrusted):
        again.heard(proof)
    other = Dialling(Keys(KEY), HELLO, proven=False)
    other.begin()
    other.heard(challenge)
    with pytest.raises(Untrusted):
        other.heard(welcome)
    with pytest.raises(Untrusted):
        other.heard(replace(decode(proof), kind=Kind.WELCOME, nonce=bytes(32)).encode())


def test_a_changed_byte_is_noticed() -> None:
    for at in range(MESSAGE_BYTES):
        dialling, answering = Dialling(Keys(KEY), HELLO, proven=False), Answering(Keys(KEY))
        challenge = answering.heard(dialling.begin())
        assert isinstance(challenge, bytes)
        proof = dialling.heard(challenge)
        assert isinstance(proof, bytes)
        changed = bytearray(proof)
        changed[at] ^= 1
        with pytest.raises(Untrusted):
            answering.heard(bytes(changed))


def test_the_wire_is_as_documented() -> None:
    message = Message(
        Kind.WELCOME,
        bytes(range(16)),
        0x0102,
        0x03040506,
        Code.STALE,
        positions=Positions(1, 2, 3, 4, 5),
        nonce=b"n" * 32,
        tag=b"t" * 32,
    )
    wire = message.encode()
    assert wire == (
        b"\xf5refault\x00\x01\x01\x02\x03\x01\x00\x00\x03\x04\x05\x06"
        + bytes(range(16))
        + b"".join(number.to_bytes(8, "big") for number in range(1, 6))
        + b"n" * 32
        + b"t" * 32
    )
    assert (len(wire), MESSAGE_BYTES) == (140, 140)
    assert decode(wire) == message


@pytest.mark.parametrize(
    "wrong",
    [
        bytes(140),
        HELLO.encode().replace(b"\xf5refault", b"\xf5Refault"),
        HELLO.encode().replace(b"t\x00\x01", b"t\x00\x02"),
        replace(HELLO, code=Code.GONE).encode(),
        HELLO.encode()[:12] + b"\x09" + HELLO.encode()[13:],
        HELLO.encode()[:13] + b"\x63" + HELLO.encode()[14:],
        HELLO.encode()[:14] + b"\x80" + HELLO.encode()[15:],
    ],
)
def test_what_is_no_message(wrong: bytes) -> None:
    assert VERSION == 1
    with pytest.raises(NoMessage):
        decode(wrong)


def test_out_of_turn() -> None:
    answering, dialling = Answering(Keys()), Dialling(Keys(), HELLO, proven=False)
    with pytest.raises(Untrusted):
        answering.heard(replace(HELLO, kind=Kind.WELCOME).encode())
    for wrong in (
        HELLO,
        replace(HELLO, kind=Kind.CHALLENGE),
        replace(HELLO, kind=Kind.WELCOME, lane=1),
        replace(HELLO, kind=Kind.WELCOME, session=bytes(16)),
    ):
        with pytest.raises(Untrusted):
            dialling.heard(wrong.encode())
