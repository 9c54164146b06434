"""Pictures of what was segmented, a PNG for each case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nnunetv2_e2enet.deployment.images import WRITTEN
from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.deployment.preview import write_preview
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.imaging import read_header


def check_previews(images: Sequence[Path], model: PackedModel) -> None:
    """Raises E2ENetError unless pictures can be made of these images, each the first channel of a case."""
    ending = model.description.dataset["file_ending"]
    if ending not in WRITTEN:
        raise E2ENetError(f"--preview: images are *{ending}, but pictures are made of 3D scans only; leave it out")
    for image in images[:1]:
        header = read_header(image)
        if header.GetDimension() != 3 or header.GetNumberOfComponents() != 1:
            raise E2ENetError(f"--preview: {image} is not a 3D image of one channel; leave it out")


def write_previews(folder: Path, images: Sequence[Path], model: PackedModel, progress: bool = True) -> None:
    """Writes ``folder/CASE.png`` beside each segmentation, as ``write_preview``. The first channel is shown.

    Args:
        folder: segmentations of the model.
        images: the first channel of each case, named as nnU-Net wants it.
        model: a packed model, whose labels are drawn.
        progress: show a bar.

    Raises:
        E2ENetError: a file cannot be read or written, or is not a 3D image.
    """
    ending = model.description.dataset["file_ending"]
    ct = model.channels[0].casefold() == "ct"  # how nnU-Net knows
    for image in tqdm(images, desc="Previews", disable=not progress):
        case = image.name.removesuffix(f"_0000{ending}")
        write_preview(folder / f"{case}.png", image, folder / f"{case}{ending}", model.foreground, ct)
