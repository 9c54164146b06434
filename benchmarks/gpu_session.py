"""Half an hour on a GPU: what is not known of the CUDA paths, in stages of at most eight minutes each.

On a machine with a network, once, with a data set that nnU-Net has preprocessed; torch and Triton are on the other one:

    python benchmarks/gpu_session.py --bundle DIR --preprocessed nnUNet_preprocessed/Dataset004_Hippocampus --python 3.12

On the machine with the GPU, where DIR has been copied to, without a network:

    DIR/install.sh
    DIR/environment/bin/python DIR/repository/benchmarks/gpu_session.py --stage 1     # then 2, 3, ...; again where it says so

Stages: 1 the kernels' tests; 2 training steps; 3 prediction of a patch and of a volume; 4 convolutions alone; 5 where the time
of a step goes; 6 trainings on Hippocampus, several at once. Every result is a JSON file of its own in ``--folder``; what is
there is not measured again. What fails, or takes longer than its stage, leaves a file that ends in .error.json, and is tried
again.

``--device cpu`` tries all of that with small networks, and marks results as such. Without ``--stage`` one stage follows the
other, and is called again until it is done. A dry run, in an environment that is made of the bundle alone:

    python benchmarks/gpu_session.py --bundle DIR --preprocessed ... --python 3.11 --with-torch
    DIR/install.sh
    DIR/environment/bin/python DIR/repository/benchmarks/gpu_session.py --device cpu
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import contestants
import gpu_bundle
from gpu_stages import AT_ONCE, REPOSITORY, STAGES, Measurement, Session, Unfinished

from nnunetv2_e2enet import files

STAGE_SECONDS = 8 * 60
LEAST_SECONDS = 45
"""Nothing is begun when there is less time than that."""
DONE, UNFINISHED, FAILED = "done", "goes on when the stage is called again", "failed"
"""What becomes of a measurement, and of a stage."""


def run_stage(number: int, session: Session) -> str:
    """Measure what is not there yet, in at most ``session.seconds``. Returns what became of the stage."""
    session.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + session.seconds
    stage = STAGES[number - 1]
    todo = [key for key in stage(session) if not record(key, session).is_file()]
    todo.sort(key=lambda key: error_of(key, session).is_file())  # what failed before comes last
    with ThreadPoolExecutor(max(1, len(todo) if stage in AT_ONCE else 1)) as pool:
        ends = set(pool.map(partial(measured, session=session, deadline=deadline), todo))
    end = next((end for end in (FAILED, UNFINISHED) if end in ends), DONE)
    print(f"stage {number}: {end}", flush=True)
    return end


def record(key: str, session: Session) -> Path:
    return session.folder / f"{key}.json"


def error_of(key: str, session: Session) -> Path:
    return session.folder / f"{key}.error.json"


def measured(key: str, session: Session, deadline: float) -> str:
    """Measure in a process of its own, which writes the record. Returns what became of it."""
    left = deadline - time.monotonic()
    if left < LEAST_SECONDS:
        print(f"{key}: no time is left", flush=True)
        return UNFINISHED
    begin = time.monotonic()
    command = [sys.executable, __file__, "--measure", key, "--device", session.device, "--folder", str(session.folder)]
    command += ["--preprocessed", str(session.preprocessed), "--seconds", str(left)]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(session.folder / "compiled")}  # what is compiled once is there for the next call
    environment = {**os.environ, **cache, **measurement_of(key, session).environment}
    log = session.folder / f"{key}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(left)
            reason = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reason = f"stopped after {left:.0f} s"
    if process.returncode == 0:
        error_of(key, session).unlink(missing_ok=True)
        end = DONE if record(key, session).is_file() else UNFINISHED
    else:
        content = {"what": key, "error": reason, "end": log.read_text()[-5000:]}
        files.write_atomically(error_of(key, session), json.dumps(content, indent=2) + "\n")
        end = FAILED
    print(f"{key}: {end}, {time.monotonic() - begin:.0f} s", flush=True)
    return end


def measurement_of(key: str, session: Session) -> Measurement:
    return STAGES[int(key[0]) - 1](session)[key]


def measure(key: str, session: Session) -> None:
    """In the process of the measurement."""
    try:
        result = measurement_of(key, session).run(session)
    except Unfinished as reason:
        print(reason)
        return
    content = {
        "what": key,
        "commit": contestants.commit(),
        "machine": contestants.machine(session.device),
        "result": result,
    }
    files.write_atomically(record(key, session), json.dumps(content, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="prepare a folder for the machine with the GPU")
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--with-torch", action="store_true", help="torch and Triton go along")
    parser.add_argument("--stage", type=int, choices=range(1, len(STAGES) + 1), help="default: all, one after the other")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=REPOSITORY.parent / "session", help="of the records")
    parser.add_argument("--preprocessed", type=Path, help="nnUNet_preprocessed; for --bundle, the data set's folder in it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, help="of a stage")
    given = parser.parse_args(arguments)
    if given.bundle is not None:
        if given.preprocessed is None:
            parser.error("--bundle needs --preprocessed")
        gpu_bundle.bundle(given.bundle.resolve(), given.preprocessed.resolve(), given.python, given.with_torch)
        return
    contestants.check_device(given.device)
    preprocessed = (given.preprocessed or REPOSITORY.parent / "nnUNet_preprocessed").resolve()
    session = Session(given.device, given.folder.resolve(), preprocessed, given.seconds)
    if given.measure is not None:
        measure(given.measure, session)
        return
    begin = time.monotonic()
    stages = range(1, len(STAGES) + 1) if given.stage is None else (given.stage,)
    ends = []
    for number in stages:
        while (end := run_stage(number, session)) == UNFINISHED and given.stage is None:
            pass
        ends.append(end)
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    if FAILED in ends:
        raise SystemExit(f"what failed is in {session.folder}, in files that end in .error.json")


if __name__ == "__main__":
    main()
