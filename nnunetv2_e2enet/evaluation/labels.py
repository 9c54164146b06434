"""The classes or regions of a data set, as nnU-Net's label manager understands them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_e2enet.errors import E2ENetError


@dataclass(frozen=True)
class Labels:
    """The foreground of a data set.

    Attributes:
        classes: label values of each class or region by its name in ``dataset.json``, in nnU-Net's order.
        ignore: label value of voxels that the reference leaves open, or None.
        known: every value that a label map may hold, with background and without ``ignore``.
    """

    classes: dict[str, tuple[int, ...]]
    ignore: int | None
    known: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return list(self.classes)


def read_labels(content: Mapping[str, Any], where: str) -> Labels:
    """The labels in the content of a ``dataset.json``.

    Raises:
        E2ENetError: no labels, none in the foreground, or labels that nnU-Net refuses.
    """
    given = content.get("labels")
    if not isinstance(given, dict) or "background" not in given:
        raise E2ENetError(f"{where} has no `labels` with a `background`: expected nnU-Net's dataset.json")
    for name, entry in given.items():
        values = entry if isinstance(entry, (list, tuple)) else [entry]
        if not values or not all(map(_is_whole, values)):
            raise E2ENetError(
                f"{where} has the label {name} with the value {entry!r}: expected a whole number, or a list of them"
            )
    if "mean" in given:
        raise E2ENetError(
            f"{where} has a label mean, which is the name of the mean over labels in tables and files: rename it"
        )
    named = {_values(entry): name for name, entry in given.items() if name != "ignore" and set(_values(entry)) != {0}}
    if not named:
        raise E2ENetError(f"{where} names no foreground label: at least one is needed to compare")
    try:
        manager = LabelManager(given, list(range(len(named))))  # the order in which regions are drawn does not matter here
    except (AssertionError, RuntimeError) as error:
        raise E2ENetError(
            f"{where} has labels that nnU-Net refuses: the background must be 0, and an ignore label one more than the highest"
        ) from error
    wanted = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    classes = {named[_values(entry)]: _values(entry) for entry in wanted}
    return Labels(classes, manager.ignore_label, tuple(int(value) for value in manager.all_labels))


def _is_whole(value: Any) -> bool:
    """Whether nnU-Net, which converts values by ``int``, changes nothing: 1, "1" and 1.0."""
    return str(value).isdecimal() or (isinstance(value, float) and value.is_integer())


def _values(entry: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(value) for value in entry) if isinstance(entry, (list, tuple)) else (int(entry),)
