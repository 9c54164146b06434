"""Overlay pictures of chosen cases, as data that a page can hold."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.cases import Case
from nnunetv2_e2enet.evaluation.comparison import Comparison, order_by_dice
from nnunetv2_e2enet.evaluation.labels import Labels
from nnunetv2_e2enet.evaluation.overlay import overlay

SHOWN = 2
"""Cases at each end."""
MOST_COLUMNS = 5
QUALITY = 82


@dataclass(frozen=True)
class Picture:
    """One case, drawn.

    Attributes:
        heading: why it is shown, with the name of the case.
        caption: Dice of each model.
        data: ``data:`` URL of the picture; empty where it could not be drawn, and ``caption`` says why.
    """

    heading: str
    caption: str
    data: str


def pictures(comparison: Comparison, images: Path | None) -> list[Picture]:
    """The cases of lowest and of highest mean Dice, and those on which the first two models differ most, as tested.

    Args:
        comparison: the models and cases.
        images: folder of ``CASE_0000`` files; the segmentations are shown without the image where it is None.
    """
    drawn = []
    for heading, index in _chosen(comparison).items():
        case = comparison.results.cases[index]
        means = comparison.results.case_means("dice")[:, index]
        dice = ("none" if np.isnan(mean) else f"{mean:.3f}" for mean in means)
        caption = ", ".join(f"{name} {mean}" for name, mean in zip(comparison.names, dice, strict=True))
        try:
            data = _draw(comparison, case, images)
        except E2ENetError as error:
            drawn.append(Picture(heading, f"Mean Dice: {caption}. No picture: {error}", ""))
        else:
            drawn.append(Picture(heading, f"Mean Dice: {caption}.", data))
    return drawn


def _chosen(comparison: Comparison) -> dict[str, int]:
    """Index of the case by heading; no case twice."""
    order = order_by_dice(comparison)
    if not order:
        return {}
    names = comparison.results.names
    n = min(SHOWN, len(order) // 2) or min(1, len(order))
    chosen = {f"Worst case {i + 1}: {names[index]}": index for i, index in enumerate(order[:n])}
    if len(order) > n:
        chosen |= {f"Best case {i + 1}: {names[index]}": index for i, index in enumerate(order[: -n - 1 : -1])}
    difference = comparison.case_differences("dice", 0, 1).to_numpy()
    if np.isnan(difference).all():
        return chosen
    first, second = comparison.names[:2]
    for best, value, index in (
        (first, np.nanmax(difference), int(np.nanargmax(difference))),
        (second, -np.nanmin(difference), int(np.nanargmin(difference))),
    ):
        if value > 0 and index not in chosen.values():
            chosen[f"{best} is furthest ahead, by {value:.3f}: {names[index]}"] = index
    return chosen


def _draw(comparison: Comparison, case: Case, images: Path | None) -> str:
    """A ``data:`` URL."""
    ending = comparison.models[0].source.file_ending
    columns = {"Reference": case.reference}
    columns |= dict(list(zip(comparison.names, case.predictions, strict=True))[: MOST_COLUMNS - 1])
    image = images / f"{case.name}_0000{ending}" if images else None
    if image is not None and not image.is_file():
        image = None
    figure = overlay(image, columns, value_names(comparison.labels))
    compressed = io.BytesIO()
    figure.savefig(compressed, format="webp", pil_kwargs={"quality": QUALITY})  # as a photograph
    return "data:image/webp;base64," + base64.b64encode(compressed.getvalue()).decode()


def value_names(labels: Labels) -> dict[int, str]:
    """A name for each label value: that of the smallest class or region which has it."""
    names = {}
    for value in labels.known:
        holders = [name for name, values in labels.classes.items() if value in values]
        if value and holders:
            names[value] = min(holders, key=lambda name: len(labels.classes[name]))
    return names
