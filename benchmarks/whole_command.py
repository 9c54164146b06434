"""Wall time and memory of `nnUNetv2_predict -device cpu`: stock nnU-Net, E2ENet with the engine on and off.

    python benchmarks/whole_command.py --task path/to/Task04_Hippocampus    # real scans of the Medical Segmentation Decathlon
    python benchmarks/whole_command.py                                       # a phantom whose patch is 64 x 160 x 160
    python benchmarks/whole_command.py --ct                                  # 100 slices of 512 x 512 voxels, 15 organs

The models have random weights, which cost the same time as trained ones. The commands run in turn, round by round. Memory is
the largest resident set of one process of the command, and the largest sum over all its processes (a page that several share
counts once), looked at four times a second. Ratios are those of each round to stock nnU-Net's in the same round. `--ct`
measures stock nnU-Net and E2ENet with maps in float32 and in 16 bits, unless `--only` names others. The table is printed after
each round, and `--json` is written after each command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import recording
import SimpleITK
import torch
from contestants import amos_labels, as_amos
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from recording import Table

from nnunetv2_e2enet.engine import ENGINE_VARIABLE, STORAGE_VARIABLE
from nnunetv2_e2enet.evaluation.provenance import processor
from nnunetv2_e2enet.registration import console_command, find_nnunet, is_registered
from nnunetv2_e2enet.settings import STORAGE_16_BIT, variable

DATASET, NUMBER, CONFIGURATION, PLANS = "Dataset991_Benchmark", "991", "3d_fullres", "nnUNetPlans"
PREDICTOR_VARIABLE = variable("predictor")
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class Variant:
    name: str
    trainer: str
    engine: str = "on"
    storage: str = "float32"
    predictor: str = "on"


VARIANTS = (
    Variant("stock nnU-Net", "nnUNetTrainer"),
    Variant("E2ENet, engine on", "nnUNetTrainerE2ENet"),
    Variant("E2ENet, engine on, nnU-Net's way around the network", "nnUNetTrainerE2ENet", predictor="off"),
    Variant("E2ENet, engine off", "nnUNetTrainerE2ENet", engine="off"),
    Variant(f"E2ENet, engine on, maps in {STORAGE_16_BIT}", "nnUNetTrainerE2ENet", storage=STORAGE_16_BIT),
)
STOCK = VARIANTS[0]
CT_VARIANTS = (0, 1, 4)
SECONDS_BETWEEN_LOOKS = 0.25


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)
    largest_process: list[float] = field(default_factory=list)  # GiB
    all_processes: list[float] = field(default_factory=list)  # GiB


def run(folder: Path, name: str, *arguments: str) -> None:
    environment = {**os.environ, **{variable: str(folder / variable) for variable in FOLDERS}}
    result = subprocess.run([*console_command(name), *arguments], env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{name} ended with exit code {result.returncode}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")


def take_scans(task: Path, raw: Path, n_training: int, n_images: int) -> None:
    """Scans of a Decathlon task as one of nnU-Net's raw data sets."""
    description = json.loads((task / "dataset.json").read_text())
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / name).mkdir(parents=True)
    cases = sorted(Path(case["image"]).name for case in description["training"])
    for case in cases[:n_training]:
        shutil.copy(task / "imagesTr" / case, raw / "imagesTr" / case.replace(".nii.gz", "_0000.nii.gz"))
        shutil.copy(task / "labelsTr" / case, raw / "labelsTr" / case)
    for case in cases[n_training : n_training + n_images]:
        shutil.copy(task / "imagesTr" / case, raw / "imagesTs" / case.replace(".nii.gz", "_0000.nii.gz"))
    labels = {name: int(value) for value, name in description["labels"].items()}
    content = {"channel_names": description["modality"], "labels": labels, "numTraining": n_training, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(content))


def write_ct(path: Path, slices: int) -> None:
    """A body with 15 organs in Hounsfield units, 512 x 512 voxels of 0.8 x 0.8 x 2.5 mm a slice."""
    generator = np.random.default_rng(0)
    shape = (slices, 512, 512)
    places = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)

    def ellipsoid(centre: Sequence[float], radii: Sequence[float]) -> NDArray[np.bool_]:
        return sum(((p - c) / r) ** 2 for p, c, r in zip(places, centre, radii, strict=True)) < 1

    image = np.full(shape, -1000, np.float32)
    image[ellipsoid((0, 0, 0), (4, 0.7, 0.9))] = 40
    for _ in range(15):
        inside = ellipsoid(generator.uniform(-0.5, 0.5, 3), generator.uniform(0.05, 0.3, 3))
        image[inside] = generator.uniform(-100, 300)
    image += generator.normal(0, 20, shape).astype(np.float32)
    scan = SimpleITK.GetImageFromArray(image.astype(np.int16))
    scan.SetSpacing((0.8, 0.8, 2.5))
    SimpleITK.WriteImage(scan, path)


def take_ct(folder: Path, slices: int) -> None:
    """The CT as the only image to predict, and 16 classes."""
    raw = folder / "nnUNet_raw" / DATASET
    for path in (raw / "imagesTs").iterdir():
        path.unlink()
    write_ct(raw / "imagesTs" / "ct_0000.nii.gz", slices)
    dataset = amos_labels(json.loads((raw / "dataset.json").read_text()))
    (raw / "dataset.json").write_text(json.dumps(dataset))


def prepare(folder: Path, task: Path | None, slices: int | None) -> list[int]:
    """Data, plans and models with random weights; returns the patch size."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    raw = folder / "nnUNet_raw" / DATASET
    if task is None:
        size = ["--size", "64", "160", "160"]
        run(folder, "e2enet", "phantom", NUMBER, "--name", "Benchmark", "--cases", "2", "--test-cases", "1", *size)
    else:
        take_scans(task, raw, n_training=5, n_images=10)
    run(folder, "nnUNetv2_plan_and_preprocess", "-d", NUMBER, "-c", CONFIGURATION, "-npfp", "1", "--no_pp")
    preprocessed = folder / "nnUNet_preprocessed" / DATASET
    plans = json.loads((preprocessed / f"{PLANS}.json").read_text())
    if task is None:
        plans = as_amos(plans, CONFIGURATION)
    if slices is not None:
        take_ct(folder, slices)
        plans["configurations"][CONFIGURATION]["spacing"] = [2.5, 1.0, 1.0]
    dataset = json.loads((raw / "dataset.json").read_text())
    for trainer in {variant.trainer for variant in VARIANTS}:
        write_model(folder / "nnUNet_results" / DATASET / f"{trainer}__{PLANS}__{CONFIGURATION}", trainer, plans, dataset)
    return list(plans["configurations"][CONFIGURATION]["patch_size"])


def write_model(model: Path, trainer: str, plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    manager = PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    channels = determine_num_input_channels(manager, configuration, dataset)
    classes = manager.get_label_manager(dataset).num_segmentation_heads
    torch.manual_seed(0)
    network = recursive_find_trainer_class_by_name(trainer).build_network_architecture(
        manager, configuration, channels, classes, enable_deep_supervision=False
    )
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": trainer,
        "init_args": {"configuration": CONFIGURATION},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    (model / "fold_0").mkdir(parents=True)
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))


def memory_of_tree(process: int) -> int:
    """Bytes of a process and all below it; of a page that several share, each is charged its part."""
    total = 0
    todo = [process]
    while todo:
        folder = Path("/proc") / str(todo.pop())
        try:
            rows = (folder / "smaps_rollup").read_text().splitlines()
            total += 1024 * sum(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
            for thread in (folder / "task").iterdir():
                todo += map(int, (thread / "children").read_text().split())
        except OSError:
            continue  # it ended meanwhile
    return total


def measure(folder: Path, variant: Variant, options: list[str], measured: Measured) -> None:
    environment = {**os.environ, **{name: str(folder / name) for name in FOLDERS}}
    environment |= {ENGINE_VARIABLE: variant.engine, STORAGE_VARIABLE: variant.storage, PREDICTOR_VARIABLE: variant.predictor}
    images, output = folder / "nnUNet_raw" / DATASET / "imagesTs", folder / "predictions" / variant.name
    arguments = ["-i", str(images), "-o", str(output), "-d", NUMBER, "-c", CONFIGURATION, "-f", "0", "-tr", variant.trainer]
    arguments += ["-device", "cpu", "-npp", "1", "-nps", "1", *options]
    log = folder / "log.txt"
    begin = time.perf_counter()
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*console_command("nnUNetv2_predict"), *arguments], env=environment, stdout=file, stderr=file
        ) as process,
    ):
        most = 0
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            most = max(most, memory_of_tree(process.pid))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(
            f"nnUNetv2_predict of {variant.name} ended with exit code {process.returncode}:\n{log.read_text()[-3000:]}"
        )
    measured.seconds.append(time.perf_counter() - begin)
    measured.largest_process.append(usage.ru_maxrss / 2**20)
    measured.all_processes.append(most / 2**30)


def tables(results: dict[str, Measured]) -> list[Table]:
    """Of all rounds so far."""
    return [
        Table("Seconds of the command", {name: m.seconds for name, m in results.items()}, [STOCK.name]),
        Table("Memory of all processes", {name: m.all_processes for name, m in results.items()}, [STOCK.name], unit="GiB"),
        Table(
            "Memory of the largest process", {name: m.largest_process for name, m in results.items()}, [STOCK.name], unit="GiB"
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", type=Path, help="a task of the Medical Segmentation Decathlon, instead of the phantom")
    parser.add_argument("--ct", type=int, nargs="?", const=100, metavar="SLICES", help="a CT instead of the phantom (100)")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="of the variants, counted from 0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-engine-off", action="store_true", help="E2ENet in PyTorch takes minutes on a large patch")
    parser.add_argument("--mirrors", action="store_true", help="test-time augmentation, as nnU-Net does unless told otherwise")
    parser.add_argument("--step-size", default="0.5", help="of the sliding window; 1 for a quick look (default: 0.5)")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    arguments = parser.parse_args()
    chosen = arguments.only or (CT_VARIANTS if arguments.ct is not None else range(len(VARIANTS)))
    variants = [VARIANTS[n] for n in chosen if VARIANTS[n].engine == "on" or not arguments.without_engine_off]
    if not is_registered(find_nnunet()):
        raise SystemExit("nnU-Net's commands do not find E2ENet: run `e2enet register` first")
    options = ["-step_size", arguments.step_size, *([] if arguments.mirrors else ["--disable_tta"])]
    results = {variant.name: Measured() for variant in variants}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "nnunet"
        patch = prepare(folder, arguments.task, arguments.ct)
        images = len(list((folder / "nnUNet_raw" / DATASET / "imagesTs").iterdir()))
        size = " x ".join(map(str, patch))
        print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {images} scans, patch {size}")
        for n in range(1, arguments.rounds + 1):
            for variant in variants:
                measured = results[variant.name]
                measure(folder, variant, options, measured)
                print(
                    f"round {n}, {variant.name}: {measured.seconds[-1]:.1f} s, {measured.all_processes[-1]:.2f} GiB",
                    flush=True,
                )
                if arguments.json is not None:
                    recording.write(arguments.json, tables(results))
            print(f"after round {n} of {arguments.rounds}", *(line for t in tables(results) for line in t.lines()), sep="\n")


if __name__ == "__main__":
    main()
