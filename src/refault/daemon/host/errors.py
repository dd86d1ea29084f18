"""Errors that are the operator's to mend, told in one line and without a traceback."""

from __future__ import annotations


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
