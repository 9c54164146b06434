"""Volumes of segmented labels, as CSV."""

from __future__ import annotations

import csv
from io import StringIO
from math import prod
from pathlib import Path

import numpy as np

from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.files import write_text

HEADER = ("case", "label", "millilitres")


def write_volumes(folder: Path, model: PackedModel) -> Path:
    """Writes ``folder/volumes.csv``: a row for each segmentation in the folder and each label or region but the background.

    Args:
        folder: segmentations of the model, with the file ending of its data set.
        model: a packed model, whose labels are counted.

    Returns:
        The file.

    Raises:
        E2ENetError: it cannot be written.
    """
    dataset = model.description.dataset
    reader = model.description.managers()[0].image_reader_writer_class()
    ending = dataset["file_ending"]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for path in sorted(folder.glob(f"*{ending}")):
        segmentation, properties = reader.read_seg(str(path))
        counts = np.bincount(segmentation.astype(np.int64).ravel())
        for name, numbers in dataset["labels"].items():
            if name in ("background", "ignore"):
                continue
            parts = numbers if isinstance(numbers, (list, tuple)) else [numbers]
            voxels = sum(int(counts[n]) for n in parts if n < len(counts))
            writer.writerow((path.name.removesuffix(ending), name, f"{voxels * prod(properties['spacing']) / 1000:.3f}"))
    file = folder / "volumes.csv"
    write_text(file, text.getvalue())
    return file
