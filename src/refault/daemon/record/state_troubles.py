"""What went wrong with a VM's state files: counted, and kept for as long as it is so."""

from __future__ import annotations


class StateTroubles:
    """Of one VM, since the daemon started. A file that is written again is trouble no more."""

    def __init__(self) -> None:
        self.count = 0
        """Times that a file could not be written, read or removed."""
        self.torn = 0
        """Page requests that an earlier refault's file had and that could not be read again."""
        self._now: dict[str, str] = {}

    def add(self, file: str, error: str) -> None:
        """Something failed with `file`, with this error."""
        self.count += 1
        self._now[file] = error

    def fail(self) -> None:
        """Something failed that does not last."""
        self.count += 1

    def tear(self, requests: int) -> None:
        """So many page requests of an earlier refault's file could not be read again."""
        self.torn += requests

    def over(self, file: str) -> None:
        """What is in `file` is as it should be, or there is no need of it any more."""
        self._now.pop(file, None)

    @property
    def error(self) -> str | None:
        """What a restarted refault would not know of this migration now, and why; None where it knows all."""
        return "; ".join(self._now.values()) or None
