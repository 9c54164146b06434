"""A small study whose reports are known: phantom cases, predictions that are wrong in known ways, untrained models.

Everything is made from seeds, in a second or two. ``tests/golden_reports.json`` holds the numbers of the reports on it. After
a change that is meant to change numbers, write the file anew and look at the difference::

    PYTHONPATH=tests python -m golden
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from support import architecture

from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.datasets.phantom import LABELS, write_phantom_dataset
from nnunetv2_e2enet.dsff import HISTORY_FILE, CosineSchedule, TopologyHistory, TopologyUpdater
from nnunetv2_e2enet.evaluation.networks import Design
from nnunetv2_e2enet.network import fusion_flows
from nnunetv2_e2enet.settings import override
from nnunetv2_e2enet.training.architecture import e2enet_architecture

FILE = Path(__file__).with_name("golden_reports.json")
DATASET = "Dataset994_Phantom"
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
PATCH = [8, 16, 16]
EPOCHS = 8
FOLDS = 2
SIZE = (18, 48, 48)

Numbers = dict[str, Any]


class Study:
    """nnU-Net's folders with two model folders of two folds each and one folder of predictions.

    Args:
        folder: empty.
        cases: of the phantom data set, divided between the folds.
    """

    def __init__(self, folder: Path, cases: int = 6) -> None:
        self.folder = folder
        self.environment = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        self.raw = folder / "nnUNet_raw" / DATASET
        write_phantom_dataset(self.raw, n_train=cases, n_test=0, seed=7, size=SIZE)
        self.dataset = json.loads((self.raw / "dataset.json").read_text())
        self.cases = sorted(file.name.removesuffix(".nii.gz") for file in (self.raw / "labelsTr").glob("*.nii.gz"))
        stock = plans_of_a_unet()
        sparse = deepcopy(stock)
        entry = sparse["configurations"]["3d_fullres"]
        entry["architecture"] = e2enet_architecture(entry["architecture"], 6, 10, feature_sparsity=0.8, shift_size=3)
        self.e2enet = self._model("nnUNetTrainerE2ENet", sparse, 1.0)
        self.stock = self._model("nnUNetTrainer", stock, 1.6)
        self.rough = folder / "rough"
        for case in self.cases:
            self._predict(case, self.rough, 3.0)
        (self.rough / "dataset.json").write_text(json.dumps(self.dataset))
        self.plans = folder / "plans" / "nnUNetPlans.json"
        self.plans.parent.mkdir()
        self.plans.write_text(json.dumps(stock))
        (self.plans.parent / "dataset.json").write_text(json.dumps(self.dataset))

    def _model(self, trainer: str, plans: dict[str, Any], error: float) -> Path:
        model = self.folder / "nnUNet_results" / DATASET / f"{trainer}__nnUNetPlans__3d_fullres"
        for fold in range(FOLDS):
            for case in self.cases[fold::FOLDS]:
                self._predict(case, model / f"fold_{fold}" / "validation", error)
            write_training(model / f"fold_{fold}", fold, trainer, plans, self.dataset)
        (model / "plans.json").write_text(json.dumps(plans))
        (model / "dataset.json").write_text(json.dumps(self.dataset))
        return model

    def _predict(self, case: str, folder: Path, error: float) -> None:
        reference = sitk.ReadImage(str(self.raw / "labelsTr" / f"{case}.nii.gz"))
        seed = [self.cases.index(case), int(10 * error)]
        prediction = sitk.GetImageFromArray(corrupted(sitk.GetArrayFromImage(reference), seed, error))
        prediction.CopyInformation(reference)
        folder.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(prediction, str(folder / f"{case}.nii.gz"))

    @contextmanager
    def active(self) -> Iterator[None]:
        """nnU-Net's folders are those of the study, the terminal has 80 columns, and pictures are small, for the time."""
        with (
            patch.dict(os.environ, {**self.environment, "COLUMNS": "80"}),
            patch("nnunetv2_e2enet.evaluation.overlay.DOTS_PER_INCH", 20),
        ):
            yield

    def run(self, *arguments: str) -> str:
        """What a command of ``e2enet`` prints."""
        with self.active(), redirect_stdout(io.StringIO()) as printed:
            code = main(arguments)
        assert code == 0, printed.getvalue()
        return printed.getvalue()


def corrupted(reference: np.ndarray, seed: list[int], error: float) -> np.ndarray:
    """A label map with each organ moved by a few voxels; small parts are lost or invented now and then."""
    random = np.random.default_rng(seed)
    prediction = np.zeros_like(reference)
    for value in sorted(set(LABELS.values()) - {0}):
        offset = np.rint(random.normal(0, error, 3) * [0.4, 1, 1]).astype(int)
        mask = np.roll(reference == value, offset, axis=(0, 1, 2))
        if random.random() < 0.05 * error:
            continue
        prediction[mask] = value
    if random.random() < 0.1 * error:
        prediction[2:4, 3:6, 3:6] = LABELS["lesion"]
    return prediction


def plans_of_a_unet() -> dict[str, Any]:
    """Plans of a small U-Net, with what building it needs."""
    entry = architecture([8 * 2**i for i in range(len(STRIDES))], STRIDES)
    configuration = {"patch_size": PATCH, "batch_size": 2, "architecture": entry}
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {"3d_fullres": configuration},
    }


def write_training(folder: Path, fold: int, trainer: str, plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    """A checkpoint as nnU-Net writes it, of weights that changed at random, and the history of the topology."""
    torch.manual_seed(fold)
    network = Design(trainer, "golden", plans, dataset, "3d_fullres").build(deep_supervision=True)
    epochs = range(EPOCHS)
    log: dict[str, Any] = {
        "train_losses": [-0.9 + 0.5 * 0.7**epoch + 0.02 * fold for epoch in epochs],
        "val_losses": [-0.8 + 0.4 * 0.7**epoch + 0.03 * fold for epoch in epochs],
        "ema_fg_dice": [0.9 - 0.6 * 0.8**epoch for epoch in epochs],
        "epoch_start_timestamps": [100.0 * epoch for epoch in epochs],
        "epoch_end_timestamps": [100.0 * epoch + 90 + epoch % 3 for epoch in epochs],
    }
    if "E2ENet" in trainer:
        log |= _evolve(network, folder / HISTORY_FILE, fold)
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {},
        "current_epoch": EPOCHS,
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": fold, "dataset_json": dataset},
        "trainer_name": trainer,
        "logging": log,
    }
    torch.save(content, folder / "checkpoint_final.pth")


def _evolve(network: torch.nn.Module, file: Path, fold: int) -> dict[str, Any]:
    """Updates of the topology, with weights that change at random between them; returns DSFF's part of the log."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    updater = TopologyUpdater(network, CosineSchedule(EPOCHS, 2), seed=fold)
    history = TopologyHistory(updater.layers, fusion_flows(network), file)
    history.start()
    changed, explored = [], []
    for epoch in range(EPOCHS):
        with torch.no_grad():
            for i, layer in enumerate(updater.layers.values()):
                generator = torch.Generator().manual_seed(1000 * fold + 100 * epoch + i)
                layer.weight += 0.1 * torch.randn(layer.weight.shape, generator=generator)
                layer.clear_inactive_weights()
        update = updater.update(epoch, optimizer)
        if update is not None:
            history.add(update)
        changed.append(0 if update is None else sum(int(change.grown.sum()) for change in update.layers))
        tried = [layer.explored for layer in updater.layers.values()]
        explored.append(sum(int(mask.sum()) for mask in tried) / sum(mask.numel() for mask in tried))
    return {"dsff_connections_changed": changed, "dsff_explored": explored, "dsff_born": list(history.born.values())}


# --- the numbers of the reports -----------------------------------------------------------------------------------------


class Tables(HTMLParser):
    """The cells of all tables of a page, row by row, without heads; a second line of a cell follows after a space."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self._in_cell = True
            self.rows[-1].append("")
        elif self._in_cell:
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._in_cell = False
            self.rows[-1][-1] = " ".join(self.rows[-1][-1].split())

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def tokens(text: str) -> list[str]:
    """The numbers in a text, in their order, as they are written."""
    return re.findall(r"[-+]?\d[\d.,]*\d[kMG%]?|\d", text)


def reports(study: Study) -> Numbers:
    """All numbers that ``compare``, ``profile`` and ``topology`` give of the study."""
    found: Numbers = {}
    both = [f"E2ENet={study.e2enet}", f"nnU-Net={study.stock}"]
    three = [*both, f"rough={study.rough}", "--model", f"rough={study.e2enet}"]
    work = ["--workers", "1", "--no-cache", "--tolerance", "2", "--tolerance", "lesion=3"]
    for name, arguments in (("compare two", both), ("compare three", three)):
        found[name] = _written(study, ["compare", *arguments, *work], "--csv", "--report", "--json")
    torch.manual_seed(0)
    counted = ["--no-memory", "--no-time", "--threads", "1", "--sparsity", "0.8", "--flows"]
    with override(engine="off"):  # what an engine executes is counted where there is one
        found["profile"] = _written(study, ["profile", str(study.plans), *counted], "--json")
    found["topology"] = _written(study, ["topology", str(study.e2enet)], "--report", "--json")
    # what is there twice is kept once: the first two of three models are the same as both
    for key in ("cases", "means"):
        del found["compare two"]["json"][key]
    del found["compare two"]["csv"]
    found["compare three"]["json"] = {key: found["compare three"]["json"][key] for key in ("means", "rank_tests", "trade_off")}
    del found["topology"]["json"]["folds"][1:]
    del found["profile"]["json"]["settings"]["engine"]  # says what this machine has
    for name in ("compare two", "compare three", "topology"):
        found[name]["page"] = _without_paths(found[name]["page"])
    return found


def _written(study: Study, command: list[str], *options: str) -> Numbers:
    files = {option: study.folder / f"output.{option.removeprefix('--')}" for option in options}
    printed = study.run(*command, *(text for option, file in files.items() for text in (option, str(file))))
    numbers: Numbers = {"terminal": tokens(printed.split("Wrote ")[0])}
    for option, file in files.items():
        text = file.read_text().replace(str(study.folder), "STUDY")
        if option == "--json":
            numbers["json"] = {key: value for key, value in json.loads(text).items() if key != "provenance"}
        elif option == "--csv":
            numbers["csv"] = text.splitlines()
        else:
            numbers["page"] = Tables(text).rows
    return numbers


def _without_paths(rows: list[list[str]]) -> list[list[str]]:
    return [row for row in rows if row and not any("STUDY" in cell for cell in row)]


def main_program() -> None:
    with TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(reports(Study(Path(folder) / "study")), separators=(",", ":"), allow_nan=False) + "\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main_program()
