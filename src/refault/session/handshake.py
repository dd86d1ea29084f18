"""The handshake of one connection, from either end: what is said, and whether what was heard is believed.

Without keys: HELLO, WELCOME. With them: HELLO, CHALLENGE, HELLO with a proof, WELCOME with a proof. Each end
proves the key for a number that the other has just made, so that nothing which was said before is of use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from refault.session.keys import new_nonce, prove_hello, prove_welcome, proves_hello, proves_welcome
from refault.session.wire import Code, Flag, Kind, Message, NoMessage, Positions, decode

_DIFFERENT_KEYS = "the other refault has another key, or wants one and --key was not given"


@dataclass(frozen=True)
class Keys:
    """What an end has to prove itself by, and to ask others for."""

    key: bytes | None = None
    optional: bool = False
    """A peer that has no key is taken too."""


class Untrusted(Exception):  # noqa: N818 - it says what the peer is
    """The peer is not to be believed, for the reason given; `answer` is what it is told, if anything."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.answer = answer


def _decoded(data: bytes) -> Message:
    try:
        return decode(data)
    except NoMessage as error:
        raise Untrusted(str(error)) from None


class Dialling:
    """Who dials, in one connection."""

    def __init__(self, keys: Keys, hello: Message, *, proven: bool) -> None:
        """`hello` says what is asked for; `proven`: this session's peer has shown before that it has the
        key."""
        flags = hello.flags | (Flag.KEYED if keys.key is not None else Flag(0))
        self._keys = keys
        self._nonce = new_nonce()
        self._hello = replace(hello, kind=Kind.HELLO, flags=flags, nonce=self._nonce)
        self._must = keys.key is not None and (proven or not keys.optional)
        self._challenged = False
        self.proven = False
        """The peer has shown that it has the key."""

    def begin(self) -> bytes:
        """What is sent first."""
        return self._hello.encode()

    def heard(self, data: bytes) -> bytes | Message:
        """What a message of the peer's asks us to send, or WELCOME. Raises `Untrusted`."""
        message = _decoded(data)
        if (message.session, message.lane) != (self._hello.session, self._hello.lane):
            raise Untrusted("it speaks of another session")
        key = self._keys.key
        if message.kind is Kind.CHALLENGE and key is not None and not self._challenged:
            self._challenged = True
            return prove_hello(key, self._hello, message.nonce).encode()
        if message.kind is not Kind.WELCOME:
            raise Untrusted("it said what is not its turn")
        self.proven = key is not None and proves_welcome(key, message, self._nonce)
        if message.code is Code.KEY:
            raise Untrusted(_DIFFERENT_KEYS)
        if not self.proven and (self._must or self._challenged):
            raise Untrusted("it has not proven that it has the key; --key-optional takes a peer without one")
        return message


class Answering:
    """Who answers, in one connection."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._nonce = b""
        self.proven = False
        """The peer has shown that it has the key."""

    def heard(self, data: bytes) -> bytes | Message:
        """What a message of the peer's asks us to send, or HELLO, believed as far as `proven` says.

        Raises `Untrusted`.
        """
        message = _decoded(data)
        if message.kind is not Kind.HELLO:
            raise Untrusted("it said what is not its turn")
        key = self._keys.key
        if key is None:
            return message
        if self._nonce:
            if not proves_hello(key, message, self._nonce):
                raise Untrusted("it has another key", self._refusal(message))
            self.proven = True
            return message
        if not message.flags & Flag.KEYED:
            if self._keys.optional:
                return message
            raise Untrusted("it has no key; --key-optional takes it all the same", self._refusal(message))
        self._nonce = new_nonce()
        challenge = Message(Kind.CHALLENGE, message.session, message.lane, message.attempt)
        return replace(challenge, nonce=self._nonce).encode()

    def welcome(self, hello: Message, code: Code, attempt: int, positions: Positions | None = None) -> bytes:
        """The answer to a HELLO that was heard."""
        welcome = Message(Kind.WELCOME, hello.session, hello.lane, attempt, code)
        welcome = replace(welcome, positions=positions or Positions())
        if self.proven and self._keys.key is not None:
            welcome = prove_welcome(self._keys.key, welcome, hello.nonce)
        return welcome.encode()

    @staticmethod
    def _refusal(hello: Message) -> bytes:
        return Message(Kind.WELCOME, hello.session, hello.lane, hello.attempt, Code.KEY).encode()
