"""One table of a file: its keys and their values against what may stand there (options.py)."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, get_args

import msgspec

from refault.config.options import Field, address_of, fields_of
from refault.daemon.host.errors import must_be_one_line

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def decode(table: object, kind: type[msgspec.Struct]) -> tuple[dict[str, Any], list[str]]:
    """The values of a table that are given, as the daemon takes them; a line for each thing that is wrong,
    with which none of them is good for anything."""
    if not isinstance(table, dict):
        return {}, [f"is a table, {_told(table)} is none"]
    known = fields_of(kind)
    given: dict[str, Any] = {}
    wrong = [
        f"{key_as_written(key)}: {_not_known(key, table[key], known)}" for key in table if key not in known
    ]
    unknown = bool(wrong)  # it may be the one that is missed
    for key, field in known.items():
        if key in table:
            try:
                given[key] = _value(table[key], field)
            except ValueError as error:
                wrong.append(f"{key}: {error}")
        elif field.required and not unknown:
            wrong.append(f"{key}: must be there: {field.option.help}")
    return given, wrong


def _value(written: object, field: Field) -> object:
    """What is written as the daemon takes it. Raises ValueError."""
    for text in written if isinstance(written, list) else [written]:
        if isinstance(text, str):
            must_be_one_line(text)
    if field.option.table is not None:
        kind = field.option.table
        if isinstance(written, list):
            written = [_without_table(each, kind) for each in written]
        else:
            written = _without_table(written, kind)
    try:
        plain = msgspec.convert(written, field.kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{_told(written)} is not {_allowed(field)}") from error
    if field.repeats and not plain:
        raise ValueError("is empty: name at least one, or leave it out")
    return field.read(plain)


def _without_table(written: object, kind: type[msgspec.Struct]) -> object:
    if not isinstance(written, dict):
        return written
    given, wrong = decode(written, kind)
    if wrong:
        raise ValueError("; ".join(wrong))
    return address_of(given)


def _allowed(field: Field) -> str:
    if field.choices:
        return " or ".join(map(json.dumps, field.choices))
    if field.kind is bool:
        return "true or false"
    if field.option.table is not None:
        return "an address in quotes, a table of it and its options, or a list of such"
    if field.repeats:
        return "a text in quotes, or a list of such"
    return "a number" if float in get_args(field.kind) else "a text in quotes"


def _not_known(key: str, value: object, known: Mapping[str, Field]) -> str:
    if isinstance(value, dict) and "qemu" in known:
        return f'a table; a name with a dot is written in quotes, as [vm."a.{key}"]'
    near = difflib.get_close_matches(key, known, n=1)
    meant = f", {near[0]} may be meant" if near else ""
    return f"not known{meant}; what may stand here: {', '.join(known)}"


def _told(value: object) -> str:
    """As it could be written in the file."""
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list" if len(value) > 3 else f"[{', '.join(map(_told, value))}]"
    return str(value)


def key_as_written(name: str) -> str:
    """A key as it is written, without what would begin another line."""
    return name if _BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False)
