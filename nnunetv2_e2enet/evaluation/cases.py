"""The cases of a comparison. One message names all mismatches, before any voxel is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.sources import Source
from nnunetv2_e2enet.imaging import read_header

NAMES_SHOWN = 5
READERS = 8


@dataclass(frozen=True)
class Case:
    """One case: its reference and the prediction of each model, in the order of the sources."""

    name: str
    fold: str | None
    reference: Path
    predictions: tuple[Path, ...]


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a file are: voxels and mm per axis, mm of the first voxel, direction cosines."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    def difference(self, other: Geometry) -> str | None:
        """The difference to ``other`` in words; None where both are the same grid."""
        if self.size != other.size:
            return f"{_times(self.size)} voxels, the reference has {_times(other.size)}"
        if not np.allclose(self.spacing, other.spacing, rtol=1e-3):
            return f"spacing {_times(self.spacing)} mm, the reference has {_times(other.spacing)}"
        if not np.allclose(self.direction, other.direction, atol=1e-3):
            return "axes that point elsewhere than those of the reference"
        if not np.allclose(self.origin, other.origin, atol=0.1 * min(self.spacing)):
            return f"origin {_listed(self.origin)} mm, the reference has {_listed(other.origin)}"
        return None


def read_geometry(file: Path) -> Geometry:
    """From the file's header alone.

    Raises:
        E2ENetError: SimpleITK cannot read it.
    """
    reader = read_header(file)
    return Geometry(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def match_cases(sources: Sequence[Source], reference: Path, common: bool = False) -> list[Case]:
    """The cases of all sources, checked.

    Args:
        sources: at least one.
        reference: folder of the reference segmentations.
        common: compare the cases that all sources have, and leave out the others instead of refusing.

    Raises:
        E2ENetError: one message that names every mismatch: label maps, cases that not all have, folds, missing references,
            geometries.
    """
    problems = _label_problems(sources)
    shared = set.intersection(*(set(source.predictions) for source in sources))
    if not common:
        problems += _case_problems(sources, shared)
    elif not shared:
        problems.append("no case is in all of them")
    first = sources[0]
    cases = [
        Case(
            name,
            first.folds.get(name),
            reference / f"{name}{first.file_ending}",
            tuple(s.predictions[name] for s in sources),
        )
        for name in sorted(shared)
    ]
    unknown = [case.name for case in cases if not case.reference.is_file()]
    if unknown:
        problems.append(f"no reference in {reference} for {_some(unknown)}")
    problems += _geometry_problems(sources, [case for case in cases if case.reference.is_file()])
    if problems:
        raise E2ENetError("these results cannot be compared:\n" + "\n".join(f"  - {p}" for p in problems))
    return cases


def _label_problems(sources: Sequence[Source]) -> list[str]:
    first = sources[0]
    expected = first.labels.classes
    problems = []
    for source in sources[1:]:
        found = source.labels.classes
        differing = [
            f"{name} is {_label(expected.get(name))} in {first.name} and {_label(found.get(name))} in {source.name}"
            for name in dict.fromkeys([*expected, *found])
            if expected.get(name) != found.get(name)
        ]
        if differing:
            problems.append(f"label maps differ: {_some(differing)}")
        if source.labels.ignore != first.labels.ignore:
            problems.append(
                f"the ignore label is {first.labels.ignore} in {first.name}, {source.labels.ignore} in {source.name}"
            )
        if source.file_ending != first.file_ending:
            problems.append(f"files end in {first.file_ending} in {first.name} and in {source.file_ending} in {source.name}")
    return problems


def _case_problems(sources: Sequence[Source], shared: set[str]) -> list[str]:
    problems = []
    for source in sources:
        more = sorted(set(source.predictions) - shared)
        if more:
            problems.append(f"only some have {_some(more)}, among them {source.name} (--common leaves such cases out)")
    folds: dict[str, set[str]] = {case: {s.folds[case] for s in sources if case in s.folds} for case in sorted(shared)}
    differing = [case for case, numbers in folds.items() if len(numbers) > 1]
    if differing:
        problems.append(
            f"the splits differ: {_some(differing)} are validated by different folds, so the models had other training cases "
            "(--common compares them all the same)"
        )
    return problems


def _geometry_problems(sources: Sequence[Source], cases: Sequence[Case]) -> list[str]:
    """Differences by model, each with the cases that have it."""
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(_differences, cases))
    problems = []
    for index, source in enumerate(sources):
        texts = [
            f"{case.name}: {differences[index]}" for case, differences in zip(cases, found, strict=True) if differences[index]
        ]
        if texts:
            problems.append(f"{source.name} lies on another grid than the reference: {_some(texts)}")
    return problems


def _differences(case: Case) -> list[str | None]:
    try:
        reference = read_geometry(case.reference)
    except E2ENetError as error:
        return [str(error)] * len(case.predictions)
    differences: list[str | None] = []
    for file in case.predictions:
        try:
            differences.append(read_geometry(file).difference(reference))
        except E2ENetError as error:
            differences.append(str(error))
    return differences


def _some(items: Sequence[str]) -> str:
    more = len(items) - NAMES_SHOWN
    return ", ".join(items[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _label(values: tuple[int, ...] | None) -> str:
    return "missing" if values is None else "+".join(map(str, values))


def _times(numbers: Iterable[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)


def _listed(numbers: Iterable[float]) -> str:
    return "(" + ", ".join(f"{n:.4g}" for n in numbers) + ")"
