"""What the benchmarks of training and prediction have in common: who takes part, on what plan, on which machine."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from plans import AMOS
from torch import nn

from nnunetv2_e2enet import files
from nnunetv2_e2enet.evaluation.provenance import processor
from nnunetv2_e2enet.network import E2ENet, maskable_layers
from nnunetv2_e2enet.network.acceleration import KERNELS, convolutions_for, kernels_for

BASELINE = "nnU-Net"
CONTESTANTS = {
    BASELINE: "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer",
    "E2ENet 0.8": "nnunetv2_e2enet.trainers.e2enet_trainers.nnUNetTrainerE2ENet",
    "E2ENet 0.9": "nnunetv2_e2enet.trainers.e2enet_trainers.nnUNetTrainerE2ENet_S90",
    "E2ENet 0.8, static mask": "nnunetv2_e2enet.trainers.e2enet_experiment_trainers.nnUNetTrainerE2ENet_static",
    "E2ENet, dense": "nnunetv2_e2enet.trainers.e2enet_experiment_trainers.nnUNetTrainerE2ENet_dense",
    "E2ENet 0.9, update each epoch": "ablations.S90UpdateEachEpoch",
    "E2ENet 0.9, initial gain 0.5": "ablations.S90HalfGain",
    "E2ENet 0.8, blocks of 16": "nnunetv2_e2enet.trainers.e2enet_experiment_trainers.nnUNetTrainerE2ENet_B16active",
    "nnU-Net, channels last": "stock_channels_last.StockChannelsLast",
    "E2ENet 0.8, channels last": "nnunetv2_e2enet.trainers.e2enet_experiment_trainers.nnUNetTrainerE2ENet_channelsLast",
}
"""Trainers by name, with their sparsity; in blocks of 16, active ones alone are computed."""
SAME_RESULTS = ("nnU-Net, channels last", "E2ENet 0.8, channels last")
"""Those that compute what another one does, in another time."""
TRAINED_OTHERWISE = ("E2ENet 0.9, update each epoch", "E2ENet 0.9, initial gain 0.5")
"""Those whose steps are those of another one, so that their accuracy alone is measured."""
ABLATIONS = ("E2ENet 0.8, static mask", "E2ENet, dense", "E2ENet 0.8, blocks of 16", *TRAINED_OTHERWISE)
"""Those that answer another question than which network to take."""

COMMIT_FILE = "commit.txt"  # beside this one, where there is no git
WITHOUT_GPU = "measured without a GPU: says nothing about one"
TINY = {"patch_size": [16, 16, 16], "batch_size": 2}
PLANS = ("own", "amos", "tiny")
"""What is put into the plans of a data set: nothing, nnU-Net's plan for AMOS, a patch with which a program is tried."""


def trainer_class(name: str) -> Any:
    module, _, attribute = CONTESTANTS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def timed() -> list[str]:
    """Contestants whose steps and predictions differ."""
    return [name for name in CONTESTANTS if name not in TRAINED_OTHERWISE]


def load_plans(dataset: str, plans: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``plans.json`` and ``dataset.json`` of a preprocessed data set, by name or number."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    folder = Path(os.environ["nnUNet_preprocessed"]) / maybe_convert_to_dataset_name(
        int(dataset) if dataset.isdigit() else dataset
    )
    return json.loads((folder / f"{plans}.json").read_text()), json.loads((folder / "dataset.json").read_text())


def load(dataset: str, plans: str, configuration: str, plan: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans and description of a preprocessed data set, with one of PLANS put into them."""
    loaded, description = load_plans(dataset, plans)
    if plan == "amos":
        return as_amos(loaded, configuration), amos_labels(description)
    if plan == "tiny":
        loaded["configurations"][configuration].update(TINY)
    return loaded, description


def as_amos(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """The plans with the network, patch and batch that nnU-Net plans for AMOS."""
    plans = deepcopy(plans)
    settings = plans["configurations"][configuration]
    settings.update(patch_size=list(AMOS.patch), batch_size=2)
    levels = len(AMOS.strides)
    settings["architecture"]["arch_kwargs"].update(
        n_stages=levels,
        features_per_stage=[min(32 * 2**level, 320) for level in range(levels)],
        kernel_sizes=[[1, 3, 3], *[[3, 3, 3]] * (levels - 1)],
        strides=AMOS.strides,
        n_conv_per_stage=[2] * levels,
        n_conv_per_stage_decoder=[2] * (levels - 1),
    )
    return plans


def amos_labels(dataset: dict[str, Any]) -> dict[str, Any]:
    """The description of a data set with as many classes as AMOS has, the first of them its own."""
    return {**dataset, "labels": {"background": 0, **{f"class {label}": label for label in range(1, 16)}}}


@contextmanager
def temporary_results() -> Iterator[None]:
    """Whatever trainers write goes to a folder that is gone afterwards."""
    before = os.environ.get("nnUNet_results")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_results"] = folder
        try:
            yield
        finally:
            os.environ.pop("nnUNet_results")
            if before is not None:
                os.environ["nnUNet_results"] = before


def as_nnunet_trains(device: str) -> None:
    """What ``nnUNetv2_train`` and ``nnUNetv2_predict`` set for a device, for all contestants from the first one on."""
    if device == "cuda":
        torch.backends.cudnn.deterministic = False
        torch.backends.cudnn.benchmark = True


def without_kernels(network: nn.Module) -> list[str]:
    """Names of the kernels that an E2ENet has use for and PyTorch stands in for; none of a stock network."""
    if not any(isinstance(module, E2ENet) for module in network.modules()):
        return []
    x = next(network.parameters())
    in_blocks = any(layer.stores_active_only for _, layer in maskable_layers(network))
    missing = {"wrong_kernel": kernels_for(x) is None, "wrong_convolution": in_blocks and convolutions_for(x) is None}
    return [what for check, what in KERNELS.items() if missing[check]]


def without(result: Mapping[str, Any]) -> str:
    """Words for a table on the kernels that a measurement had to do without."""
    missing = result.get("without_kernels")
    return f", without {' and '.join(missing)}" if missing else ""


def check_device(device: str) -> None:
    """Ends the program where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu tries the program, and marks its figures as such")


def machine(device: str) -> dict[str, Any]:
    """What was measured on, for the record."""
    described: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({processor()}, {os.cpu_count()} cores)",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "compiled": device == "cuda" and os.environ.get("nnUNet_compile", "true").lower() in ("true", "1", "t"),
        "kernels": os.environ.get("nnUNet_e2enet_kernels", "auto"),
    }
    if device != "cuda":
        described["warning"] = WITHOUT_GPU
    return described


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Median, least and most."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _commit() -> str:
    noted = Path(__file__).with_name(COMMIT_FILE)
    if noted.is_file():
        return noted.read_text().strip()
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(described, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


COMMIT = _commit()
"""That of the repository that this file lies in when a program starts, with a mark if files differ from it; of a bundle, that
which it was made of. A commit that is made while the program runs is not what it runs."""


class Record:
    """Results in a JSON file that is complete after every entry, and is gone on with when the program is started again.

    Args:
        file: the JSON file.
        header: what all results are measured with. It is written before the first of them.
        given_by: the program's option that says where the file is.

    Raises:
        SystemExit: the file is of another header.
    """

    def __init__(self, file: Path, header: dict[str, Any], given_by: str = "output") -> None:
        self.file = file
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {**header, "results": {}}
        changed = [key for key, value in header.items() if self.content.get(key) != value]
        if changed:
            what = ", ".join(changed)
            raise SystemExit(f"{file} was measured with another {what}: give what was given then, or another --{given_by}")
        if header:  # what is measured for the first entry, over several calls, is measured with it
            self._write()

    @property
    def results(self) -> dict[str, Any]:
        return self.content["results"]

    def add(self, name: str, result: Any) -> None:
        self.results[name] = result
        self._write()

    def _write(self) -> None:
        files.write_atomically(self.file, json.dumps(self.content, indent=2) + "\n")
