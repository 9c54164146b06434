"""Scripts that run as two processes and exchange gradients over gloo."""

import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SECONDS = 240  # after which a process that waits for the other says where, and ends


def run_both(script: Path, *folders: Path) -> None:
    """``script RANK FOLDERS`` for ranks 0 and 1, with one thread each; what they printed where one of them fails."""
    commands = [[sys.executable, str(script), str(rank), *map(str, folders)] for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    outputs = [rank.communicate(timeout=SECONDS + 60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output[-3000:] for output in outputs)


def run_rank(main: Callable[..., None]) -> None:
    """``main(rank, *folders)`` with the arguments of such a script.

    The process ends without the interpreter's clean-up, in which it can wait forever for PyTorch's own threads
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    main(int(sys.argv[1]), *map(Path, sys.argv[2:]))
    sys.stdout.flush()
    os._exit(0)
