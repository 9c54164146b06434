"""What the tests call: nnU-Net's console commands and networks of a known size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

AMOS_STRIDES = [[1, 1, 1], [1, 2, 2]] + [[2, 2, 2]] * 4


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def run_command(*command: str, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A console command of this environment; its output is in the message if it fails."""
    result = subprocess.run(
        [program(command[0]), *command[1:]],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if check and result.returncode:
        pytest.fail(f"{' '.join(command)} ended with exit code {result.returncode}:\n{result.stdout[-6000:]}")
    return result


def nnunet_environment(folder: Path) -> dict[str, str]:
    folders = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    return {**folders, "nnUNet_def_n_proc": "2", "nnUNet_n_proc_DA": "2"}
