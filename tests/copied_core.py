"""A copy of the package whose core was built in another way, and tests that run with it in a process of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nnunetv2_e2enet
from nnunetv2_e2enet import engine

REPOSITORY = Path(__file__).resolve().parents[1]
ENGINE_TESTS = ("test_engine.py", "test_engine_choice.py", "test_engine_training.py", "test_engine_training_halves.py")


def copy_with_core(folder: Path, compiler: str, *options: str) -> None:
    """The package in ``folder``, its core built with the options of pyproject.toml but for the level of optimisation."""
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml, which Python does from 3.11")
    copied = folder / "nnunetv2_e2enet"
    shutil.copytree(Path(nnunetv2_e2enet.__file__).parent, copied, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (extension,) = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    core = engine.load_core()
    assert not isinstance(core, str)
    given = [option for option in extension["extra-compile-args"] if not option.startswith("-O")]
    sources = [str(REPOSITORY / source) for source in extension["sources"]]
    command = [compiler, "-shared", "-fPIC", *given, *options, *extension["extra-link-args"], *sources]
    subprocess.run([*command, "-o", str(copied / "engine" / core.path.name)], check=True)


def run_in_copy(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    check = f"from nnunetv2_e2enet import engine; assert str(engine.load_core().path).startswith({str(folder)!r})\n"
    command = [sys.executable, "-c", check + code]  # "" is first in the path: the copy is imported
    variables = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def run_tests_in_copy(
    folder: Path, files: tuple[str, ...], chosen: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The tests of these files that ``-k`` chooses, all of which pass; without slow ones and the fixtures of conftest.py."""
    tests = REPOSITORY / "tests"
    options = ["-q", "-x", "--capture=sys", "--noconftest", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen]
    options += [str(tests / name) for name in files]
    code = f"import pytest, sys; sys.path.append({str(tests)!r}); import setting_fixture\n"
    code += f"sys.exit(pytest.main({options!r}, plugins=[setting_fixture]))"
    result = run_in_copy(folder, code, **environment)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    assert re.search(r"\d passed", result.stdout)
    return result
