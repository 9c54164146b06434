"""``e2enet demo``: phantom data through nnU-Net's own commands, E2ENet beside stock nnU-Net."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from nnunetv2_e2enet.cli.output import plain_console
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import make_writable, read_json
from nnunetv2_e2enet.registration import console_command, find_nnunet, find_trainer

if TYPE_CHECKING:
    from nnunetv2_e2enet.network import Counts

HELP = "train E2ENet and stock nnU-Net on phantom data, predict, compare (minutes on two CPU cores)"

DATASET_ID = 990
DATASET = f"Dataset{DATASET_ID}_Phantom"
CONFIGURATION = "3d_fullres"
MODELS = {"E2ENet": "nnUNetTrainerE2ENet_demo", "nnU-Net": "nnUNetTrainer_demo"}
EXPECTED_DICE = 0.85
SIZE = ("20", "56", "56")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  e2enet demo --folder /tmp/e2enet_demo\n"
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="new folder for all that it writes (default: demo)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="device (default: cuda if there is one, else cpu)")


@dataclass(frozen=True)
class Workspace:
    """The folders of a demo, and the environment that its commands run in."""

    folder: Path
    device: str

    @property
    def raw(self) -> Path:
        """nnU-Net's folder of the phantom data set."""
        return self.folder / "nnUNet_raw" / DATASET

    @property
    def preprocessed(self) -> Path:
        """nnU-Net's folder of its preprocessed cases and plans."""
        return self.folder / "nnUNet_preprocessed" / DATASET

    def model(self, trainer: str) -> Path:
        """The model folder of a trainer."""
        return self.folder / "nnUNet_results" / DATASET / f"{trainer}__nnUNetPlans__{CONFIGURATION}"

    def predictions(self, trainer: str) -> Path:
        """The folder of a trainer's segmentations."""
        return self.folder / "predictions" / trainer

    def environment(self) -> dict[str, str]:
        """The environment of this process, with nnU-Net's folders in the workspace."""
        folders = {name: str(self.folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        # nnU-Net starts 8 export processes however few cores there are
        return {**os.environ, **folders, "nnUNet_def_n_proc": _processes()}


def run(args: argparse.Namespace) -> int:
    find_nnunet()
    for trainer in MODELS.values():
        find_trainer(trainer)
    from nnunetv2_e2enet.machine import check_device

    device = args.device or _best_device()
    check_device(device, "--device")
    folder = args.folder.resolve()
    make_writable(folder)
    if any(folder.iterdir()):
        raise E2ENetError(f"{folder} is not empty: remove it, or name a new one with --folder")
    workspace = Workspace(folder, device)
    console = plain_console()
    for title, command in _commands(workspace):
        _run(console, workspace, title, command)
    return _report(console, workspace)


def _processes() -> str:
    """One for each core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(min(8, cores))


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _commands(work: Workspace) -> list[tuple[str, list[str]]]:
    dataset = str(DATASET_ID)
    commands = [
        ("Phantom data", ["e2enet", "phantom", dataset, "--size", *SIZE]),
        (
            "Plan and preprocess",
            [
                *("nnUNetv2_plan_and_preprocess", "-d", dataset, "-c", CONFIGURATION),
                *("--verify_dataset_integrity", "-np", _processes(), "-npfp", _processes()),
            ],
        ),
    ]
    for name, trainer in MODELS.items():
        commands.append(
            (f"Train {name}", ["nnUNetv2_train", dataset, CONFIGURATION, "0", "-tr", trainer, "-device", work.device])
        )
    for name, trainer in MODELS.items():
        folders = ["-i", str(work.raw / "imagesTs"), "-o", str(work.predictions(trainer))]
        model = ["-d", dataset, "-c", CONFIGURATION, "-f", "0", "-tr", trainer]
        options = ["--disable_tta", "-device", work.device, "-npp", "1", "-nps", "1"]  # an eighth of the time for both
        commands.append((f"Predict with {name}", ["nnUNetv2_predict", *folders, *model, *options]))
        description = ["-djfile", str(work.raw / "dataset.json"), "-pfile", str(work.model(trainer) / "plans.json")]
        compared = [str(work.raw / "labelsTs"), str(work.predictions(trainer))]
        commands.append((f"Evaluate {name}", ["nnUNetv2_evaluate_folder", *compared, *description]))
    return commands


def _run(console: Console, work: Workspace, title: str, command: list[str]) -> None:
    """One console command, its output in a log file.

    Raises:
        E2ENetError: the command failed.
    """
    log = work.folder / "logs" / f"{title.lower().replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with console.status(f"{title} …"), log.open("w") as output:
        result = subprocess.run(
            [*console_command(command[0]), *command[1:]],
            env=work.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if result.returncode:
        raise E2ENetError(f"`{' '.join(command[:3])} …` ended with exit code {result.returncode}: see {log}")
    console.print(f"{title:<22}{time.monotonic() - start:6.0f} s   {command[0]}")


def _report(console: Console, work: Workspace) -> int:
    from nnunetv2_e2enet.evaluation.overlay import write_overlay
    from nnunetv2_e2enet.training.timed import TRAINING_TIME_FILE

    labels = {value: name for name, value in read_json(work.raw / "dataset.json")["labels"].items() if value}
    dice = {name: _dice(work.predictions(trainer) / "summary.json") for name, trainer in MODELS.items()}
    table = Table(title="Dice on held-out phantoms (no mirroring), and size of the networks")
    table.add_column("")
    for name in MODELS:
        table.add_column(name, justify="right")
    for value, label in labels.items():
        table.add_row(label, *(f"{dice[name][str(value)]:.3f}" for name in MODELS))
    table.add_section()
    table.add_row("mean foreground Dice", *(f"{dice[name]['foreground']:.3f}" for name in MODELS), style="bold")
    counts = {name: _parameters(work.model(trainer)) for name, trainer in MODELS.items()}
    table.add_row("parameters active", *(f"{counts[name].active:,}" for name in MODELS))
    table.add_row("parameters in total", *(f"{counts[name].total:,}" for name in MODELS))
    times = {name: read_json(work.model(trainer) / "fold_0" / TRAINING_TIME_FILE) for name, trainer in MODELS.items()}
    table.add_row("seconds of training", *(f"{times[name]['seconds']:.0f}" for name in MODELS))
    table.add_row("iterations in these", *(f"{times[name]['iterations']:,}" for name in MODELS))
    console.print(table)

    case = min((work.raw / "labelsTs").glob("*.nii.gz"))
    columns = {"Reference": case}
    columns |= {name: work.predictions(trainer) / case.name for name, trainer in MODELS.items()}
    picture = work.folder / "overlay.png"
    image = work.raw / "imagesTs" / case.name.replace(".nii.gz", "_0000.nii.gz")
    write_overlay(picture, image, columns, labels)
    console.print(f"Overlay: {picture}", soft_wrap=True)

    reached = dice["E2ENet"]["foreground"]
    if reached < EXPECTED_DICE:
        raise E2ENetError(f"E2ENet reached a mean foreground Dice of {reached:.3f}, but at least {EXPECTED_DICE} is expected")
    return 0


def _dice(summary: Path) -> dict[str, float]:
    """Mean Dice by label, and ``foreground``."""
    content = read_json(summary)
    by_label = {label: metrics["Dice"] for label, metrics in content["mean"].items()}
    return {**by_label, "foreground": content["foreground_mean"]["Dice"]}


def _parameters(model: Path) -> Counts:
    """Parameter counts of the network of a model folder, with its topology."""
    from nnunetv2_e2enet.evaluation.networks import model_design
    from nnunetv2_e2enet.network.accounts import parameter_counts

    return parameter_counts(model_design(model, model.name).build())
