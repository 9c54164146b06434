"""The metrics of all cases and models, measured in parallel; joblib stores finished predictions."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import SimpleITK as sitk  # noqa: N813
from joblib import Memory, Parallel, delayed, parallel_config
from numpy.typing import NDArray

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.cases import Case
from nnunetv2_e2enet.evaluation.labels import Labels
from nnunetv2_e2enet.evaluation.metrics import ClassMetrics, case_metrics
from nnunetv2_e2enet.evaluation.statistics import nan_mean
from nnunetv2_e2enet.imaging import read_grid, read_image

Progress = Callable[[int, int], None]
VERSION = 6
"""Of what the metrics mean: to be raised when a number would come out otherwise, so that kept numbers are not used again."""


@dataclass(frozen=True)
class Results:
    """All numbers of a comparison.

    Attributes:
        models, classes: names.
        cases: what was compared, in the order of the arrays.
        values: by name of a field of ``ClassMetrics``, an array (models, cases, classes).
        from_cache: how many predictions were measured in an earlier run.
    """

    models: list[str]
    classes: list[str]
    cases: list[Case]
    values: dict[str, NDArray[np.float64]]
    from_cache: int

    @property
    def names(self) -> list[str]:
        """Of the cases."""
        return [case.name for case in self.cases]

    @property
    def frame(self) -> pd.DataFrame:
        """A row for each case, model and class: the columns ``case``, ``fold``, ``model``, ``class`` and the metrics."""
        rows = [(case.name, case.fold, model, label) for case in self.cases for model in self.models for label in self.classes]
        names = pd.DataFrame(rows, columns=["case", "fold", "model", "class"], dtype=object)
        numbers = {name: values.transpose(1, 0, 2).reshape(-1) for name, values in self.values.items()}
        return names.assign(**numbers)

    def case_means(self, metric: str) -> NDArray[np.float64]:
        """Mean over the classes that are defined, (models, cases); NaN where none is."""
        return nan_mean(self.values[metric], axis=2)


class FileState(NamedTuple):
    """State of a file: metrics stay valid while its path, size (bytes) and time are the same."""

    path: str
    size: int
    time_ns: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Raises OSError where there is no such file."""
        state = file.stat()
        return cls(str(file.resolve()), state.st_size, state.st_mtime_ns)


def default_cache() -> Path:
    """The folder of stored metrics, in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nnunetv2-e2enet" / "metrics"


def measure(
    models: Sequence[str],
    cases: Sequence[Case],
    labels: Labels,
    tolerances: Sequence[float],
    cache: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Results:
    """Measure the predictions that are not in the cache.

    A finished prediction is stored at once, so that an interrupted run goes on where it ended. Each worker holds one case.

    Args:
        models: names of the models.
        cases: reference and predictions of each case.
        labels: the classes.
        tolerances: of the surface Dice in mm, one for each class.
        cache: folder of the results of earlier runs, made if it is missing; None keeps nothing.
        workers: processes; 1 computes in this one.
        progress: told the finished predictions and their number.

    Raises:
        E2ENetError: a file cannot be read, it is no label map, or the cache cannot be written.
    """
    try:
        kept = Memory(cache, verbose=0).cache(prediction_metrics)
    except OSError as error:
        raise E2ENetError(f"cannot keep results in {cache} ({error.strerror}): use --cache or --no-cache") from error
    spacings = {case.reference: read_grid(case.reference).spacing[::-1] for case in cases}
    by_class = tuple(zip(labels.names, tolerances, strict=True))
    tasks = [
        (FileState.of(case.reference), FileState.of(file), spacings[case.reference], labels, by_class, VERSION)
        for case in cases
        for file in case.predictions
    ]
    found = {i: kept(*task) for i, task in enumerate(tasks) if kept.check_call_in_cache(*task)}
    missing = [i for i in range(len(tasks)) if i not in found]
    if progress:
        progress(len(found), len(tasks))
    from_cache = len(found)
    with parallel_config("loky", inner_max_num_threads=1, initializer=_ignore_interrupts):
        pool = Parallel(min(workers, max(1, len(missing))), return_as="generator", batch_size=len(models))
        try:
            measured = pool(delayed(kept)(*tasks[i]) for i in missing)
            for index, metrics in zip(missing, measured, strict=True):
                found[index] = metrics
                if progress:
                    progress(len(found), len(tasks))
        except BrokenProcessPool as error:
            raise E2ENetError(
                "a worker process was ended from outside, perhaps for want of memory: use fewer --workers"
            ) from error
    complete = np.array([found[i] for i in range(len(tasks))]).reshape(len(cases), len(models), len(labels.names), -1)
    values = {name: complete[..., i].transpose(1, 0, 2) for i, name in enumerate(ClassMetrics._fields)}
    return Results(list(models), labels.names, list(cases), values, from_cache)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; the parent ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prediction_metrics(
    reference: FileState,
    prediction: FileState,
    spacing: tuple[float, ...],
    labels: Labels,
    tolerances: tuple[tuple[str, float], ...],  # by class; their order is in the key, that of a dictionary is not
    version: int,  # noqa: ARG001 (joblib's cache distinguishes the arguments)
) -> NDArray[np.float64]:
    """Metrics of one prediction, an array (classes, fields of ``ClassMetrics``). Its arguments are the key of the cache."""
    expected, found = _read_reference(reference), read_label_map(Path(prediction.path))
    for voxels, file in ((expected, reference.path), (found, prediction.path)):
        _check_values(voxels, labels, file)
    return np.array(case_metrics(expected, found, spacing, labels, [mm for _, mm in tolerances]), dtype=float)


def _check_values(voxels: NDArray[np.integer], labels: Labels, file: str) -> None:
    """Raises E2ENetError where a label map holds values that ``dataset.json`` does not name."""
    named = [*labels.known, *([] if labels.ignore is None else [labels.ignore])]
    unknown = np.isin(voxels, named, invert=True)
    if unknown.any():
        values = ", ".join(map(str, np.unique(voxels[unknown])[:5]))
        raise E2ENetError(
            f"{file} holds the value {values}: expected the labels of dataset.json, {', '.join(map(str, named))}"
        )


@lru_cache(maxsize=1)
def _read_reference(file: FileState) -> NDArray[np.integer]:
    """Read once for the predictions of all models."""
    return read_label_map(Path(file.path))


def read_label_map(file: Path) -> NDArray[np.integer]:
    """Voxels, with the axes in numpy's order (depth, height, width).

    Raises:
        E2ENetError: unreadable, several channels, negative or fractional values.
    """
    image = read_image(file)
    voxels: NDArray[Any] = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise E2ENetError(f"{file} has {image.GetNumberOfComponentsPerPixel()} channels: expected a label map of one")
    if not np.issubdtype(voxels.dtype, np.integer):
        whole = voxels.astype(np.int32)
        if not np.array_equal(whole, voxels):
            raise E2ENetError(f"{file} holds fractional values: expected a label map of whole numbers")
        voxels = whole
    if np.issubdtype(voxels.dtype, np.signedinteger) and voxels.min(initial=0) < 0:
        raise E2ENetError(f"{file} holds negative values: expected label values from 0")
    return voxels
