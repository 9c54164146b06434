"""The metrics of all cases and models: cached, in parallel, with bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.cache import MetricsCache
from nnunetv2_e2enet.evaluation.cases import Case
from nnunetv2_e2enet.evaluation.labels import Labels
from nnunetv2_e2enet.evaluation.metrics import ClassMetrics, case_metrics

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Results:
    """All numbers of a comparison.

    Attributes:
        models, classes: names.
        cases: what was compared, in the order of the arrays.
        values: by name of a field of ``ClassMetrics``, an array (models, cases, classes).
        from_cache: how many (case, model) pairs were not computed anew.
    """

    models: list[str]
    classes: list[str]
    cases: list[Case]
    values: dict[str, NDArray[np.float64]]
    from_cache: int

    @property
    def names(self) -> list[str]:
        return [case.name for case in self.cases]

    def case_means(self, metric: str) -> NDArray[np.float64]:
        """Mean over the classes that are defined, (models, cases); NaN where none is."""
        return nan_mean(self.values[metric], axis=2)

    def class_means(self, metric: str) -> NDArray[np.float64]:
        """Mean over the cases in which a class is defined, (models, classes), as in nnU-Net's ``summary.json``."""
        return nan_mean(self.values[metric], axis=1)

    def foreground_means(self, metric: str) -> NDArray[np.float64]:
        """Mean of the class means, one for each model: nnU-Net's ``foreground_mean``, over the classes that are defined."""
        return nan_mean(self.class_means(metric), axis=1)


def nan_mean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Mean of what is not NaN, and NaN where nothing else is."""
    defined = ~np.isnan(values)
    n = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def measure(
    models: Sequence[str],
    cases: Sequence[Case],
    labels: Labels,
    tolerances: Sequence[float],
    cache: MetricsCache,
    workers: int = 1,
    progress: Progress | None = None,
) -> Results:
    """Compute what the cache does not have.

    Finished cases are stored at once, so that an interrupted run goes on where it ended. Each worker holds one case.

    Args:
        tolerances: of the surface Dice in mm, one for each class.
        workers: processes; 1 computes in this one.
        progress: told the finished cases and their number.

    Raises:
        E2ENetError: a file cannot be read, or it is no label map.
    """
    found: list[list[list[ClassMetrics] | None]] = []
    entries: list[list[Path | None]] = []
    for case in cases:
        entries.append([cache.entry(case.reference, file) for file in case.predictions])
        found.append([cache.load(entry) for entry in entries[-1]])
    from_cache = sum(metrics is not None for row in found for metrics in row)
    tasks = [
        _Task(
            i, case.reference, {j: f for j, f in enumerate(case.predictions) if found[i][j] is None}, labels, tuple(tolerances)
        )
        for i, case in enumerate(cases)
        if None in found[i]
    ]
    done = len(cases) - len(tasks)
    if progress:
        progress(done, len(cases))
    for index, computed in _run(tasks, workers):
        for model, metrics in computed.items():
            cache.store(entries[index][model], metrics)
            found[index][model] = metrics
        done += 1
        if progress:
            progress(done, len(cases))
    complete = np.array(found, dtype=float)  # cases, models, classes, fields
    fields = {name: complete[..., i].transpose(1, 0, 2) for i, name in enumerate(ClassMetrics._fields)}
    return Results(list(models), labels.names, list(cases), fields, from_cache)


@dataclass(frozen=True)
class _Task:
    """One case, and the models that are to be computed."""

    index: int
    reference: Path
    predictions: dict[int, Path]
    labels: Labels
    tolerances: tuple[float, ...]


def _run(tasks: Sequence[_Task], workers: int) -> Iterator[tuple[int, dict[int, list[ClassMetrics]]]]:
    """Results as they come, with no more than two tasks for each worker under way."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield _compute(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    waiting = iter(tasks)
    running: set[Future[tuple[int, dict[int, list[ClassMetrics]]]]] = set()
    try:
        for task in waiting:
            running.add(pool.submit(_compute, task))
            if len(running) >= 2 * workers:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    except BrokenProcessPool as error:
        raise E2ENetError(
            "a worker process was ended from outside, perhaps for want of memory: use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's business; one thread for each worker."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _compute(task: _Task) -> tuple[int, dict[int, list[ClassMetrics]]]:
    reference, spacing = read_label_map(task.reference)
    results = {}
    for model, file in task.predictions.items():
        prediction, _ = read_label_map(file)
        results[model] = case_metrics(reference, prediction, spacing, task.labels, task.tolerances)
    return task.index, results


def read_label_map(file: Path) -> tuple[NDArray[np.integer], tuple[float, ...]]:
    """Voxels and spacing in mm, both with the axes in numpy's order (depth, height, width).

    Raises:
        E2ENetError: unreadable, several channels, negative or fractional values.
    """
    try:
        image = sitk.ReadImage(str(file))
    except RuntimeError as error:
        raise E2ENetError(f"cannot read {file} as an image: is it whole?") from error
    voxels = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise E2ENetError(f"{file} has {image.GetNumberOfComponentsPerPixel()} channels: expected a label map of one")
    if not np.issubdtype(voxels.dtype, np.integer):
        whole = voxels.astype(np.int32)
        if not np.array_equal(whole, voxels):
            raise E2ENetError(f"{file} holds fractional values: expected a label map of whole numbers")
        voxels = whole
    if np.issubdtype(voxels.dtype, np.signedinteger) and voxels.min(initial=0) < 0:
        raise E2ENetError(f"{file} holds negative values: expected label values from 0")
    return voxels, tuple(image.GetSpacing()[::-1])
