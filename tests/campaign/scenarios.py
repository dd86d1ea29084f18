"""Runs scenarios one after the other and prints a line for each."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path


class NotWell(Exception):  # noqa: N818 - it says what happened
    """It did not end as it must; the message says how."""


async def tell(name: str, who: str, scenario: Callable[[Path], Awaitable[str]]) -> bool:
    """Runs one in a directory of its own and prints what it returned, or raised; False where it raised.

    That directory, with all logs, is kept where it raised.
    """
    well = True
    directory = Path(tempfile.mkdtemp(prefix=f"refault-{name}-"))
    try:
        told = await scenario(directory)
    except* Exception as errors:
        well, told = False, f"NOT WELL: {_first(errors)}; logs in {directory}"
        (directory / "traceback").write_text("".join(traceback.format_exception(errors)))
    if well:
        shutil.rmtree(directory)
    print(f"| {name} | {who} | {told} |", flush=True)
    return well


def _first(errors: BaseExceptionGroup[BaseException]) -> str:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
