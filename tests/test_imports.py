"""The files of the package import each other in one direction."""

from __future__ import annotations

import ast
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


@pytest.mark.parametrize(
    ("importing", "unknown"),
    [
        (
            "network",
            {"dsff", "training", "deployment", "prediction", "evaluation", "engine", "kernels", "cli", "trainers", "planners"},
        ),
        ("dsff", {"training", "deployment", "prediction", "evaluation", "engine", "kernels", "cli", "trainers", "planners"}),
        ("training", {"deployment", "evaluation", "cli", "trainers", "planners"}),
        ("evaluation", {"cli", "trainers", "planners"}),
    ],
)
def test_folders_know_nothing_of_those_above_them(importing: str, unknown: set[str]) -> None:
    """As the table of CONTRIBUTING.md says."""
    for name, others in graph(package()).items():
        if name.split(".")[1:2] == [importing]:
            assert not {other for other in others if (other.split(".")[1:2] or [""])[0] in unknown}, name


def test_network_and_dsff_know_nothing_of_nnunet() -> None:
    for name, source in package().items():
        if name.split(".")[1:2] in (["network"], ["dsff"]):
            assert not list(imported(source, ["nnunetv2", "batchgenerators"])), name
            assert "import nnunetv2." not in source, name
            assert "from nnunetv2." not in source, name
