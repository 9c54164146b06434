"""Half an hour on a GPU: what is not known of the CUDA paths, in stages of at most eight minutes each.

On a machine with a network, once, with a data set that nnU-Net has preprocessed; torch and Triton are on the other one:

    python benchmarks/gpu_session.py --bundle DIR --preprocessed nnUNet_preprocessed/Dataset004_Hippocampus --python 3.12

With ``--installed FILE``, which ``python3 -m pip list --format freeze`` wrote on the other machine, what is there in a version
that suits stays out of the bundle.

On the machine with the GPU, where DIR has been copied to, without a network:

    DIR/install.sh
    DIR/environment/bin/python DIR/repository/benchmarks/gpu_session.py --stage 1     # then 2, 3, ...; again where it says so

Stages: 1 the kernels' check and tests; 2 training steps; 3 prediction of a patch and of a volume; 4 convolutions alone; 5
where the time of a step goes; 6 trainings on Hippocampus, several at once. Stage 0 is stages 1 to 5, most important answers
first, for a machine that is there for minutes: check, steps, prediction, convolutions, and then the rest.

Every result is a JSON file of its own in ``--folder``; what is there is not measured again. What fails, or takes too long,
leaves a file that ends in .error.json, and is tried again, after the others and with all the time that is left. After each
measurement all of them are brought into one file, ``--results``, which is all that has to be kept: what it holds is not
measured again on another machine either. Measurements end with the session that started them, however it ends.

``--device cpu`` tries all of that with small networks, and marks results as such. Without ``--stage`` stages 1 to 6 follow one
another, each of them called again until it is done. A dry run, in an environment that is made of the bundle alone:

    python benchmarks/gpu_session.py --bundle DIR --preprocessed ... --python 3.11 --with-torch
    DIR/install.sh
    DIR/environment/bin/python DIR/repository/benchmarks/gpu_session.py --device cpu
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Thread

import contestants
import gpu_bundle
from gpu_stages import AT_ONCE, ERROR, PARTIAL, RECORD, REPOSITORY, STAGES, Measurement, Session, Unfinished, by_value

from nnunetv2_e2enet import files

STAGE_SECONDS = 8 * 60
MOST = 2
"""How many times its least seconds a measurement may take while others wait."""
DONE, UNFINISHED, FAILED = "done", "goes on when the stage is called again", "failed"
"""What becomes of a measurement."""


def run_stage(number: int, session: Session, results: Path | None = None) -> set[str]:
    """Measure what is not there yet, in at most ``session.seconds``. Returns what became of the measurements.

    Args:
        number: of the stage.
        session: where, and how long.
        results: the file with all results; see ``collect``.

    Raises:
        SystemExit: another session measures in this folder.
    """
    session.folder.mkdir(parents=True, exist_ok=True)
    results = session.folder / "results.json" if results is None else results
    deadline = time.monotonic() + session.seconds
    with alone_in(session.folder) as lock:
        unpack(results, session)
        keys = by_value(session) if number == 0 else list(STAGES[number - 1](session))
        todo = [key for key in keys if not session.file(key, RECORD).is_file()]
        todo.sort(key=lambda key: session.file(key, ERROR).is_file())  # what failed before comes last
        at_once = number > 0 and STAGES[number - 1] in AT_ONCE
        ends = set() if todo else {DONE}
        with ThreadPoolExecutor(max(1, len(todo) if at_once else 1)) as pool:
            for end in pool.map(partial(measured, session=session, deadline=deadline, lock=lock), todo):
                ends.add(end)
                collect(session, results)
    print(f"stage {number}: {', '.join(end for end in (DONE, FAILED, UNFINISHED) if end in ends)}", flush=True)
    return ends


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Nobody else measures for this folder meanwhile. A measurement has the lock as well, as long as it runs.

    Raises:
        SystemExit: somebody does.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another session measures in {folder}: wait for its end, or give another --folder") from None
        yield lock.fileno()


def collect(session: Session, results: Path) -> None:
    """Bring all records and errors of the folder into one file."""
    records = [json.loads(file.read_text()) for file in sorted(session.folder.glob(f"[0-9]-*{RECORD}"))]
    files.write_atomically(results, json.dumps({"device": session.device, "records": records}, indent=2) + "\n")


def unpack(results: Path, session: Session) -> None:
    """The reverse of ``collect``, of what the folder lacks.

    Raises:
        SystemExit: the folder or the file is of another device.
    """
    device = session.folder / "device"
    content = json.loads(results.read_text()) if results.is_file() else {"device": session.device, "records": []}
    for file, found in ((device, device.read_text() if device.is_file() else session.device), (results, content["device"])):
        if found != session.device:
            raise SystemExit(f"{file.parent} has measurements on {found}, not on {session.device}: give another --folder")
    device.write_text(session.device)
    for record in content["records"]:
        if not session.file(record["what"], RECORD).is_file():
            file = session.file(record["what"], ERROR if "error" in record else RECORD)
            files.write_atomically(file, json.dumps(record, indent=2) + "\n")


def measured(key: str, session: Session, deadline: float, lock: int) -> str:
    """Measure in a process of its own, which writes the record. Returns what became of it."""
    measurement, error = measurement_of(key, session), session.file(key, ERROR)
    failed_before = error.is_file()
    left = deadline - time.monotonic()
    if left < min(measurement.least_seconds, 0.9 * session.seconds):  # a whole stage is as much as it can have
        print(f"{key}: too little time is left", flush=True)
        return FAILED if failed_before else UNFINISHED
    comes_last = failed_before or STAGES[int(key[0]) - 1] in AT_ONCE  # then nothing waits for its end
    seconds = left if comes_last else min(left, MOST * measurement.least_seconds)
    begin = time.monotonic()
    status, reason = ended(key, session, measurement, seconds, lock)
    if status == 0:
        error.unlink(missing_ok=True)
        end = DONE if session.file(key, RECORD).is_file() else UNFINISHED
    else:
        partial_results = session.file(key, PARTIAL)
        content = {"what": key, "device": session.device, "error": reason, "end": log_of(key, session).read_text()[-5000:]}
        if partial_results.is_file():
            content["partial"] = json.loads(partial_results.read_text())["results"]
        files.write_atomically(error, json.dumps(content, indent=2) + "\n")
        end = FAILED
    print(f"{key}: {end}, {time.monotonic() - begin:.0f} s", flush=True)
    return end


def ended(key: str, session: Session, measurement: Measurement, seconds: float, lock: int) -> tuple[int, str]:
    """Exit status of the process of a measurement, and why it is that.

    The process has a group of its own, of which nothing is left afterwards. The other end of its standard input is closed when
    this process ends, see ``end_with_session``.
    """
    command = [sys.executable, __file__, "--measure", key, "--device", session.device, "--folder", str(session.folder)]
    command += ["--preprocessed", str(session.preprocessed), "--seconds", str(seconds)]
    caches = {"TORCHINDUCTOR_CACHE_DIR": "compiled", "TRITON_CACHE_DIR": "compiled-by-triton"}  # for the next call
    environment = {**os.environ, **{name: str(session.folder / folder) for name, folder in caches.items()}}
    environment |= measurement.environment
    streams = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT}
    group = {"start_new_session": True, "pass_fds": (lock,)}
    with (
        log_of(key, session).open("w") as output,
        subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, **streams, **group) as process,
    ):
        try:
            process.wait(seconds)
            reason = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for _ in range(20):  # processes that the measurement has forked hold the lock until they are gone
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
    return process.returncode, reason


def log_of(key: str, session: Session) -> Path:
    return session.file(key, ".log")


def measurement_of(key: str, session: Session) -> Measurement:
    return STAGES[int(key[0]) - 1](session)[key]


def end_with_session() -> None:
    """In the process of a measurement: end, with all processes of the group, when standard input ends."""

    def watch() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    Thread(target=watch, daemon=True).start()


def measure(key: str, session: Session) -> None:
    """In the process of the measurement."""
    try:
        result = measurement_of(key, session).run(session)
    except Unfinished as reason:
        print(reason)
        return
    content = {
        "what": key,
        "commit": contestants.COMMIT,
        "machine": contestants.machine(session.device),
        "result": result,
    }
    files.write_atomically(session.file(key, RECORD), json.dumps(content, indent=2) + "\n")
    session.file(key, PARTIAL).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="prepare a folder for the machine with the GPU")
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--with-torch", action="store_true", help="torch and Triton go along")
    parser.add_argument("--installed", type=Path, help="`pip list --format freeze` of that machine: not in the bundle")
    parser.add_argument("--stage", type=int, choices=range(len(STAGES) + 1), help="default: 1 to 6, one after the other")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=REPOSITORY.parent / "session", help="of the records")
    parser.add_argument("--results", type=Path, help="the file with all results, default results.json in --folder")
    parser.add_argument("--preprocessed", type=Path, help="nnUNet_preprocessed; for --bundle, the data set's folder in it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, help="of a stage")
    given = parser.parse_args(arguments)
    if given.bundle is not None:
        if given.preprocessed is None:
            parser.error("--bundle needs --preprocessed")
        if given.with_torch and given.installed:
            parser.error("--installed is of a Python that has torch; --with-torch makes an environment of the bundle alone")
        installed = gpu_bundle.read_installed(given.installed) if given.installed else {}
        gpu_bundle.bundle(given.bundle.resolve(), given.preprocessed.resolve(), given.python, given.with_torch, installed)
        return
    contestants.check_device(given.device)
    preprocessed = (given.preprocessed or REPOSITORY.parent / "nnUNet_preprocessed").resolve()
    session = Session(given.device, given.folder.resolve(), preprocessed, given.seconds)
    if given.measure is not None:
        end_with_session()
        measure(given.measure, session)
        return
    begin = time.monotonic()
    stages = range(1, len(STAGES) + 1) if given.stage is None else (given.stage,)
    ends = set()
    for number in stages:
        while UNFINISHED in (of_stage := run_stage(number, session, given.results)) and given.stage is None:
            pass
        ends |= of_stage
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    if FAILED in ends:
        raise SystemExit(f"what failed is in {session.folder}, in files that end in .error.json")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: measurements end with this process
    main()
