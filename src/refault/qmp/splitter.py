"""Messages out of a byte stream, by the compiled splitter (cext/json_splitter.h)."""

from __future__ import annotations

from refault.qmp._splitter import ffi, lib

MAX_MESSAGE = (64 << 20) - 16
"""Bytes in one message of a client's: QEMU's own limit (qobject/json-streamer.c, MAX_TOKEN_SIZE), less the
id that it gets.
"""
MAX_NESTING = 1024
"""Brackets open at once in one."""
MAX_REPLY = 1 << 30
"""Bytes in one message of QEMU's, which has no limit there: human-monitor-command can print anything."""

VERB_MASK: int = lib.RF_VERB_MASK
EXECUTE: int = lib.RF_VERB_EXECUTE
EXEC_OOB: int = lib.RF_VERB_EXEC_OOB
RETURN: int = lib.RF_VERB_RETURN
ERROR: int = lib.RF_VERB_ERROR
EVENT: int = lib.RF_VERB_EVENT
GREETING: int = lib.RF_VERB_GREETING
NOT_OBJECT: int = lib.RF_NOT_OBJECT
UNUSUAL: int = lib.RF_UNUSUAL
EXTENDED: int = lib.RF_EXTENDED
BROKEN: int = lib.RF_BROKEN
EMPTY: int = lib.RF_EMPTY

BATCH = 8
"""Messages that are taken in one go from a client, or from QEMU: what the others wait for, of this VM and of
all that the daemon serves."""

_SIZE: int = lib.RF_RECORD_SIZE
_WELL_FORMED: int = lib.RF_JSON_VALUE
_STRAY: int = lib.RF_JSON_STRAY
_PROBLEMS = {
    lib.RF_JSON_STRAY: "JSON parse error, stray '{}'",
    lib.RF_JSON_SYNTAX: "JSON parse error, expecting value",
    lib.RF_JSON_DUPLICATE: "JSON parse error, duplicate key",
    lib.RF_JSON_TOO_LARGE: "JSON token size limit exceeded",
    lib.RF_JSON_TOO_MANY: "JSON token count limit exceeded",
    lib.RF_JSON_TOO_DEEP: "JSON nesting depth limit exceeded",
}


class Message:
    """One JSON value as it came in, and where its routing members stand in it.

    Spans are byte offsets into `raw`, end exclusive; an end of 0 says that there is no such member. `verb`
    spans the value of the first of execute, exec-oob, return, error, event, QMP. Taking out `cut` takes out
    the id, with its key and one comma. `problem` is None, or QEMU's words for why this is no message.
    """

    __slots__ = (
        "arguments",
        "arguments_end",
        "cut",
        "cut_end",
        "id",
        "id_end",
        "problem",
        "raw",
        "shape",
        "verb",
        "verb_end",
    )

    def __init__(self, raw: bytes, record: list[int], problem: str | None) -> None:
        self.raw = raw
        (
            _,
            _,
            _,
            self.shape,
            self.verb,
            self.verb_end,
            self.arguments,
            self.arguments_end,
            self.id,
            self.id_end,
            self.cut,
            self.cut_end,
        ) = record
        self.problem = problem

    def record(self) -> list[int]:
        """What it is made of besides its bytes."""
        return [
            0,
            0,
            0,
            self.shape,
            self.verb,
            self.verb_end,
            self.arguments,
            self.arguments_end,
            self.id,
            self.id_end,
            self.cut,
            self.cut_end,
        ]

    def without_id(self) -> bytes:
        """The message as it would be had nobody sent an id."""
        if not self.id_end:
            return self.raw
        return self.raw[: self.cut] + self.raw[self.cut_end :]

    def with_id(self, spelling: bytes) -> bytes:
        """The message, an object, with `spelling` as its id; the other bytes as they came in."""
        raw = self.raw
        if self.id_end:
            return raw[: self.id] + spelling + raw[self.id_end :]
        return insert_id(raw, spelling, empty=bool(self.shape & EMPTY))


def insert_id(raw: bytes, spelling: bytes, *, empty: bool = False) -> bytes:
    """The object `raw`, which has no id, with one as its last member."""
    return b"".join((raw[:-1], b'"id": ' if empty else b', "id": ', spelling, b"}"))


def compact(value: bytes) -> bytes:
    """A well-formed value as one line of strict JSON, its strings and numbers otherwise spelt as they are."""
    out = ffi.new("char[]", 3 * len(value) or 1)
    return bytes(ffi.buffer(out, lib.rf_json_compact(value, len(value), out)))


class Splitter:
    """Splits a stream fed in chunks of any size. `lenient` for QEMU's output, which is not always JSON."""

    __slots__ = ("_held", "_keep", "_records", "_splitter", "more")

    def __init__(self, *, max_bytes: int = MAX_MESSAGE, lenient: bool = False) -> None:
        splitter = lib.rf_splitter_new(max_bytes, lenient)
        if splitter == ffi.NULL:
            raise MemoryError
        self._splitter = ffi.gc(splitter, lib.rf_splitter_free)
        self._records = ffi.new("int64_t[]", BATCH * _SIZE)
        self._keep = ffi.new("size_t *")
        self._held = bytearray()
        self.more = False

    @property
    def held(self) -> int:
        """Bytes of an unfinished message."""
        return len(self._held)

    def saved(self) -> tuple[bytes, bool, bool]:
        """All that another one must know to go on as this one does: `Splitter.restore`."""
        return bytes(self._held), bool(lib.rf_splitter_skips(self._splitter)), self.more

    def restore(self, saved: tuple[bytes, bool, bool]) -> None:
        """Goes on as the one did that is `saved`; a new one with the same limits."""
        held, skips, self.more = saved
        self._held += held
        if skips:
            lib.rf_splitter_skip(self._splitter)

    def feed(self, data: bytes, *, batch: bool = False) -> list[Message]:
        """The messages that `data` completes, in order.

        With `batch` no more than `BATCH`; while `more` says that there may be others, feeding nothing gives
        them.
        """
        if not self._held:
            messages, keep = self._scan(data, batch)
            if keep < len(data):
                self._held += data[keep:] if keep else data
            return messages
        self._held += data
        with memoryview(self._held) as view:
            messages, keep = self._scan(view, batch)
        if keep:
            del self._held[:keep]
        return messages

    def _scan(self, data: bytes | memoryview, batch: bool) -> tuple[list[Message], int]:
        messages: list[Message] = []
        records, keep = self._records, self._keep
        with ffi.from_buffer(data) as start:
            size = len(data)
            done = 0
            while True:
                count = lib.rf_splitter_scan(self._splitter, start + done, size - done, records, BATCH, keep)
                if count < 0:
                    raise MemoryError
                if count:
                    numbers = ffi.unpack(records, count * _SIZE)
                    for at in range(0, count * _SIZE, _SIZE):
                        record = numbers[at : at + _SIZE]
                        raw = bytes(data[done + record[1] : done + record[2]])
                        problem = None if record[0] == _WELL_FORMED else _problem(raw, record)
                        messages.append(Message(raw, record, problem))
                done += keep[0]
                if count < BATCH or batch:
                    self.more = count == BATCH
                    return messages, done


def _problem(raw: bytes, record: list[int]) -> str:
    token = raw[record[4] : record[5]][:1000] if record[0] == _STRAY else b""
    return _PROBLEMS[record[0]].format(token.decode("utf-8", "replace"))
