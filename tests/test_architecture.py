"""Imports point one way, and each heavy library has one doorway."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "crdt_llm"
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}

# What each room may import of the others. `__init__` at the top re-exports the client.
ALLOWED = {
    "errors": set(),
    "document": {"errors"},
    "store": {"errors"},
    "sync": {"errors", "document", "store"},
    "inference": {"errors", "document"},
    "conformance": {"errors", "document", "sync"},
    "cli": {"errors", "document", "store", "sync", "inference", "conformance"},
    "__init__": {"errors", "document", "sync"},
    "__main__": {"cli"},
}
# The same for the parts of a room. In `sync`, a relay and those who call it share the wire; in
# `inference`, who uses an engine, and the engine that is ours, meet in the contract and nowhere
# else. Whoever wires a node up, outside, brings them together.
PARTS = {
    "sync": {
        "__init__": set(),
        "wire": set(),
        "update": {"wire"},
        "transport": {"wire"},
        "client": {"transport", "update", "wire"},
        "node": {"transport", "wire"},
        "room": {"update", "wire"},
        "relay": {"room", "wire"},
    },
    "inference": {
        "__init__": set(),
        "contract": set(),
        "models": set(),
        "kv": set(),
        "forward": {"contract", "kv"},
        "engine": {"contract", "kv", "forward"},
        "prompt": {"models"},
        "node": {"contract", "prompt"},
        "replay": {"contract", "prompt", "node"},
    },
}
DOORWAYS = {
    "pycrdt": {"document"},
    "websockets": {"sync", "conformance"},  # the suite shares no connection with what it tries
    "torch": {"inference"},
    "transformers": {"inference"},
    "tokenizers": {"inference"},
    "prometheus_client": {"sync"},
    "jwt": {"sync"},
    "sqlite3": {"store", "cli"},  # `cli` reads a log beside the process that writes it
    "prompt_toolkit": {"cli"},
    "typer": {"cli"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "crdt_llm" and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] in ALLOWED[room] | {room}, f"{path} imports {name}"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if room_of(path) in PARTS],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_parts_of_a_room_import_one_way(path: Path) -> None:
    room, part = (name.removesuffix(".py") for name in path.relative_to(PACKAGE).parts[:2])
    for name in imported(path):
        parts = name.split(".")
        if parts[:2] == ["crdt_llm", room] and len(parts) > 2:
            assert parts[2] in PARTS[room][part] | {part}, f"{path} imports {name}"


# In `sync` a room, its peers, its seats and its judge hold each other, and name each other's types.
@pytest.mark.parametrize("room", ["document", "store", "inference", "conformance", "cli"])
def test_no_modules_import_each_other_in_a_circle(room: str) -> None:
    """Not for their types either: whoever reads one of a circle has to read them all."""
    files = {module_of(path): path for path in (PACKAGE / room).rglob("[!_]*.py")}
    imports = {name: imported(path) & files.keys() for name, path in files.items()}
    order = tuple(TopologicalSorter(imports).static_order())  # raises CycleError, which names it
    assert set(order) == files.keys()


@pytest.mark.parametrize("part", sorted(PARTS["inference"].keys() - {"__init__", "contract"}))
def test_a_part_of_inference_says_what_is_where(part: str) -> None:
    folder = PACKAGE / "inference" / part
    says = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    modules = {path.name.removesuffix(".py") for path in folder.glob("[!_]*")}
    assert modules <= set(says.split("``")[1::2]), "not all modules are on the map"


@pytest.mark.parametrize("library", DOORWAYS)
def test_each_heavy_library_has_one_doorway(library: str) -> None:
    users = {
        room_of(path)
        for path in MODULES
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert users <= DOORWAYS[library]
    assert users, f"nobody imports {library}: is the table stale?"


@pytest.mark.parametrize("module", ["crdt_llm", "crdt_llm.cli", "crdt_llm.sync.client.client"])
def test_a_client_never_loads_torch(module: str) -> None:
    heavy = "('torch', 'transformers')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(  # noqa: S603 - our own interpreter on our own code
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_module_says_what_it_owns() -> None:
    for path in MODULES:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path} has no docstring"
