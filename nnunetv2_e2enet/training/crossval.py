"""Cross-validation as one job list: nnU-Net's own training command for each trainer and fold, resumed where it stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from queue import SimpleQueue

from filelock import BaseFileLock, FileLock, Timeout

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import make_writable, read_json, write
from nnunetv2_e2enet.registration import console_command


class FoldState(Enum):
    """How far nnU-Net got with a fold, read from the files it left."""

    NEW = "not started"
    STARTED = "started"
    TRAINED = "trained, not validated"
    DONE = "done"


@dataclass(frozen=True)
class Fold:
    """One training: a fold of a trainer's model folder.

    Attributes:
        model: folder of the model, ``TRAINER__PLANS__CONFIGURATION`` in the data set's results.
        dataset: name or id, as nnU-Net's commands take it.
        number: of the fold.
        options: further arguments of ``nnUNetv2_train``. With ``--npz`` a fold is done when its validation has left
            probabilities too.
    """

    model: Path
    dataset: str
    number: int
    options: tuple[str, ...] = ()

    @property
    def trainer(self) -> str:
        """Name of the trainer."""
        return self.model.name.split("__")[0]

    @property
    def folder(self) -> Path:
        """nnU-Net's folder of the fold."""
        return self.model / f"fold_{self.number}"

    @property
    def log(self) -> Path:
        """The file of the command's output."""
        return self.model / f"crossval_fold_{self.number}.log"

    def state(self) -> FoldState:
        """How far the fold has come, by the files in its folder."""
        if (self.folder / "checkpoint_final.pth").is_file():
            return FoldState.DONE if self._is_validated() else FoldState.TRAINED
        started = any((self.folder / f"checkpoint_{name}.pth").is_file() for name in ("latest", "best"))
        return FoldState.STARTED if started else FoldState.NEW

    def _is_validated(self) -> bool:
        validation = self.folder / "validation"
        if not (validation / "summary.json").is_file():
            return False
        try:
            cases = len(json.loads((validation / "summary.json").read_text())["metric_per_case"])
        except (ValueError, KeyError):  # a kill while nnU-Net wrote it: to be validated again
            return False
        return "--npz" not in self.options or len(list(validation.glob("*.npz"))) >= cases

    def epoch(self) -> int | None:
        """The last epoch in the newest training log, None before the first."""
        logs = sorted(self.folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)
        epochs = re.findall(r"Epoch (\d+) ", logs[-1].read_text(errors="replace")) if logs else []
        return int(epochs[-1]) if epochs else None

    def command(self) -> list[str]:
        """The command that trains and validates the rest of this fold."""
        resume = {FoldState.STARTED: ["--c"], FoldState.TRAINED: ["--val"]}.get(self.state(), [])
        trainer, plans, configuration = self.model.name.split("__")
        train = ["nnUNetv2_train", self.dataset, configuration, str(self.number)]
        return [*train, "-tr", trainer, "-p", plans, *self.options, *resume]

    def run(self, gpu: int | None = None) -> int:
        """Run the command, its output in ``log``; nothing where another process has brought the fold to its end.

        Args:
            gpu: the only one that it sees, counted among those that this process sees; all of these if None.

        Returns:
            Its exit code.

        Raises:
            E2ENetError: another process trains the fold, or the model's folder cannot be written, or has no locks.
        """
        make_writable(self.model)
        with self._locked() as lock:
            if self.state() is FoldState.DONE:
                return 0
            held = lock._context.lock_file_fd  # by the training too, where this process is killed
            return _run_logged(self.command(), self.log, _environment(gpu), held)

    def finish(self) -> None:
        """``run``, for a job of a cluster, which an exception alone marks as failed.

        Raises:
            E2ENetError: the fold is not done; or as ``run``.
        """
        if self.run() or self.state() is not FoldState.DONE:
            raise E2ENetError(
                f"fold {self.number} of {self.trainer} did not finish: see {self.log}, then repeat the command to go on"
            )

    def _locked(self) -> AbstractContextManager[BaseFileLock]:
        """The lock of the fold, released at the end of its context."""
        lock = FileLock(self.model / f"crossval_fold_{self.number}.lock", timeout=0)
        try:
            return lock.acquire()
        except Timeout as error:
            raise E2ENetError(
                f"fold {self.number} of {self.trainer} is trained by another e2enet crossval (see {self.log}): wait for its "
                "end, or end what is left of it, then repeat the command"
            ) from error
        except (OSError, NotImplementedError) as error:  # of a network's file system
            raise E2ENetError(
                f"cannot lock {lock.lock_file} ({error}): expected a file that you may write, on a file system with locks, so "
                "that no fold is trained twice; put nnUNet_results elsewhere, or run nnUNetv2_train for each fold"
            ) from error


def accumulate(model: Path, dataset: str, folds: Sequence[int]) -> int:
    """nnU-Net's own accumulation over the folds of a model; its output goes to ``crossval_accumulate.log``.

    Folds that have been accumulated since their validation are left alone. nnU-Net empties the folder of its accumulation,
    where ``nnUNetv2_find_best_configuration`` leaves the postprocessing.

    Returns:
        Its exit code.
    """
    if _is_accumulated(model, folds):
        return 0
    trainer, plans, configuration = model.name.split("__")
    of_model = ["-c", configuration, "-p", plans, "-tr", trainer, "-f", *map(str, folds)]
    command = ["nnUNetv2_accumulate_crossval_results", dataset, *of_model]
    return _run_logged(command, model / "crossval_accumulate.log", dict(os.environ))


def _is_accumulated(model: Path, folds: Sequence[int]) -> bool:
    merged = summary(model, folds)
    try:
        _ = json.loads(merged.read_text())["foreground_mean"]
    except (FileNotFoundError, ValueError, KeyError):  # never accumulated, or a kill while nnU-Net wrote it
        return False
    validated = (model / f"fold_{number}" / "validation" / "summary.json" for number in folds)
    return all(file.stat().st_mtime <= merged.stat().st_mtime for file in validated)


def make_splits(model: Path, preprocessed: Path) -> None:
    """Write nnU-Net's own folds of a data set, unless it has some.

    Of folds that start at the same time, each would write the file, and another one could read half of it.

    Args:
        model: folder of a model, which names plans and configuration.
        preprocessed: nnU-Net's folder of the preprocessed data set.

    Raises:
        E2ENetError: plans or data are missing, or the file cannot be written.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
    from nnunetv2.utilities.crossval_split import generate_crossval_split
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    file = preprocessed / "splits_final.json"
    if file.is_file():
        return
    _, plans, configuration = model.name.split("__")
    identifier = PlansManager(read_json(preprocessed / f"{plans}.json")).get_configuration(configuration).data_identifier
    data = preprocessed / identifier
    if not data.is_dir():
        raise E2ENetError(f"{data} is missing: run nnUNetv2_preprocess for the data set, with -plans_name {plans}")
    cases = sorted(infer_dataset_class(str(data)).get_identifiers(str(data)))
    write(file, json.dumps(generate_crossval_split(cases, seed=12345, n_splits=5), indent=4))


def _environment(gpu: int | None) -> dict[str, str]:
    """This process's, of whose GPUs one is seen. Each entry of ``CUDA_VISIBLE_DEVICES`` is a number or a UUID."""
    if gpu is None:
        return dict(os.environ)
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible[gpu] if visible else str(gpu)}


def _run_logged(command: Sequence[str], log: Path, environment: dict[str, str], held: int | None = None) -> int:
    """Exit code of a console command, which keeps the file ``held`` of this process open where the system lets it."""
    name, *arguments = command
    kept = () if held is None or os.name != "posix" else (held,)
    with log.open("a") as output:
        return subprocess.run(
            [*console_command(name), *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            pass_fds=kept,
        ).returncode


def summary(model: Path, folds: Sequence[int]) -> Path:
    """The file in which nnU-Net's accumulation writes the metrics of all folds."""
    return model / f"crossval_results_folds_{'_'.join(map(str, folds))}" / "summary.json"


def run_locally(folds: Sequence[Fold], gpus: Sequence[int], watch: Callable[[], None]) -> dict[Fold, int]:
    """Train folds on this machine, one at a time on each GPU (or one at a time, without a GPU).

    Args:
        folds: to be trained, in this order.
        gpus: numbers of the GPUs.
        watch: called every second while trainings run.

    Returns:
        Exit codes.

    Raises:
        E2ENetError: another process trains one of the folds; the others are at their end then.
    """
    free: SimpleQueue[int | None] = SimpleQueue()
    for gpu in gpus:
        free.put(gpu)
    if not gpus:
        free.put(None)
    stopping = threading.Event()

    def run(fold: Fold) -> int:
        gpu = free.get()
        try:
            return -1 if stopping.is_set() else fold.run(gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(max(1, len(gpus))) as pool:
        futures = {fold: pool.submit(run, fold) for fold in folds}
        try:
            while wait(futures.values(), timeout=1).not_done:
                watch()
        except KeyboardInterrupt:  # the trainings got it as well; those that wait are not started
            stopping.set()
            raise
    return {fold: future.result() for fold, future in futures.items()}
