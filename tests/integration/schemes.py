"""Small data sets in nnU-Net's raw format: the same cases under each of nnU-Net's label schemes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from nnunetv2_e2enet.datasets import LABELS, write_phantom_dataset

HIPPOCAMPUS = Path(__file__).resolve().parents[3] / "shared" / "data" / "Task04_Hippocampus"
N_TRAINING, N_TEST = 10, 2
ANNOTATED_SHARE = 1 / 3


@dataclass(frozen=True)
class Scheme:
    """How the labels of a data set are to be understood.

    Attributes:
        name: as the table shows it.
        number: of the data set.
        regions: whether overlapping regions are trained in the place of labels.
        ignore: whether most slices are not annotated.
    """

    name: str
    number: int
    regions: bool
    ignore: bool

    @property
    def dataset(self) -> str:
        return f"Dataset{self.number:03d}_Integration"

    def description(self, labels: dict[str, int]) -> dict[str, Any]:
        """What ``dataset.json`` says of the labels, given name and value of those of the source."""
        values = list(labels.values())
        foreground: dict[str, Any] = {name.replace(" ", "_"): value for name, value in labels.items()}
        result: dict[str, Any] = {"labels": {"background": 0, **foreground}}
        if self.regions:
            innermost = list(foreground)[-1]
            result["labels"] = {"background": 0, "foreground": values, innermost: values[-1]}
            result["regions_class_order"] = [values[0], values[-1]]
        if self.ignore:
            result["labels"]["ignore"] = max(values) + 1
        return result


SCHEMES = (
    Scheme("plain", 996, regions=False, ignore=False),
    Scheme("regions", 997, regions=True, ignore=False),
    Scheme("ignore", 998, regions=False, ignore=True),
    Scheme("regions + ignore", 999, regions=True, ignore=True),
)


@dataclass(frozen=True)
class Source:
    """Cases with all their labels.

    Attributes:
        name: where they are from.
        training: images and their segmentations.
        test: images alone.
        labels: name and value of each, from 1.
    """

    name: str
    training: tuple[tuple[Path, Path], ...]
    test: tuple[Path, ...]
    labels: dict[str, int]


def hippocampus() -> Source:
    """Real scans (Medical Segmentation Decathlon, Task04 Hippocampus), which lie beside the repository."""
    description = json.loads((HIPPOCAMPUS / "dataset.json").read_text())
    cases = sorted(case["image"] for case in description["training"])[:N_TRAINING]
    training = tuple((HIPPOCAMPUS / image, HIPPOCAMPUS / image.replace("imagesTr", "labelsTr")) for image in cases)
    test = tuple(HIPPOCAMPUS / image for image in sorted(description["test"])[:N_TEST])
    labels = {name: int(value) for value, name in description["labels"].items() if int(value)}
    return Source("Hippocampus", training, test, labels)


def phantoms(folder: Path, n_training: int = N_TRAINING) -> Source:
    """Synthetic scans, written to a folder of their own."""
    write_phantom_dataset(folder, n_training, N_TEST, size=(18, 52, 52))
    images = sorted((folder / "imagesTr").glob("*.nii.gz"))
    training = tuple((image, folder / "labelsTr" / image.name.replace("_0000", "")) for image in images)
    test = tuple(sorted((folder / "imagesTs").glob("*.nii.gz")))
    return Source("phantoms", training, test, {name: value for name, value in LABELS.items() if value})


def write_dataset(raw: Path, scheme: Scheme, source: Source) -> None:
    """The cases of a source under a label scheme, in ``raw``, nnU-Net's folder of raw data."""
    folder = raw / scheme.dataset
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    for target, images in (("imagesTr", [image for image, _ in source.training]), ("imagesTs", source.test)):
        for name, image in _numbered(images):
            (folder / target / f"{name}_0000.nii.gz").write_bytes(image.read_bytes())
    ignored = max(source.labels.values()) + 1
    for number, (name, label) in enumerate(_numbered([label for _, label in source.training])):
        segmentation = sitk.ReadImage(str(label))
        if scheme.ignore:
            segmentation = _partly_annotated(segmentation, ignored, np.random.default_rng(number))
        sitk.WriteImage(segmentation, str(folder / "labelsTr" / f"{name}.nii.gz"))
    description = {
        "channel_names": {"0": "MRI"},
        **scheme.description(source.labels),
        "numTraining": len(source.training),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))


def _numbered(files: list[Path] | tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    for number, file in enumerate(files):
        yield f"case_{number:02d}", file


def _partly_annotated(segmentation: sitk.Image, ignored: int, rng: np.random.Generator) -> sitk.Image:
    """The annotation of some slices; the rest has the ignore label. The largest foreground slice is always kept."""
    labels = sitk.GetArrayFromImage(segmentation)
    annotated = rng.random(len(labels)) < ANNOTATED_SHARE
    annotated[np.argmax((labels > 0).sum((1, 2)))] = True
    labels[~annotated] = ignored
    result = sitk.GetImageFromArray(labels)
    result.CopyInformation(segmentation)
    return result
