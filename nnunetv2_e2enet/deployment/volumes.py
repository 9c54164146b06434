"""Volumes of segmented labels, as CSV."""

from __future__ import annotations

import csv
from io import StringIO
from math import prod
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.files import write

HEADER = ("case", "label", "millilitres")


def write_volumes(folder: Path, model: PackedModel, progress: bool = False) -> Path:
    """Writes ``folder/volumes.csv``: a row for each segmentation in the folder and each label or region but the background.

    Args:
        folder: segmentations of the model, with the file ending of its data set.
        model: a packed model, whose labels are counted.
        progress: show a bar.

    Returns:
        The file.

    Raises:
        E2ENetError: it cannot be written.
    """
    reader = model.description.managers()[0].image_reader_writer_class()
    ending = model.description.dataset["file_ending"]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for path in tqdm(sorted(folder.glob(f"*{ending}")), desc="Volumes", disable=not progress):
        segmentation, properties = reader.read_seg(str(path))
        counts = np.bincount(segmentation.astype(np.int64).ravel())
        for name, values in model.foreground.items():
            voxels = sum(int(counts[n]) for n in values if n < len(counts))
            writer.writerow((path.name.removesuffix(ending), name, f"{voxels * prod(properties['spacing']) / 1000:.3f}"))
    file = folder / "volumes.csv"
    write(file, text.getvalue())
    return file
