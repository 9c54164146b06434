"""Console commands in processes forked from this one, which has imported the libraries: ``python -m integration.forking``.

A console command of nnU-Net spends most of a short run on imports, and so does each process of its pools. Here, libraries are
imported once. nnU-Net is among them: it looks up its folders in the environment when it needs them.

It differs from nnU-Net's console commands in processes of their own (``commands.Runner``) in three ways: the fingerprint of a
data set draws a hundredth of the intensities, ``multiprocessing.cpu_count`` says 1, and what nnU-Net spawns is forked.
docs/compatibility.md says so where its results come from this.

Requests are lines of JSON on standard input, see ``commands.py``; the answers on standard output are exit codes.
"""

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

LIBRARIES = (
    *("torch", "torch._dynamo", "scipy.ndimage", "SimpleITK", "matplotlib.pyplot", "pandas", "seaborn", "blosc2", "skimage"),
    *("nnunetv2.run.run_training", "nnunetv2.inference.predict_from_raw_data", "nnunetv2.experiment_planning"),
    *("nnunetv2.evaluation.find_best_configuration", "nnunetv2_e2enet.trainers.e2enet_demo_trainers"),
)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    for name in LIBRARIES:
        __import__(name)
    draw_fewer_intensities()
    gc.freeze()  # collections in the forks leave alone, and thereby do not copy, what is here
    print("ready", file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        print(wait(child, request["killed_by"]), file=answers)
    os._exit(0)  # see become


def draw_fewer_intensities() -> None:
    """nnU-Net's fingerprint of a data set draws 10^8 intensities, however few voxels there are; here a hundredth of them."""
    initialize = DatasetFingerprintExtractor.__init__

    def initialize_small(extractor: DatasetFingerprintExtractor, *arguments: Any, **options: Any) -> None:
        initialize(extractor, *arguments, **options)
        extractor.num_foreground_voxels_for_intensitystats /= 100

    DatasetFingerprintExtractor.__init__ = initialize_small


def wait(child: int, killed_by: str | None) -> int:
    """The exit code of a process; if a file is named, it is killed, with all that it started, as soon as that appears."""
    while killed_by and not Path(killed_by).exists():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.005)
    if killed_by:
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def become(request: dict[str, Any]) -> NoReturn:
    """Turn this process, just forked, into that of a console command."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, target)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["environment"])
    multiprocessing.cpu_count = lambda: 1  # nnU-Net takes as many threads; several of these processes work side by side
    np.random.seed()  # noqa: NPY002 (nnU-Net draws from it; as in a process of its own, from the system's entropy)
    share_imports_with_pools()
    sys.argv = request["command"]
    code = exit_code_of(sys.argv[0])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the end of an interpreter frees all that was imported, piece by piece, which takes a second


def exit_code_of(script: str) -> int:
    """Run a console script as an interpreter does, to what that would end with."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (the interpreter would print it, too)
        traceback.print_exc()
        return 1
    return 0


def share_imports_with_pools() -> None:
    """What nnU-Net spawns is forked from a copy of this process as it is now, before any thread was started."""
    multiprocessing.set_forkserver_preload([])  # all is imported
    contexts = multiprocessing.context._concrete_contexts
    contexts["spawn"] = contexts["forkserver"]
    spawn, util.spawnv_passfds = util.spawnv_passfds, fork_instead
    try:
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = spawn


def fork_instead(_program: str, arguments: list[str], descriptors: list[int]) -> int:
    """In the place of a new interpreter that runs ``-c CODE`` (the last argument): a fork of this one that does."""
    code = arguments[-1]
    if "forkserver" not in code:  # the resource tracker needs no imports
        return SPAWN(_program, arguments, descriptors)
    child = os.fork()
    if child == 0:
        util.close_all_fds_except([1, 2, *descriptors])
        with suppress(SystemExit):
            exec(code)
        os._exit(0)
    return child


SPAWN = util.spawnv_passfds

if __name__ == "__main__":
    main()
