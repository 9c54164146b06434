"""The cases of a comparison. One message names all mismatches, before any voxel is read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.sources import Source
from nnunetv2_e2enet.imaging import read_grid

NAMES_SHOWN = 5
READERS = 8


@dataclass(frozen=True)
class Case:
    """One case: its reference and the prediction of each model, in the order of the sources.

    Attributes:
        fold: that validated it, None where there are none, or where the folds of two models did.
    """

    name: str
    fold: str | None
    reference: Path
    predictions: tuple[Path, ...]


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
            _fold_of(name, sources),
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
    differing = [case for case in sorted(shared) if len(_folds_of(case, sources)) > 1]
    if differing:
        problems.append(
            f"the splits differ: {_some(differing)} are validated by different folds, so the models had other training cases "
            "(--common compares them all the same)"
        )
    return problems


def _fold_of(case: str, sources: Sequence[Source]) -> str | None:
    folds = _folds_of(case, sources)
    return folds.pop() if len(folds) == 1 else None


def _folds_of(case: str, sources: Sequence[Source]) -> set[str]:
    return {source.folds[case] for source in sources if case in source.folds}


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
        reference = read_grid(case.reference)
    except E2ENetError as error:
        return [str(error)] * len(case.predictions)
    differences: list[str | None] = []
    for file in case.predictions:
        try:
            differences.append(read_grid(file).difference(reference, "the reference"))
        except E2ENetError as error:
            differences.append(str(error))
    return differences


def _some(items: Sequence[str]) -> str:
    more = len(items) - NAMES_SHOWN
    return ", ".join(items[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _label(values: tuple[int, ...] | None) -> str:
    return "missing" if values is None else "+".join(map(str, values))
