"""Volumes of segmented labels, as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from math import prod
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.files import write

HEADER = ("case", "label", "millilitres")


def write_volumes(file: Path, segmentations: Sequence[Path], model: PackedModel, progress: bool = False) -> None:
    """Writes a CSV file: a row for each segmentation and each label or region but the background.

    Args:
        file: to write or replace.
        segmentations: of the model, with the file ending of its data set. Their names are those of the cases.
        model: a packed model, whose labels are counted.
        progress: show a bar.

    Raises:
        E2ENetError: the file cannot be written.
    """
    reader = model.description.managers()[0].image_reader_writer_class()
    ending = model.description.dataset["file_ending"]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for path in tqdm(segmentations, desc="Volumes", disable=not progress):
        segmentation, properties = reader.read_seg(str(path))
        counts = np.bincount(segmentation.astype(np.int64).ravel())
        for name, values in model.foreground.items():
            voxels = sum(int(counts[n]) for n in values if n < len(counts))
            writer.writerow((path.name.removesuffix(ending), name, f"{voxels * prod(properties['spacing']) / 1000:.3f}"))
    write(file, text.getvalue())
