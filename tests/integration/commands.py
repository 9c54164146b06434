"""Runs console commands and keeps their logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType


class StepError(Exception):
    """A step of the workflow did not do what it should; said in one line."""


ONE_PROCESS = {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# glibc gives large tensors back to the system as soon as they are freed, and the system clears the memory for the next ones
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)}


class Runner:
    """Runs console commands of this Python environment, each in a process of its own, as a user does."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        """There is nothing to end."""

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
        words = [str(word) for word in command]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            print("$", *words, file=file)
        script = [str(Path(sys.executable).parent / words[0]), *words[1:]]
        return self._execute(script, log, {**os.environ, **ONE_THREAD, **ONE_PROCESS, **environment}, killed_by)

    def _execute(self, command: list[str], log: Path, environment: dict[str, str], killed_by: Path | None) -> int:
        with log.open("a") as output:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=killed_by is not None,  # else it ends with this process, as after Ctrl-C
            )
        while killed_by and not killed_by.exists() and process.poll() is None:
            time.sleep(0.005)
        if killed_by and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


class ForkingRunner(Runner):
    """Runs them in forks of one process that has imported nnU-Net: fast, and not quite as a user does, see ``forking.py``."""

    def __enter__(self) -> ForkingRunner:
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

    def _execute(self, command: list[str], log: Path, environment: dict[str, str], killed_by: Path | None) -> int:
        assert self._process.stdin is not None
        killer = str(killed_by) if killed_by else None
        request = {"command": command, "environment": environment, "log": str(log), "killed_by": killer}
        print(json.dumps(request), file=self._process.stdin)
        return int(self._answer())
