"""VMs that are found by where their QEMUs' sockets are: a pattern of paths, and what is made of each."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refault.config import values
from refault.config.options import WrongOptionError, vm_options
from refault.daemon.options import VmOptions

PLACEHOLDERS = ("dir", "parent", "file", "stem")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_WILD = re.compile(r"\*+|\?|\[[^]]*\]")


@dataclass(frozen=True)
class Watch:
    """One [[watch]].

    In `listen` and `name` stand, for the socket that was found, {dir}: its directory's path, {parent}: that
    directory's name, {file}: its own name, {stem}: that without what follows its last dot.
    """

    pattern: str
    """A whole path, with *, ? and [abc] in any of its parts; none of them stands for a slash."""
    listen: tuple[str, ...]
    name: str
    common: tuple[tuple[str, Any], ...]
    """The other options, as they are read."""
    state_dir: Path

    def __str__(self) -> str:
        return f"{self.name}: {self.pattern} on {', '.join(self.listen)}"

    @staticmethod
    def made(given: Mapping[str, Any], state_dir: Path) -> Watch:
        """From the values of a table. Raises WrongOptionError."""
        rest = dict(given)
        pattern, listen = rest.pop("qemu").removeprefix("unix:"), rest.pop("listen")
        watch = Watch(pattern, listen, rest.pop("name", "{stem}"), tuple(sorted(rest.items())), state_dir)
        if not pattern.startswith("/") or pattern.endswith("/") or "//" in pattern:
            text = f"{pattern!r} is not a pattern of paths such as /run/qemu/*.real"
            raise WrongOptionError("qemu", text)
        for name in PLACEHOLDERS:
            if f"{{{name}}}" in pattern:
                text = f"{{{name}}} stands for something in listen and name alone; here stand *, ? and [abc]"
                raise WrongOptionError("qemu", text)
        sample = _WILD.sub("x", pattern)
        for address in watch.vm(sample).listen:
            if address.path is not None and not address.abstract and watch.matches(address.path):
                raise WrongOptionError(
                    "listen", f"{address.path} would itself be found by {pattern}, as {sample} is"
                )
        return watch

    def matches(self, path: str) -> bool:
        """Whether the pattern finds this path."""
        parts, wanted = path.split("/"), self.pattern.split("/")
        return len(parts) == len(wanted) and all(
            fnmatch.fnmatchcase(part, each) and not (part.startswith(".") and not each.startswith("."))
            for part, each in zip(parts, wanted, strict=True)
        )

    def vm(self, path: str) -> VmOptions:
        """The VM whose QEMU's socket is at `path`. Raises WrongOptionError."""
        directory, file = os.path.split(path)
        stands_for = {
            "dir": directory.rstrip("/"),
            "parent": os.path.basename(directory),
            "file": file,
            "stem": file.rpartition(".")[0] or file,
        }
        try:
            name = values.vm_name(_filled("name", self.name, stands_for))
        except ValueError as error:
            raise WrongOptionError("name", _text(error)) from error
        escaped = {key: value.replace(",", ",,") for key, value in stands_for.items()}
        given = dict(self.common)
        try:
            given["listen"] = tuple(
                values.listen_address(_filled("listen", text, escaped)) for text in self.listen
            )
        except ValueError as error:
            raise WrongOptionError("listen", _text(error)) from error
        try:
            given["qemu"] = values.qemu_address(f"unix:{path.replace(',', ',,')}")
        except ValueError as error:
            raise WrongOptionError("qemu", _text(error)) from error
        return vm_options(name, given, self.state_dir / name)


def _text(error: ValueError) -> str:
    return error.text if isinstance(error, WrongOptionError) else str(error)


def _filled(key: str, text: str, stands_for: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in stands_for:
            allowed = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise WrongOptionError(key, f"{match[0]} stands for nothing; there are {allowed}")
        return stands_for[match[1]]

    return _PLACEHOLDER.sub(value, text)
