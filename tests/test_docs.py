"""The documentation: links lead somewhere, commands exist, docstrings have subjects, the site builds without a warning."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from support import Project, architecture, program, untrained_model
from torch import nn

from nnunetv2_e2enet.cli.main import build_parser
from nnunetv2_e2enet.deployment import write_packed
from nnunetv2_e2enet.network import E2ENet, maskable_layers

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SHELL = {"export", "cd", "mkdir", "ls", "jq", "pip", "#"}
"""First words of lines that are not the project's business."""


def test_make_removes_no_folder_that_a_variable_happens_to_name() -> None:
    """The environment of a user may have one of these names; the command line means what it says."""
    named = {name: f"/home/ann/{name}" for name in ("VENV", "DEMO", "INTEGRATION")}
    for given in ({}, named):
        command = ["make", "-n", "clean", "demo", "test-integration", *(f"{name}={value}" for name, value in given.items())]
        made = subprocess.run(command, cwd=ROOT, env={**os.environ, **named}, capture_output=True, text=True, check=True)
        removed = [line for line in made.stdout.splitlines() if line.startswith("rm ")]
        assert len(removed) == 3
        assert all(("/home/ann" in line) == bool(given) for line in removed)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {target}"


def anchors(page: Path) -> set[str]:
    """As MkDocs and GitHub make them of headings in English."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist_with_their_options(page: Path) -> None:
    for line in commands(page.read_text()):
        check(line, f"{page.name}: {line}")


@pytest.mark.parametrize(
    "line",
    [
        "e2enet compare A B --bogus",
        "e2enet bogus",
        "nnUNetv2_train 4 3d_fullres 0 --bogus",
        "make bogus",
        "python benchmarks/bogus.py",
        "bogus",
    ],
)
def test_a_command_that_is_not_there_is_found(line: str) -> None:
    with pytest.raises(AssertionError):
        check(line, line)


ALONE = {
    "e2enet register": "test_registration.py::test_console_commands_are_idempotent",
    "e2enet info": "test_registration.py::test_nnunet_finds_every_class",
    "e2enet demo": "test_demo.py::test_demo",
    "e2enet completion": "test_main.py::test_completion",
    "pip install": "test_installation.py::test_new_environment",
    "make docs": "test_docs.py::test_the_site_builds_without_a_warning",
    ".venv/bin/pytest tests/test_dsff.py": "test_dsff.py::test_cosine_schedule",
}
"""Commands that need nothing, each with the test that runs it."""
DEVELOPMENT = re.compile(r"make (install|lint|test|demo|coverage|test-slow)$|\.venv/bin/(pip install )?pre-commit")
"""Commands that .ci/run runs, or that take longer than a test."""
DATA = re.compile(
    r"\s-[dim] |\b(MODEL_)?FOLDER\b|\bD\b|\b4 3d_fullres|Task04|Dataset004|\$\w*nnUNet_|nnUNet_\w+="
    r"|hippocampus|checkpoint_final|images|segmentations"
)
"""What stands for data, a model or a folder of the reader's."""


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_run_in_a_test_or_name_their_data(page: Path) -> None:
    for line in commands(page.read_text()):
        assert DATA.search(line) or DEVELOPMENT.match(line) or any(line.startswith(start) for start in ALONE), line


def test_the_tests_that_run_commands_are_there() -> None:
    for name in ALONE.values():
        file, function = name.split("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), name


def test_python_code_runs(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of every page, with a network, a model and a scan for it; see also test_extending.py."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(next(project.raw.glob("imagesTr/*.nii.gz")), "scan.nii.gz")
    write_packed(Path("hippocampus.e2enet"), untrained_model(project)[0])
    sizes = {"n_stages": 3, "features_per_stage": [4, 8, 16], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}
    ours = E2ENet(1, num_classes=3, conv_op=nn.Conv3d, learned_shift=True, **sizes)
    stock = get_network_from_plans(*architecture(sizes["features_per_stage"], sizes["strides"]).values(), 1, 3)
    n_blocks = 0
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            n_blocks += 1
            names = {"__name__": f"block_{n_blocks}", "network": stock if "make_maskable" in block else ours}
            exec(compile(block, str(page), "exec"), names)
    assert n_blocks == 9
    assert Path("segmentation.nii.gz").is_file()
    assert all(layer.stores_active_only for _, layer in maskable_layers(ours))
    assert any(maskable_layers(stock))


def commands(text: str) -> Iterator[str]:
    """Of the blocks for a shell, without what follows a pipe or a redirection; lines that ``\\`` continues are joined."""
    for block in re.findall(r"^```(?:bash|sh|shell)[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in re.sub(r"(^|\s)#.*", "", line).split(" && "):
                command = re.split(r"\s(?:\||>>?|2>)\s", part)[0].strip()
                if command:
                    yield command


def check(line: str, where: str) -> None:
    """Options are looked at, values are not: many are placeholders. Settings of variables before the command are left out."""
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        words.pop(0)
    if not words:
        return
    name = Path(words[0]).name
    if name == "e2enet":
        parses(["--help"] if words[1:] == [] else words[1:], where)
    elif name.startswith("nnUNetv2_"):
        source = source_of(name)
        missing = [word for word in words[1:] if re.match(r"--?[a-zA-Z]", word) and f"'{word}'" not in source]
        assert not missing, where
    elif name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert all(word in targets for word in words[1:] if re.fullmatch(r"[a-z-]+", word)), where
    elif name in ("python", "python3", "pytest"):
        assert all(
            (ROOT / word).exists() for word in words[1:] if re.fullmatch(r"(tests|benchmarks|docs)/[\w/]+\.py", word)
        ), where
    else:
        assert name in SHELL or (ROOT / words[0]).exists() or name in ("pre-commit", "accelerate"), f"{where}: {name}"


def parses(arguments: list[str], where: str) -> None:
    """The subcommand is there, and each option is one of its own."""
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    if arguments[0].startswith("-"):
        return
    assert arguments[0] in subparsers.choices, where
    known = subparsers.choices[arguments[0]]._option_string_actions
    unknown = [word for word in arguments[1:] if re.match(r"--?[a-zA-Z]", word) and word.split("=")[0] not in known]
    assert not unknown, f"{where}: {unknown}"


@lru_cache
def source_of(command: str) -> str:
    """The program of one of nnU-Net's commands."""
    (point,) = entry_points(group="console_scripts", name=command)
    spec = find_spec(point.module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text().replace('"', "'")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    site = tmp_path / "site"
    command = [program("mkdocs"), "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an announcement, not a warning about these pages
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    assert "score" in (site / "api" / "dsff" / "index.html").read_text()
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]* src="(https?:[^"]+)"|<link[^>]*stylesheet[^>]* href="(https?:[^"]+)"',
            page.read_text(),
        )
        assert not loaded, f"{page} loads {loaded}"
    described = {
        name for page in site.glob("api/*/*.html") for name in re.findall(r'id="(nnunetv2_e2enet[\w.]+)"', page.read_text())
    }
    assert set(imported_by_the_pages()) <= described


def imported_by_the_pages() -> Iterator[str]:
    """Names of this package that Python code in the documentation imports."""
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nnunetv2_e2enet"):
                    yield from (f"{node.module}.{alias.name}" for alias in node.names)


SUBJECTLESS = re.compile(r"(Before|By|From|In|Of|Over|Their|Those|What|When|Where|Which|With|Within|Without)\b")
"""First words of docstrings that have no subject."""
SOURCES = [
    *(f"nnunetv2_e2enet/{name}" for name in ("datasets", "dsff", "engine", "network", "training", "*.py")),
    *(f"nnunetv2_e2enet/cli/{name}" for name in ("[!p]*.py", "phantom.py", "plan.py")),
    "planners",
    "trainers",
]


@pytest.mark.parametrize("source", SOURCES)
def test_docstrings_have_a_subject(source: str) -> None:
    """Those of modules, classes, functions and constants."""
    found = [file for path in ROOT.glob(source) for file in (path.rglob("*.py") if path.is_dir() else [path])]
    assert found
    for file in found:
        for line, text in docstrings(file.read_text()):
            assert not SUBJECTLESS.match(text), f"{file}:{line}: {text.splitlines()[0]}"


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Strings that are statements of their own, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def test_a_docstring_without_a_subject_is_found() -> None:
    source = '"""The module."""\nWIDTH = 3\n"""Of a map."""\ndef f():\n    """Offset."""'
    assert [bool(SUBJECTLESS.match(text)) for _, text in docstrings(source)] == [False, True, False]
