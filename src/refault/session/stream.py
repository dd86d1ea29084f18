"""One lane of a session as one end holds it (cext/session.h): rings, positions, frames.

All calls are for one thread. A buffer that a call returns is good until the next call on the same stream.
"""

from __future__ import annotations

import enum
from typing import Any

from refault.session._session import ffi, lib
from refault.session.wire import Positions

_WRONG = {
    lib.RF_WRONG_FRAME: "it sent what is no frame",
    lib.RF_WRONG_GAP: "bytes are missing before those that it sent",
    lib.RF_WRONG_LIMIT: "it sent more than it was given room for",
    lib.RF_WRONG_END: "it contradicts itself about where its stream ends",
    lib.RF_WRONG_RECEIVED: "it says that it has what it cannot have",
    lib.RF_WRONG_KEPT: "it has dropped bytes that are not received here",
    lib.RF_WRONG_WINDOW: "it takes back room that it has given",
}


class Wrong(Exception):  # noqa: N818 - it says what the peer is
    """What a peer said cannot be true, or is no frame: its connection is to be closed. Nothing was taken."""

    def __init__(self, code: int) -> None:
        super().__init__(_WRONG[code])
        self.code = code


class Frame(enum.IntEnum):
    """Types of frames."""

    DATA = lib.RF_FRAME_DATA
    ACK = lib.RF_FRAME_ACK
    FIN = lib.RF_FRAME_FIN
    STOP = lib.RF_FRAME_STOP
    RESET = lib.RF_FRAME_RESET
    END = lib.RF_FRAME_END
    MORE = lib.RF_FRAME_MORE


class Stream:
    """The two byte streams of a lane. "Local" is who is relayed, "peer" the other end of the session."""

    def __init__(self, ring: int, window: int, origin: int = 0) -> None:
        """Rings of `ring` and `window` bytes, powers of two, for what goes and what comes; positions begin at
        `origin`. Raises MemoryError."""
        self._stream: Any = ffi.gc(lib.rf_stream_new(ring, window, origin), lib.rf_stream_free, ring + window)
        if self._stream == ffi.NULL:
            raise MemoryError
        self._at = ffi.new("uint8_t **")
        self._pieces = ffi.new("struct rf_piece[2]")
        self._facts = ffi.new("struct rf_stream_facts *")

    def free(self) -> None:
        """Gives the rings' memory back at once; the stream is of no more use."""
        ffi.release(self._stream)

    # the local side

    def space(self) -> Any:
        """A buffer to be filled with what the local side says; empty where nothing more is taken now."""
        length = lib.rf_stream_space(self._stream, self._at)
        return ffi.buffer(self._at[0], length)

    def put(self, length: int) -> None:
        """So much of `space` has been filled."""
        lib.rf_stream_put(self._stream, length)

    def finish(self) -> None:
        """The local side has said all."""
        lib.rf_stream_finish(self._stream)

    def unwritten(self) -> Any:
        """A buffer of what the local side is to take next; empty where there is nothing."""
        length = lib.rf_stream_unwritten(self._stream, self._at)
        return ffi.buffer(self._at[0], length)

    def wrote(self, length: int) -> None:
        """The local side has taken so much of `unwritten`."""
        lib.rf_stream_wrote(self._stream, length)

    def wrote_fin(self) -> None:
        """The local side has been told the end of the peer's stream."""
        lib.rf_stream_wrote_fin(self._stream)

    def stop(self) -> None:
        """The local side takes no more."""
        lib.rf_stream_stop(self._stream)

    def reset(self) -> None:
        """The local side broke."""
        lib.rf_stream_reset(self._stream)

    # the connection

    def end(self) -> None:
        """The peer is to hear that all is over."""
        lib.rf_stream_end(self._stream)

    def acknowledge(self) -> None:
        """What has been written, little as it may be, is to be acknowledged now."""
        lib.rf_stream_acknowledge(self._stream)

    def lost(self) -> None:
        """There is no connection any more."""
        lib.rf_stream_lost(self._stream)

    def tell(self) -> Positions:
        """Our positions, to be said to the peer in HELLO or WELCOME."""
        at = ffi.new("struct rf_positions *")
        lib.rf_stream_tell(self._stream, at)
        return Positions(at.received, at.written, at.first_kept, at.end, at.window)

    def resume(self, peer: Positions) -> None:
        """A new connection begins, whose peer has told this. Raises `Wrong`."""
        at = (peer.received, peer.written, peer.first_kept, peer.end, peer.window)
        self._right(lib.rf_stream_resume(self._stream, ffi.new("struct rf_positions *", at)))

    def next(self) -> list[Any]:
        """Buffers to be sent next, in order; none where there is nothing to send."""
        if not lib.rf_stream_next(self._stream, self._pieces):
            return []
        return [ffi.buffer(piece.bytes, piece.length) for piece in self._pieces if piece.length]

    def sent(self, length: int) -> None:
        """The kernel took so much of them."""
        lib.rf_stream_sent(self._stream, length)

    def take(self, data: Any) -> None:
        """All that came on the connection: bytes, or a buffer. Raises `Wrong`."""
        self._right(lib.rf_stream_take(self._stream, ffi.from_buffer(data), len(data)))

    # memory

    def grow(self, ring: int) -> bool:
        """Makes the ring of what goes larger; False where that cannot be."""
        return bool(lib.rf_stream_grow(self._stream, ring) == 0)

    def widen(self, window: int) -> bool:
        """Promises the peer more room; False where that cannot be."""
        return bool(lib.rf_stream_widen(self._stream, window) == 0)

    def facts(self) -> Any:
        """struct rf_stream_facts as of now, until the next call of this."""
        lib.rf_stream_facts(self._stream, self._facts)
        return self._facts

    @staticmethod
    def _right(code: int) -> None:
        if code != lib.RF_RIGHT:
            raise Wrong(code)
