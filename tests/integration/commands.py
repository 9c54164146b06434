"""Runs console commands and keeps their logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType


class StepError(Exception):
    """A step of the workflow did not do what it should; said in one line."""


ONE_PROCESS = {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# glibc gives large tensors back to the system as soon as they are freed, and the system clears the memory for the next ones
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)}


class Runner:
    """A process that runs console commands of this Python environment, one at a time; see ``forking.py``."""

    def __enter__(self) -> Runner:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.forking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **ONE_THREAD, **ONE_PROCESS, **KEPT_MEMORY},
            cwd=Path(__file__).parents[1],
        )
        self._answer()
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise StepError("the process that runs the commands has ended")
        return line

    def run(self, log: Path, *command: str | Path, environment: dict[str, str], killed_by: Path | None = None) -> None:
        """Run one command to its end, output appended to ``log``.

        Args:
            environment: beside that of this process; nnU-Net's folders.
            killed_by: a file; as soon as it appears, the command and all that it started are killed (SIGKILL).

        Raises:
            StepError: it failed, or ended before it could be killed.
        """
        code = self.exit_code(log, *command, environment=environment, killed_by=killed_by)
        expected = -9 if killed_by else 0
        if code != expected:
            raise StepError(f"{command[0]} ended with exit code {code}, but {expected} was expected")

    def exit_code(self, log: Path, *command: str | Path, environment: dict[str, str], killed_by: Path | None = None) -> int:
        """As ``run``, but whatever becomes of the command is for the caller to judge; -9 if it was killed."""
        assert self._process.stdin is not None
        words = [str(word) for word in command]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            print("$", *words, file=file)
        request = {
            "command": [str(Path(sys.executable).parent / words[0]), *words[1:]],
            "environment": {**os.environ, **ONE_THREAD, **ONE_PROCESS, **environment},
            "log": str(log),
            "killed_by": str(killed_by) if killed_by else None,
        }
        print(json.dumps(request), file=self._process.stdin)
        return int(self._answer())
