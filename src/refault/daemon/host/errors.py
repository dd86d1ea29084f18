"""Errors that are the operator's to mend, told in one line and without a traceback."""

from __future__ import annotations

from unicodedata import category


def one_line(text: str) -> str:
    """The text, with what would begin another line or steer a terminal as Python writes it."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def must_be_one_line(text: str) -> None:
    """Raises ValueError where a text has control characters, as none has that an operator means."""
    for each in text:
        if category(each) in _CONTROL:
            raise ValueError(f"has a control character ({one_line(each)})")


_CONTROL = frozenset({"Cc", "Zl", "Zp"})
"""Unicode's: of control, and separators of lines and paragraphs."""


class OperatorError(Exception):
    """Something outside refault is not as it must be. Text: "what happened; what to do", without the VM."""


def operator_errors(error: BaseException) -> list[OperatorError]:
    """The operator's errors in what a nursery raised; none if there is anything else in it, a bug."""
    if isinstance(error, OperatorError):
        return [error]
    if not isinstance(error, BaseExceptionGroup):
        return []
    found: list[OperatorError] = []
    for inner in error.exceptions:
        leaves = operator_errors(inner)
        if not leaves:
            return []
        found += leaves
    return found
