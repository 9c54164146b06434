"""The files of the package import each other in one direction."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "nnunetv2_e2enet": "nnunetv2_e2enet",
    "trainers": "nnunetv2_e2enet.trainers",
    "planners": "nnunetv2_e2enet.planners",
}


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Of each module the modules among ``sources`` that it imports, at its start, in functions, or for type checkers."""
    return {name: set(imported(source, sources)) - {name} for name, source in sources.items()}


def imported(source: str, known: Iterable[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "ruff asks for absolute imports"
            for alias in node.names:
                names = (f"{node.module}.{alias.name}", str(node.module))  # a module of a package, else a name in a module
                yield from [name for name in names if name in known][:1]


def package() -> dict[str, str]:
    """The sources of the package, by name of the module."""
    sources = {}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            sources[".".join([package, *(part for part in parts if part != "__init__")])] = file.read_text()
    return sources


def test_no_circle_between_python_files() -> None:
    order = list(TopologicalSorter(graph(package())).static_order())
    assert order.index("nnunetv2_e2enet.errors") < order.index("nnunetv2_e2enet.network.e2enet")


def test_a_circle_is_found() -> None:
    sources = {"a": "def f():\n    from b import g", "b": "if TYPE_CHECKING:\n    import c", "c": "from a import f"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph(sources)).prepare()


def folder_of(module: str) -> str:
    """The folder of the package that a module lies in; empty for the modules above the folders."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and not (ROOT / "nnunetv2_e2enet" / f"{parts[1]}.py").exists() else ""


def test_folders_import_what_contributing_says() -> None:
    """The table lists each folder below those that it may import."""
    rows = re.findall(r"^\| (`[^|]+) \|[^|]+\| ([^|]*) ?\|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    allowed: dict[str, set[str]] = {}
    for folders, imports in rows:
        above = set(allowed)
        may = above if imports.strip() == "all" else set(re.findall(r"`(\w+)`", imports))
        assert may <= above, f"{folders} imports what stands below it"
        allowed.update((name, may) for name in re.findall(r"(\w+)`", folders))
    modules = graph(package())
    assert {folder_of(name) for name in modules} - {""} <= set(allowed)
    for name, others in modules.items():
        own = folder_of(name)
        known = {folder_of(other) for other in others} - {"", own}
        assert known <= allowed.get(own, set()), name


def test_network_and_dsff_know_nothing_of_nnunet() -> None:
    for name, source in package().items():
        if name.split(".")[1:2] in (["network"], ["dsff"]):
            assert not list(imported(source, ["nnunetv2", "batchgenerators"])), name
            assert "import nnunetv2." not in source, name
            assert "from nnunetv2." not in source, name
