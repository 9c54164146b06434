"""The compiled core under the address and undefined behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from copied_core import ENGINE_TESTS, copy_with_core, run_in_copy, run_tests_in_copy

from nnunetv2_e2enet import engine

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"),
    pytest.mark.skipif(isinstance(engine.load_core(), str), reason="the compiled core was not built"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package whose core was built with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    copy_with_core(folder, "g++", *SANITIZERS)
    return folder


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """What the process needs in its environment."""
    # libstdc++ as well: the sanitizer looks for what throws exceptions when it starts, before Python has loaded it
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",  # Python itself leaks at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def test_the_sanitizer_sees_reads_out_of_bounds(sanitized: Path, settings: dict[str, str]) -> None:
    code = "import numpy as np; a = np.ones(99, np.uint8); print(engine.load_core().checksum(a.ctypes.data, {}, 1))"
    assert run_in_copy(sanitized, code.format(99), **settings).returncode == 0
    result = run_in_copy(sanitized, code.format(9999), **settings)
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr


def run_clean(folder: Path, files: tuple[str, ...], chosen: str, settings: dict[str, str]) -> None:
    result = run_tests_in_copy(folder, files, chosen, **settings)
    assert "Sanitizer" not in result.stderr
    assert "runtime error" not in result.stderr + result.stdout


def test_networks_of_all_kinds_run_clean(sanitized: Path, settings: dict[str, str]) -> None:
    """Tests of the engine, the property tests over topologies, strides and shapes among them.

    Slow ones are left out, and those of memory, processes and speed.
    """
    run_clean(sanitized, ENGINE_TESTS, "not leak and not two_processes and not peak", settings)


def test_whole_scans_run_clean(sanitized: Path, settings: dict[str, str]) -> None:
    """Labels of random logits, and scans whose windows are summed, mirrored and divided."""
    run_clean(sanitized, ("test_prediction.py",), "not runs_out", settings)
