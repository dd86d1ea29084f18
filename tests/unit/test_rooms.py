"""Imports point one way: between the rooms of the daemon, and between all files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
FILES = {".".join(file.relative_to(SRC).with_suffix("").parts): file for file in SRC.rglob("*.py")}

_HOST = {"host", "kernel"}
_PLAIN = _HOST | {"monitor"}
_KNOWN = _PLAIN | {"near", "record", "known"}
_RELAYED = _KNOWN | {"relayed"}
_MIGRATION = _RELAYED | {"recovery", "migration"}
_SUCCESSION = _MIGRATION | {"far", "roles"}
_VM = _SUCCESSION | {"succession", "meeting", "kept", "options", "vm"}
MAY_IMPORT: dict[str, set[str]] = {
    "host": set(),
    "kernel": {"host"},
    "kept": _HOST,
    "monitor": _HOST | {"kept"},
    "far": _HOST,
    "tunnel": _PLAIN | {"far"},
    "near": _PLAIN | {"kept"},
    "record": _HOST,
    "known": _PLAIN | {"near", "record"},
    "options": {"monitor", "known"},
    "relayed": _KNOWN,
    "recovery": _RELAYED,
    "migration": _RELAYED | {"recovery"},
    "roles": _MIGRATION | {"far"},
    "succession": _SUCCESSION,
    "meeting": _SUCCESSION | {"succession"},
    "vm": _VM,
    "telling": _VM,
    "uses": {"monitor", "options"},
    "wanted": {"uses", "options"},
    "fleet": _VM | {"wanted"},
    "finder": _VM | {"fleet"},
    "hand_overs": _VM | {"fleet"},
    "app": _VM | {"telling", "fleet", "finder", "hand_overs"},
}
"""What each room of the daemon, and each file above them, may import besides itself."""


TREES = {module: ast.parse(file.read_text()) for module, file in FILES.items()}


def named(module: str) -> Iterator[str]:
    """What a file imports, also where for its types alone."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


IMPORTS = {module: frozenset(named(module)) for module in FILES}


def room(module: str) -> str | None:
    """The daemon's room, or the file above them, that a module is; None for one that is not the daemon's."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["refault", "daemon"] and parts[2:] not in ([], ["__init__"]) else None


def test_there_is_no_circle_of_files() -> None:
    graph = {module: imported & FILES.keys() for module, imported in IMPORTS.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(FILES)


def test_the_rooms_of_the_daemon_import_one_way() -> None:
    wrong = [
        (module, imported)
        for module in FILES
        if (here := room(module)) is not None
        for imported in IMPORTS[module]
        if (there := room(imported)) is not None and there not in MAY_IMPORT[here] | {here}
    ]
    assert wrong == []


def test_nobody_below_it_reaches_through_the_migration() -> None:
    """Each takes what it needs: who is handed the whole can be tested with the whole alone."""
    may = {here for here, imports in MAY_IMPORT.items() if "migration" in imports}
    reaching = {
        module
        for module, tree in TREES.items()
        if (here := room(module)) is not None and here not in may
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (getattr(node.value, "id", None) or getattr(node.value, "attr", None))
        in ("migration", "_migration")
    }
    assert reaching == set()


@pytest.mark.parametrize("package", ["qmp", "migration", "session"])
def test_the_rules_do_no_input_or_output(package: str) -> None:
    """Bytes and events in, bytes and actions out."""
    does = {"trio", "socket", "os", "time", "asyncio", "select", "subprocess", "pathlib"}
    for module in FILES:
        if module.startswith(f"refault.{package}."):
            assert not {name.split(".")[0] for name in IMPORTS[module]} & does, module
            assert not any(name.startswith("refault.daemon") for name in IMPORTS[module]), module


OF_OTHERS = {"deadline", "shield", "exc_info", "handlers", "msg", "args", "stderr"}
"""What trio, logging and sys have their users set."""


def written(tree: ast.AST) -> Iterator[ast.Attribute]:
    """The attributes that a file assigns to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node


def declared(tree: ast.AST) -> Iterator[str]:
    """The attributes that are of a file's own classes."""
    for node in written(tree):
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr
    for each in ast.walk(tree):
        if isinstance(each, ast.ClassDef):
            yield from (
                field.target.id
                for field in each.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            )


def test_nobody_in_the_daemon_writes_what_another_file_has() -> None:
    """A call does."""
    wrong = [
        (module, node.lineno, ast.unparse(node))
        for module, tree in TREES.items()
        if room(module) is not None
        for own in [OF_OTHERS.union(declared(tree))]
        for node in written(tree)
        if node.attr not in own
    ]
    assert wrong == []
