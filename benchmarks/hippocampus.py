"""Dice of E2ENet beside stock nnU-Net on MSD Task04 Hippocampus, trained under the same conditions.

All contestants have the same data, plans, splits, batches, augmentation, number of iterations and seeds, and are trained by
nnU-Net's own loop. Training goes on where it stopped: call the program again, by hand or from a job scheduler, until it says
that all is done. Each call ends after ``--minutes`` (the epoch that has begun is finished, a validation too), and trains one
epoch at least. A call that was killed costs the epoch that it was in.

    # Task04_Hippocampus from http://medicaldecathlon.com, unpacked
    python benchmarks/hippocampus.py --source Task04_Hippocampus --folder hippocampus --epochs 250 --folds 0 1 --minutes 9

``--phantoms`` asks another question: many classes and little data. In the place of Hippocampus there are phantoms of fifteen
structures; fold 0 trains with 8 cases and fold 1 with 32, and both are validated on the same 16.

On a CPU batches are smaller and trainings shorter (``--batch-size 2 --epochs 50``), and ``--bfloat16`` trains nnU-Net's own
network in the number format that some CPUs multiply faster.

Results: ``FOLDER/hippocampus.json``, or ``phantoms.json``, for each contestant and fold: Dice, of each case too, epochs,
times, pseudo Dice of each epoch, parameters and multiply-accumulates, machine and commit of each call. ``make results``
makes tables and figures of such records in docs/results. When all of Hippocampus is done, ``FOLDER/comparison.json`` and
``comparison.html`` are the comparison with confidence intervals of ``e2enet compare``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import contestants
import numpy as np
import torch

from nnunetv2_e2enet import files
from nnunetv2_e2enet.evaluation.costs import count_costs
from nnunetv2_e2enet.registration import console_command
from nnunetv2_e2enet.training.architecture import scaled_architecture
from nnunetv2_e2enet.training.checkpoints import newest_checkpoint, read_checkpoint
from nnunetv2_e2enet.training.crossval import Fold, FoldState
from nnunetv2_e2enet.training.dsff import DSFFMixin
from nnunetv2_e2enet.training.trainer import E2ENetMixin
from nnunetv2_e2enet.training.variants import variant

HIPPOCAMPUS, PHANTOMS = "Dataset004_Hippocampus", "Dataset990_Phantoms"
TRAINED_WITH, VALIDATED_ON = (8, 32), 16  # phantoms
CONFIGURATION, PLANS = "3d_fullres", "nnUNetPlans"
COSTS_FILE = "costs.json"  # in the folder of a fold
CALLS_FILE = "calls.json"  # beside it: machine and commit of each call that trained the fold, and its first epoch


class TimeIsUp(Exception):  # noqa: N818 (nothing went wrong)
    """The rest is for the next call."""


def prepare(dataset: str, source: Path, folder: Path, processes: int) -> None:
    """The raw data, and nnU-Net's planning and preprocessing, once."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(folder / name)
        (folder / name).mkdir(parents=True, exist_ok=True)
    preprocessed = folder / "nnUNet_preprocessed" / dataset
    done = preprocessed / "prepared"
    if done.is_file():
        return
    number, name = dataset.removeprefix("Dataset").split("_")
    cases = max(TRAINED_WITH) + VALIDATED_ON
    if not (folder / "nnUNet_raw" / dataset / "dataset.json").is_file():
        if dataset == PHANTOMS:
            run("e2enet", "phantom", number, "--name", name, "--many", "--cases", str(cases), "--test-cases", "0")
        elif source.is_dir():
            run("nnUNetv2_convert_MSD_dataset", "-i", str(source), "-np", str(processes))
        else:
            raise SystemExit(f"{source} is not there: unpack Task04_Hippocampus and name its folder with --source")
    cores = ["-np", str(processes), "-npfp", str(processes)]
    run("nnUNetv2_plan_and_preprocess", "-d", number, "-c", CONFIGURATION, *cores)
    if dataset == PHANTOMS:
        names = [f"phantom_{i:03d}" for i in range(cases)]
        splits = [{"train": names[VALIDATED_ON : VALIDATED_ON + n], "val": names[:VALIDATED_ON]} for n in TRAINED_WITH]
        files.write_atomically(preprocessed / "splits_final.json", json.dumps(splits))
    done.touch()


def run(command: str, *arguments: str) -> None:
    subprocess.run([*console_command(command), *arguments], check=True)


def until(deadline: float, base: Any, epochs: int, iterations: tuple[int, int]) -> Any:
    """A trainer that trains as ``base`` does, in its folder, and stops at an epoch's end once the time is up.

    Each epoch leaves a checkpoint, so that a training that is killed goes on at the epoch where that happened.
    """
    train, validate = iterations
    length = {"num_epochs": epochs, "num_iterations_per_epoch": train, "num_val_iterations_per_epoch": validate}

    class Sliced(variant(base, "sliced", **length, save_every=1)):  # type: ignore[misc]
        def on_epoch_end(self) -> None:
            super().on_epoch_end()
            if time.time() > deadline and self.current_epoch < self.num_epochs:
                raise TimeIsUp

        def save_checkpoint(self, filename: str) -> None:
            """nnU-Net's own trainer writes into the file that it replaces, of which a kill would leave a part."""
            partial = Path(f"{filename}.tmp")
            super().save_checkpoint(str(partial))
            partial.replace(filename)

    Sliced.__name__ = base.__name__  # names the folder, and what a checkpoint says of its trainer
    return Sliced


def renamed(cls: Any, like: Any) -> Any:
    cls.__name__ = like.__name__
    return cls


def in_bfloat16(base: Any) -> Any:
    """A trainer whose network trains under bfloat16 autocast on the CPU; loss, validation and prediction stay float32.

    Autocast on the CPU, unlike that on a GPU, would compute the loss's softmax in bfloat16 as well.
    """

    class InBfloat16(base):  # type: ignore[misc]
        def initialize(self) -> None:
            super().initialize()
            network, forward = self.network, self.network.forward

            def in_bfloat16(x: torch.Tensor) -> Any:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=network.training):
                    logits = forward(x)
                return [level.float() for level in logits] if isinstance(logits, list) else logits.float()

            network.forward = in_bfloat16

    InBfloat16.__name__ = base.__name__
    return InBfloat16


def seeded(seed: int) -> None:
    """Weights, topology and the order of cases follow from it; nnU-Net's augmentation in other processes does not."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what nnU-Net draws from)
    torch.manual_seed(seed)


def train(contestant: str, dataset_name: str, fold: Fold, deadline: float, given: argparse.Namespace) -> None:
    """Bring a fold to its end, or as far as there is time.

    Raises:
        TimeIsUp: it is not at its end.
    """
    plans, dataset = contestants.load_plans(dataset_name, PLANS)
    if given.batch_size:
        plans["configurations"][CONFIGURATION]["batch_size"] = given.batch_size
    state = fold.state()
    iterations = (given.iterations, given.validation_iterations)
    base = contestants.trainer_class(contestant)
    if given.width and issubclass(base, E2ENetMixin):
        channels = {"base_num_features": round(given.width * 48), "max_num_features": round(given.width * 320)}
        base = renamed(variant(base, "width", **channels), base)
    elif given.width:
        entry = plans["configurations"][CONFIGURATION]
        entry["architecture"] = scaled_architecture(entry["architecture"], given.width)
    if issubclass(base, DSFFMixin):
        base = renamed(variant(base, "seeded", topology_seed=given.seed), base)
    if given.bfloat16 and given.device == "cpu" and contestant == contestants.BASELINE:
        base = in_bfloat16(base)
    cls = until(deadline, base, given.epochs, iterations)
    seed = 1000 * given.seed + fold.number
    seeded(seed)
    contestants.as_nnunet_trains(given.device)
    torch._dynamo.reset()  # or the networks of a class count together, and from the ninth on run eagerly
    plans["continue_training"] = state is not FoldState.NEW
    trainer = cls(plans, CONFIGURATION, fold.number, dataset, torch.device(given.device))
    if state is FoldState.TRAINED:
        trainer.load_checkpoint(str(fold.folder / "checkpoint_final.pth"))
    else:
        if state is FoldState.STARTED:
            trainer.load_checkpoint(str(newest_checkpoint(fold.folder)))
            seeded(seed + 10**6 * trainer.current_epoch)  # the same number again would repeat batches of the first epochs
        add_call(fold.folder, trainer.current_epoch, given.device)
        try:
            trainer.run_training()
        finally:
            for loader in (trainer.dataloader_train, trainer.dataloader_val):
                getattr(loader, "_finish", lambda: None)()
    patch = trainer.configuration_manager.patch_size
    costs = count_costs(trainer.network, (1, trainer.num_input_channels, *patch))
    files.write_atomically(fold.folder / COSTS_FILE, json.dumps(asdict(costs)))
    trainer.perform_actual_validation(save_probabilities=False)


def add_call(folder: Path, epoch: int, device: str) -> None:
    call = {"epoch": epoch, "machine": contestants.machine(device), "commit": contestants.COMMIT}
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_calls(folder) if epoch else []
    files.write_atomically(folder / CALLS_FILE, json.dumps([*earlier, call]))


def read_calls(folder: Path) -> list[dict[str, Any]]:
    file = folder / CALLS_FILE
    calls: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return calls


def result(fold: Fold) -> dict[str, Any]:
    checkpoint = read_checkpoint(fold.folder / "checkpoint_final.pth")
    logged, calls = checkpoint["logging"], read_calls(fold.folder)
    seconds = [e - s for s, e in zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"], strict=True)]
    summary = json.loads((fold.folder / "validation" / "summary.json").read_text())
    of_cases = {Path(case["prediction_file"]).name: case["metrics"] for case in summary["metric_per_case"]}
    names = {str(value): name for name, value in json.loads((fold.model / "dataset.json").read_text())["labels"].items()}
    return {
        "dice": summary["foreground_mean"]["Dice"],
        "structures": [names[label] for label in summary["metric_per_case"][0]["metrics"]],
        "case_dice": {name: [metrics[label]["Dice"] for label in metrics] for name, metrics in sorted(of_cases.items())},
        "costs": json.loads((fold.folder / COSTS_FILE).read_text()),
        "cases": len(summary["metric_per_case"]),
        "epochs": checkpoint["current_epoch"],
        "median_epoch_seconds": float(np.median(seconds)),
        "pseudo_dice": [float(dice) for dice in logged["mean_fg_dice"]],
        "epoch_seconds": [round(float(s), 3) for s in seconds],
        "calls": calls,
        "machine": calls[-1]["machine"],
    }


def compare(models: dict[str, Path], folds: Sequence[int], folder: Path) -> None:
    """The comparison of all contestants over the folds of this call."""
    written = ["--json", str(folder / "comparison.json"), "--report", str(folder / "comparison.html")]
    chosen = ["--folds", *map(str, folds)]
    run("e2enet", "compare", *(f"{name}={model}" for name, model in models.items()), *chosen, *written)


def main(arguments: Sequence[str] | None = None) -> None:
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("Task04_Hippocampus"), help="the unpacked data set")
    parser.add_argument("--phantoms", action="store_true", help="in the place of Hippocampus: many classes, little data")
    parser.add_argument("--folder", type=Path, required=True, help="for everything that nnU-Net and this program write")
    others = (*contestants.SAME_RESULTS, *contestants.ABLATIONS)
    trained = [name for name in contestants.CONTESTANTS if name not in others]
    parser.add_argument("--contestants", nargs="+", default=trained, choices=contestants.CONTESTANTS)
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=250)
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("--validation-iterations", type=int, default=50)
    parser.add_argument("--batch-size", type=int, help="default: that of the plans")
    parser.add_argument("--width", type=float, help="times the channels of all networks; default: full widths")
    parser.add_argument("--bfloat16", action="store_true", help="train nnU-Net's own trainer in bfloat16 on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no epoch is begun")
    parser.add_argument("--processes", type=int, default=2, help="for the preprocessing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    if given.bfloat16 and given.device != "cpu":
        parser.error("--bfloat16 is of trainings on a CPU; nnU-Net trains on a GPU in mixed precision anyway")
    if given.phantoms and max(given.folds) >= len(TRAINED_WITH):
        parser.error(f"--folds {max(given.folds)}: phantoms have the folds 0 to {len(TRAINED_WITH) - 1}")
    contestants.check_device(given.device)
    given.folder.mkdir(parents=True, exist_ok=True)
    given_settings = ("epochs", "iterations", "validation_iterations", "batch_size", "width", "bfloat16", "seed")
    settings = {name: getattr(given, name) for name in given_settings} | ({"phantoms": True} if given.phantoms else {})
    dataset = PHANTOMS if given.phantoms else HIPPOCAMPUS
    file = given.folder / f"{'phantoms' if given.phantoms else 'hippocampus'}.json"
    record = contestants.Record(file, {"settings": settings}, given_by="folder")
    prepare(dataset, given.source, given.folder.resolve(), given.processes)

    results = given.folder / "nnUNet_results" / dataset
    names = {c: contestants.CONTESTANTS[c].rpartition(".")[2] for c in given.contestants}
    models = {c: results / f"{name}__{PLANS}__{CONFIGURATION}" for c, name in names.items()}
    deadline, begun = begin + given.minutes * 60, False
    for number in given.folds:
        for contestant, model in models.items():
            fold = Fold(model, dataset, number)
            key = f"{contestant} | fold {number}"
            try:
                if fold.state() is not FoldState.DONE:
                    if begun and time.time() > deadline:
                        raise TimeIsUp
                    begun = True
                    train(contestant, dataset, fold, deadline, given)
            except TimeIsUp:
                print(f"time is up at {key}; call the program again to go on")
                return
            if key not in record.results:
                record.add(key, result(fold))
    if len(models) > 1 and not given.phantoms:  # whose folds are not the parts of one cross-validation
        compare(models, given.folds, given.folder)
    for key, value in record.results.items():
        print(f"{key:45} Dice {value['dice']:.4f}, {value['median_epoch_seconds']:.1f} s an epoch")
    print(f"all is done: {record.file}")


if __name__ == "__main__":
    main()
