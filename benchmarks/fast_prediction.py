"""What `e2enet predict --fast` gains and loses with a trained model, all of it and each part.

    python benchmarks/fast_prediction.py model.e2enet imagesTs labelsTs

Images and labels are in nnU-Net's raw format. Dice is the mean over labels and cases. Voxels that changed are those with
another label than without `--fast`, among all and among those of the foreground. The CPU predicts, with the engine.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from numpy.typing import NDArray

from nnunetv2_e2enet.cli.predict import FAST_STEP_SIZE, STEP_SIZE
from nnunetv2_e2enet.deployment import Segmenter, read_packed
from nnunetv2_e2enet.settings import CHOICES, STORAGE_16_BIT, override

FLOAT32 = CHOICES["engine_storage"][0]


@dataclass(frozen=True)
class Way:
    """How a scan is predicted."""

    name: str
    mirroring: bool = True
    step_size: float = STEP_SIZE
    storage: str = FLOAT32


WAYS = (
    Way("nnU-Net's defaults"),
    Way("maps in 16 bits", storage=STORAGE_16_BIT),
    Way("no mirroring", mirroring=False),
    Way(f"steps of {FAST_STEP_SIZE}", step_size=FAST_STEP_SIZE),
    Way("--fast: all three", mirroring=False, step_size=FAST_STEP_SIZE, storage=STORAGE_16_BIT),
)


@dataclass(frozen=True)
class Outcome:
    """Of one way, for all cases."""

    cpu_seconds: float
    segmentations: list[NDArray[np.integer]]


def predict(segmenter: Segmenter, way: Way, cases: list[list[Path]]) -> Outcome:
    start = time.process_time()
    with override(engine="on", engine_storage=way.storage):
        segmentations = [segmenter(channels) for channels in cases]
    return Outcome(time.process_time() - start, segmentations)


def dice(segmentation: NDArray[np.integer], reference: NDArray[np.integer], labels: dict[str, list[int]]) -> list[float]:
    """Of each label or region; what is in neither counts as found."""
    values = []
    for parts in labels.values():
        ours, theirs = np.isin(segmentation, parts), np.isin(reference, parts)
        size = int(ours.sum()) + int(theirs.sum())
        values.append(2 * int((ours & theirs).sum()) / size if size else 1.0)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    arguments = parser.parse_args()
    model = read_packed(arguments.model)
    ending = model.description.dataset["file_ending"]
    names = sorted(path.name.removesuffix(f"_0000{ending}") for path in arguments.images.glob(f"*_0000{ending}"))
    cases = [[arguments.images / f"{n}_{i:04d}{ending}" for i in range(len(model.channels))] for n in names]
    references = [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(arguments.labels / f"{n}{ending}")) for n in names]
    outcomes: dict[str, Outcome] = {}
    for way in WAYS:
        segmenter = Segmenter(model, step_size=way.step_size, mirroring=way.mirroring)
        predict(segmenter, way, cases[:1])  # packs the weights
        outcomes[way.name] = predict(segmenter, way, cases)
        print(f"{way.name}: {outcomes[way.name].cpu_seconds:.1f} s", flush=True)
    usual = outcomes[WAYS[0].name]
    foreground = sum(int((s > 0).sum()) for s in usual.segmentations)
    voxels = sum(s.size for s in usual.segmentations)
    print(f"{len(cases)} scans, {voxels:,} voxels, {foreground:,} of them foreground, {torch.get_num_threads()} threads")
    print("| | CPU time | Dice | difference | voxels changed | of the foreground |\n| --- | --- | --- | --- | --- | --- |")
    means = {}
    for name, outcome in outcomes.items():
        pairs = zip(outcome.segmentations, references, strict=True)
        means[name] = float(np.mean([dice(ours, theirs, model.foreground) for ours, theirs in pairs]))
        both = list(zip(outcome.segmentations, usual.segmentations, strict=True))
        changed = sum(int((ours != theirs).sum()) for ours, theirs in both)
        inside = sum(int(((ours != theirs) & (theirs > 0)).sum()) for ours, theirs in both)
        lost = means[name] - means[WAYS[0].name]
        print(
            f"| {name} | {outcome.cpu_seconds / usual.cpu_seconds:.3f} | {means[name]:.4f} | {lost:+.4f} | "
            f"{changed:,} ({changed / voxels:.3%}) | {inside / foreground:.2%} |"
        )


if __name__ == "__main__":
    main()
