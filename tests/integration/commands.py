"""Runs console commands and keeps their logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


class StepError(Exception):
    """A step of the workflow did not do what it should; said in one line."""


@dataclass
class Runner:
    """A process that runs console commands of this Python environment, one at a time; see ``forking.py``.

    Attributes:
        environment: of the commands, beside that of this process.
    """

    environment: dict[str, str]

    def __enter__(self) -> Runner:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.forking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **one_thread, **self.environment},
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

    def run(
        self, log: Path, *command: str | Path, environment: dict[str, str] | None = None, killed_by: Path | None = None
    ) -> None:
        """Run one command to its end, output appended to ``log``.

        Args:
            environment: to add to that of all commands.
            killed_by: a file; as soon as it appears, the command and all that it started are killed (SIGKILL).

        Raises:
            StepError: it failed, or ended before it could be killed.
        """
        assert self._process.stdin is not None
        words = [str(word) for word in command]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            print("$", *words, file=file)
        request = {
            "command": [str(Path(sys.executable).with_name(words[0])), *words[1:]],
            "environment": {**os.environ, **self.environment, **(environment or {})},
            "log": str(log),
            "killed_by": str(killed_by) if killed_by else None,
        }
        print(json.dumps(request), file=self._process.stdin)
        code = int(self._answer())
        expected = -9 if killed_by else 0
        if code != expected:
            raise StepError(f"{words[0]} ended with exit code {code}, but {expected} was expected")
