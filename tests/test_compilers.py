"""The core as another compiler builds it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from copied_core import ENGINE_TESTS, REPOSITORY, copy_with_core, run_tests_in_copy

from nnunetv2_e2enet import engine

SOURCES = REPOSITORY / "nnunetv2_e2enet" / "engine" / "native"  # a wheel has none


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++ and its OpenMP")
@pytest.mark.skipif(isinstance(engine.load_core(), str), reason="the compiled core was not built")
def test_clang(tmp_path: Path) -> None:
    copy_with_core(tmp_path, "clang++", "-O3", "-Werror")
    run_tests_in_copy(tmp_path, ENGINE_TESTS, "not leak and not two_processes and not peak")
    run_tests_in_copy(tmp_path, ("test_prediction.py",), "export or threshold or probabilities_are")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs a compiler for x86-64")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("source", ["scan.cpp", "scan_avx2.cpp"])
def test_products_of_scans_are_rounded_on_any_build(source: str) -> None:
    """As nnU-Net rounds them, also where the flags of a build allow products that are fused with a sum."""
    command = ["g++", "-std=c++17", "-O3", "-fopenmp", "-march=haswell", "-S", "-o", "-", str(SOURCES / source)]
    compiled = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "mulps" in compiled
    assert "fmadd" not in compiled
