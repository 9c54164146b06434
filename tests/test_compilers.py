"""The core as another compiler builds it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from copied_core import ENGINE_TESTS, copy_with_core, run_tests_in_copy

from nnunetv2_e2enet import engine


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++ and its OpenMP")
@pytest.mark.skipif(isinstance(engine.load_core(), str), reason="the compiled core was not built")
def test_clang(tmp_path: Path) -> None:
    copy_with_core(tmp_path, "clang++", "-O3", "-Werror")
    run_tests_in_copy(tmp_path, ENGINE_TESTS, "not leak and not two_processes and not peak")
    run_tests_in_copy(tmp_path, ("test_prediction.py",), "export or threshold or probabilities_are")
