"""The compiled core under the address and undefined behaviour sanitizers."""

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
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
ENGINE_TESTS = ("test_engine.py", "test_engine_choice.py", "test_engine_training.py", "test_engine_training_halves.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"),
    pytest.mark.skipif(isinstance(engine.load_core(), str), reason="the compiled core was not built"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package whose core was built with the sanitizers."""
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml, which Python does from 3.11")
    folder = tmp_path_factory.mktemp("sanitized")
    copied = folder / "nnunetv2_e2enet"
    shutil.copytree(Path(nnunetv2_e2enet.__file__).parent, copied, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (extension,) = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    core = engine.load_core()
    assert not isinstance(core, str)
    options = [option for option in extension["extra-compile-args"] if not option.startswith("-O")]
    sources = [str(REPOSITORY / source) for source in extension["sources"]]
    command = ["g++", "-shared", "-fPIC", *options, *SANITIZERS, *extension["extra-link-args"], *sources]
    subprocess.run([*command, "-o", str(copied / "engine" / core.path.name)], check=True)
    return folder


def run_sanitized(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    # libstdc++ as well: the sanitizer looks for what throws exceptions when it starts, before Python has loaded it
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    check = f"from nnunetv2_e2enet import engine; assert str(engine.load_core().path).startswith({str(folder)!r})\n"
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",  # Python itself leaks at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": "",
    }
    command = [sys.executable, "-c", check + code]  # "" is first in the path: the copy is imported
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_sanitizer_sees_reads_out_of_bounds(sanitized: Path) -> None:
    code = "import numpy as np; a = np.ones(99, np.uint8); print(engine.load_core().checksum(a.ctypes.data, {}, 1))"
    assert run_sanitized(sanitized, code.format(99)).returncode == 0
    result = run_sanitized(sanitized, code.format(9999))
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr


def run_tests_clean(folder: Path, files: tuple[str, ...], chosen: str) -> None:
    """The tests of these files that ``-k`` chooses, but for slow ones and without the fixtures of conftest.py."""
    tests = REPOSITORY / "tests"
    options = ["-q", "-x", "--capture=sys", "--noconftest", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen]
    options += [str(tests / name) for name in files]
    code = f"import pytest, sys; sys.path.append({str(tests)!r}); import setting_fixture\n"
    result = run_sanitized(folder, f"{code}sys.exit(pytest.main({options!r}, plugins=[setting_fixture]))")
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    assert re.search(r"\d passed", result.stdout)
    assert "Sanitizer" not in result.stderr
    assert "runtime error" not in result.stderr + result.stdout


def test_networks_of_all_kinds_run_clean(sanitized: Path) -> None:
    """All tests of the engine, the property tests over topologies, strides and shapes among them.

    Memory and speed are not measured.
    """
    run_tests_clean(sanitized, ENGINE_TESTS, "not leak and not two_processes and not peak")


def test_whole_scans_run_clean(sanitized: Path) -> None:
    """Labels of random logits, and scans of which windows are summed; commands and settings need fixtures of their own."""
    chosen = "(export or threshold or probabilities_are or memory) and not runs_out"
    run_tests_clean(sanitized, ("test_prediction.py",), chosen)
