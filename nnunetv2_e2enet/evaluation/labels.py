"""What is segmented: classes or regions, and the label that says "unknown"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2_e2enet.errors import E2ENetError


@dataclass(frozen=True)
class LabelClass:
    """A class, or a region made of several label values.

    Attributes:
        name: as in ``dataset.json``.
        values: the label values that belong to it.
        key: its name in nnU-Net's ``summary.json``.
    """

    name: str
    values: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class Labels:
    """The foreground of a data set.

    Attributes:
        classes: in nnU-Net's order.
        ignore: label value of voxels that the reference leaves open, or None.
        known: every value that a label map may hold, with background and without ``ignore``.
    """

    classes: tuple[LabelClass, ...]
    ignore: int | None
    known: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        return [c.name for c in self.classes]


def read_labels(content: Mapping[str, Any], where: str) -> Labels:
    """The labels in the content of a ``dataset.json``, understood as nnU-Net's label manager does.

    Raises:
        E2ENetError: no labels, or none in the foreground.
    """
    given = content.get("labels")
    if not isinstance(given, dict) or "background" not in given:
        raise E2ENetError(f"{where} has no `labels` with a `background`: expected nnU-Net's dataset.json")
    entries = {name: value for name, value in given.items() if name != "ignore"}
    has_regions = any(isinstance(value, list) and len(value) > 1 for value in entries.values())
    classes = []
    for name, value in entries.items():
        values = tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)
        if set(values) == {0}:
            continue
        as_region = has_regions and isinstance(value, list)
        classes.append(LabelClass(name, values, str(values) if as_region else str(values[0])))
    if not has_regions:
        classes.sort(key=lambda c: c.values)
    if not classes:
        raise E2ENetError(f"{where} names no foreground label: at least one is needed to compare")
    ignore = given.get("ignore")
    known = {v for c in classes for v in c.values} | {0}
    return Labels(tuple(classes), None if ignore is None else int(ignore), tuple(sorted(known)))
