"""`e2enet compare` from folders to files: what it finds, refuses, keeps and writes."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from support import Project, program

from nnunetv2_e2enet.cli import compare
from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.evaluation import measure as measure_module
from nnunetv2_e2enet.evaluation.cases import match_cases
from nnunetv2_e2enet.evaluation.measure import measure
from nnunetv2_e2enet.evaluation.metrics import METRICS, ClassMetrics
from nnunetv2_e2enet.evaluation.sources import read_sources

LABELS = {"background": 0, "liver": 1, "tumour": 2}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3, "ignore": 4}
SPACING = (2.0, 1.0, 1.5)


def write_map(file: Path, voxels: np.ndarray, spacing: tuple[float, ...] = SPACING, origin: float = 0) -> Path:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin([origin] * 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


def label_map(seed: int, largest: int = 2, shape: tuple[int, ...] = (8, 16, 12)) -> np.ndarray:
    random = np.random.default_rng(seed)
    voxels = np.zeros(shape, np.uint8)
    for value in range(1, largest + 1):
        low = random.integers(0, 4, 3)
        voxels[tuple(slice(n, n + random.integers(3, 8)) for n in low)] = value
    return voxels


class Study:
    """A folder with references and the predictions of some models."""

    def __init__(self, folder: Path, models: int = 2, cases: int = 6, labels: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.reference = folder / "labelsTr"
        self.labels = labels or LABELS
        self.models = [folder / f"model_{chr(ord('a') + i)}" for i in range(models)]
        largest = 4 if "ignore" in self.labels else 2
        for i in range(cases):
            reference = label_map(i, largest)
            write_map(self.reference / f"case_{i}.nii.gz", reference)
            for m, model in enumerate(self.models):
                prediction = np.where(reference == 4, 0, np.roll(reference, (i + m) % 3, axis=m % 3)).astype(np.uint8)
                write_map(model / f"case_{i}.nii.gz", prediction)
        for model in self.models:
            (model / "dataset.json").write_text(json.dumps({"labels": self.labels, "file_ending": ".nii.gz"}))

    def arguments(self, *more: str) -> list[str]:
        reference = ["--reference", str(self.reference), "--workers", "1", "--cache", str(self.folder / "cache")]
        return ["compare", *map(str, self.models), *reference, *more]

    def json(self, *more: str) -> dict[str, Any]:
        file = self.folder / "result.json"
        assert main(self.arguments("--json", str(file), *more)) == 0
        return json.loads(file.read_text())


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


@pytest.mark.parametrize("labels", [LABELS, REGIONS])
def test_dice_equals_nnunets_evaluation(tmp_path: Path, labels: dict[str, Any]) -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    study = Study(tmp_path, labels=labels)
    manager = LabelManager(labels, [1, 2, 3] if labels is REGIONS else None)
    keys = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    content = study.json()
    for model in study.models:
        expected = [
            compute_metrics(
                str(study.reference / f"{c['case']}.nii.gz"),
                str(model / f"{c['case']}.nii.gz"),
                SimpleITKIO(),
                keys,
                manager.ignore_label,
            )
            for c in content["cases"]
        ]
        names = [c["name"] for c in content["classes"]]
        for case, theirs in zip(content["cases"], expected, strict=True):
            for name, key in zip(names, keys, strict=True):
                ours = case["models"][model.name][name]["dice"]
                assert (math.nan if ours is None else ours) == pytest.approx(
                    theirs["metrics"][key]["Dice"], abs=1e-9, nan_ok=True
                )
        means = [np.nanmean([e["metrics"][key]["Dice"] for e in expected]) for key in keys]
        assert content["means"]["dice"][model.name]["mean"]["mean"] == pytest.approx(np.mean(means), abs=1e-9)


def test_a_class_that_one_model_invents_counts_in_the_tests(tmp_path: Path) -> None:
    """No case has a tumour; the first model finds one in each, and both have the same liver but for a voxel."""
    study = Study(tmp_path, cases=12)
    for i in range(12):
        liver = (label_map(i, 1) > 0).astype(np.uint8)
        write_map(study.reference / f"case_{i}.nii.gz", liver)
        nearly = liver.copy()
        nearly[tuple(np.argwhere(liver)[0])] = 0
        write_map(study.models[1] / f"case_{i}.nii.gz", nearly)
        nearly[7, 15, : 1 + i] = 2
        write_map(study.models[0] / f"case_{i}.nii.gz", nearly)
    tests = study.json()["paired_tests"]
    for metric, sign in (("dice", -1), ("nsd", -1), ("hd95", 1), ("volume_error", 1)):
        mean, liver_test, tumour = tests[metric]
        assert mean["difference"]["mean"] * sign > 0
        assert mean["p_holm"] < 0.01
        assert liver_test["ties"] == 12
        assert tumour["difference"]["n"] == 12
        assert tumour["difference"]["mean"] * sign > 0


def test_the_report_counts_the_cases_of_the_tests(tmp_path: Path) -> None:
    """No case has a tumour. The first model finds more of the liver and a tumour in each, the second one neither.

    The Dice is 2 k / (100 + k) where k of the liver's 100 voxels are found. The first model is ahead in the means of the
    classes that are defined. With 1 for the tumour that the second one leaves out, it is behind in all cases.
    """
    study = Study(tmp_path, cases=12)
    liver = np.zeros((8, 16, 12), np.uint8)
    liver[2:6, 3:8, 2:7] = 1
    for i in range(12):
        write_map(study.reference / f"case_{i}.nii.gz", liver)
        for model, found in zip(study.models, (50, 18) if i == 5 else (60 + i, 5 + i), strict=True):
            prediction = np.zeros_like(liver)
            prediction[tuple(np.argwhere(liver)[:found].T)] = 1
            prediction[7, 15, 11] = 2 if model is study.models[0] else 0
            write_map(model / f"case_{i}.nii.gz", prediction)
    page = study.folder / "out.html"
    tests = study.json("--report", str(page))["paired_tests"]
    drawings = [words for words in Page(page.read_text()).drawings if words and " by case, " in words]
    assert (tests["dice"][0]["wins"], tests["dice"][0]["losses"]) == (0, 12)
    for metric, words in zip(METRICS, drawings, strict=True):
        counts = [tests[metric.key][0][key] for key in ("wins", "losses")]
        better, worse = counts if metric.higher_is_better else counts[::-1]
        assert f"{metric.title} by case" in words
        assert f"model_a is better in {better} of 12 cases, model_b in {worse}" in words
    headings = re.findall(r"<h3>(\w+) is furthest ahead, by ([\d.]+): (\w+)</h3>", page.read_text())
    assert headings == [("model_b", f"{(36 / 118 + 1) / 2 - 100 / 150 / 2:.3f}", "case_5")]


@pytest.mark.parametrize("of_reference", [True, False])
def test_values_that_no_label_has_are_named(study: Study, capsys: pytest.CaptureFixture[str], of_reference: bool) -> None:
    file = (study.reference if of_reference else study.models[1]) / "case_3.nii.gz"
    write_map(file, np.where(label_map(3) == 2, 255, label_map(3)).astype(np.uint8))
    assert main(study.arguments()) == 1
    assert f"{file} holds the value 255: expected the labels of dataset.json, 0, 1, 2" in capsys.readouterr().err


@pytest.mark.parametrize("of_reference", [True, False])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (label_map(3) + np.float32(0.5), "holds fractional values: expected a label map of whole numbers"),
        (label_map(3) - np.float32(1), "holds negative values: expected label values from 0"),
        (label_map(3).astype(np.int16) - 1, "holds negative values: expected label values from 0"),
    ],
    ids=["fractional", "negative floating-point numbers", "negative integers"],
)
def test_what_is_no_label_map(
    study: Study, values: np.ndarray, message: str, of_reference: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_map((study.reference if of_reference else study.models[1]) / "case_3.nii.gz", values)
    assert main(study.arguments()) == 1
    assert f"{file} {message}" in capsys.readouterr().err


def test_whole_numbers_may_be_stored_as_floating_point_numbers(study: Study) -> None:
    expected = study.json()
    for file in study.folder.rglob("*.nii.gz"):
        write_map(file, sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.float32))
    assert study.json()["means"] == expected["means"]


def test_failures_are_classes_below_the_dice(tmp_path: Path) -> None:
    """The first model finds a quarter of the liver: a Dice of 2 * 6 / (6 + 24) = 0.4. The second finds a third: 0.5."""
    study = Study(tmp_path, cases=2)
    for i in range(2):
        for folder, columns in ((study.reference, 12), (study.models[0], 3), (study.models[1], 4)):
            voxels = np.zeros((4, 6, 14), np.uint8)
            voxels[1, 2:4, 1 : 1 + columns] = 1
            write_map(folder / f"case_{i}.nii.gz", voxels)
    for threshold, failing in (("0.39", []), ("0.41", ["model_a"]), ("0.5", ["model_a"]), ("0.51", ["model_a", "model_b"])):
        failures = study.json("--failure-dice", threshold)["failures"]
        found = sorted((failure["model"], failure["case"]) for failure in failures)
        assert found == [(model, f"case_{i}") for model in failing for i in range(2)]
        assert {(failure["label"], failure["kind"]) for failure in failures} <= {("liver", "low Dice")}
    assert study.json()["failures"] == study.json("--failure-dice", "0.5")["failures"]  # the default


def test_every_class_that_is_missed_is_a_failure_at_any_threshold(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    empty = np.zeros((8, 16, 12), np.uint8)
    write_map(study.models[0] / "case_0.nii.gz", empty)
    kinds = {(f["case"], f["kind"]) for f in study.json("--failure-dice", "0")["failures"]}
    assert kinds == {("case_0", "missed")}
    assert "No failure" not in capsys.readouterr().out


def test_a_model_that_wins_most_cases_and_not_the_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first model is better by a voxel in 18 of 20 cases, and finds nothing in two."""
    study = Study(tmp_path, cases=20, labels={"background": 0, "liver": 1})
    for i in range(20):
        liver = np.zeros((8, 16, 12), np.uint8)
        liver[2:6, 3:12, 2:10] = 1
        write_map(study.reference / f"case_{i}.nii.gz", liver)
        for model, removed in zip(study.models, (0 if i >= 2 else 10**6, 1 + i), strict=True):
            prediction = liver.copy()
            prediction[tuple(np.argwhere(liver)[:removed].T)] = 0
            write_map(model / f"case_{i}.nii.gz", prediction)
    assert main(study.arguments()) == 0
    assert "Dice: model_a is better in 18 of 20 cases, and not in the mean" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("files", ["uint8", "int8"])
def test_as_many_labels_as_a_file_can_hold(tmp_path: Path, files: str) -> None:
    largest = np.iinfo(files).max
    study = Study(tmp_path, cases=2, labels={"background": 0, **{f"part {i}": i for i in range(1, largest + 1)}})
    for folder in (study.reference, *study.models):
        for i in range(2):
            voxels = label_map(i).astype(files)
            voxels[0, 0, 0] = largest
            write_map(folder / f"case_{i}.nii.gz", voxels)
    assert study.json()["means"]["dice"]["model_a"][f"part {largest}"]["mean"] == 1


def test_names_that_look_like_markup(study: Study, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ["A [final] :smile:", 'B "x" [/y] $\\foo$']
    results = [f"{name}={model}" for name, model in zip(names, study.models, strict=True)]
    page = tmp_path / "[x] :smile:.html"
    given = study.arguments("--report", str(page))
    assert main(["compare", *results, *given[3:]]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{names[0]} - {names[1]} = " in printed
    assert "[x] :smile:.html" in printed
    assert "tip:" not in page.read_text()


def test_a_case_in_which_one_model_invents_a_class_is_the_worst(study: Study) -> None:
    """The other model has no Dice there, as it rightly leaves all classes out."""
    empty = np.zeros((8, 16, 12), np.uint8)
    for folder in (study.reference, study.models[0]):
        write_map(folder / "case_3.nii.gz", empty)
    page = study.folder / "out.html"
    assert main(study.arguments("--report", str(page))) == 0
    text = page.read_text()
    assert "Worst case 1: case_3" in text
    assert "Mean Dice: model_a none, model_b 0.000" in text


def test_spacings_of_tiff_files_are_those_that_nnunet_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    study = Study(tmp_path, cases=2)
    for folder in (study.reference, *study.models):
        for i in range(2):
            voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"case_{i}.nii.gz")))
            Tiff3DIO().write_seg(voxels, str(folder / f"case_{i}.tif"), {"spacing": list(SPACING)})
    expected = study.json()
    for model in study.models:
        (model / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".tif"}))
    found = study.json()
    assert found["means"] == expected["means"]
    (study.models[0] / "case_1.json").write_text(json.dumps({"spacing": [1, 1]}))
    assert main(study.arguments()) == 1
    assert f"{study.models[0] / 'case_1.json'} has the spacing [1, 1]" in capsys.readouterr().err


def test_pictures_of_another_resolution_lie_on_one_grid(tmp_path: Path) -> None:
    study = Study(tmp_path, cases=2)
    for folder in (study.reference, *study.models):
        for i in range(2):
            image = sitk.GetImageFromArray(label_map(i)[2])
            image.SetSpacing([0.35, 0.35] if folder is study.reference else [1.0, 1.0])
            sitk.WriteImage(image, str(folder / f"case_{i}.tif"))
    for model in study.models:
        (model / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".tif"}))
    assert study.json()["means"]["dice"]["model_a"]["mean"]["mean"] == 1


def test_a_network_that_cannot_be_built_leaves_the_accuracy(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network whose package is missing, or one that cannot be counted without data."""
    from nnunetv2_e2enet.evaluation import comparison

    def build() -> None:
        raise ImportError("no module named mamba_ssm")

    monkeypatch.setattr(comparison, "read_trainings", lambda _: [])
    monkeypatch.setattr(comparison, "model_design", lambda *_: SimpleNamespace(plans={}, build=build))
    source, _ = read_sources([str(model) for model in study.models])
    facts = comparison.model_facts(replace(source, model=study.models[0]))
    assert facts.costs is None
    assert facts.note == "the network cannot be built and counted (ImportError: no module named mamba_ssm)"


def test_holm_may_leave_too_few_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six cases give p = 2 / 2^6 = 0.03 at least, and three times that where there are three tests."""
    study = Study(tmp_path, cases=6)
    for i in range(6):
        shutil.copy(study.reference / f"case_{i}.nii.gz", study.models[0])
        write_map(study.models[1] / f"case_{i}.nii.gz", np.roll(label_map(i), 1, axis=0))
    assert main(study.arguments()) == 0
    assert "Dice: too few cases to show a difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("different", "words"),
    [
        (0, "Dice: the results are equal in all cases;"),
        (3, "Dice: only 3 of 12 cases differ, too few to show a difference;"),
    ],
)
def test_ties_are_why_no_difference_shows(
    tmp_path: Path, different: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(tmp_path, cases=12)
    for i in range(12):
        shutil.copy(study.reference / f"case_{i}.nii.gz", study.models[0])
        write_map(study.models[1] / f"case_{i}.nii.gz", np.roll(label_map(i), int(i < different), axis=0))
    assert main(study.arguments()) == 0
    assert words in " ".join(capsys.readouterr().out.split())


def test_numbers_of_many_models_are_whole_on_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns of nine models do not fit beside each other; all numbers of the table are there, below each other."""
    monkeypatch.setenv("COLUMNS", "80")
    study = Study(tmp_path, models=9, cases=3)
    means = study.json()["means"]["dice"]
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("Wrote "))
    table = printed.partition("Dice by class")[2].partition("Dice: ")[0]
    expected = [f"{means[model.name][label]['mean']:.4f}" for model in study.models for label in ("liver", "tumour")]
    assert sorted(re.findall(r"\d\.\d{4}", table)) == sorted(expected)
    assert table.count("tumour") > 1


def test_json_before_the_folders_replaces_none_of_them(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    plans = study.folder / "plans.json"
    plans.write_text('{"plans_name": "mine"}')
    assert main(study.arguments("--json", str(plans))) == 1
    assert f"--json {plans} is there, and no earlier output: name another file, or write --json at the end" in (
        capsys.readouterr().err
    )
    assert plans.read_text() == '{"plans_name": "mine"}'
    assert study.json()["means"] == study.json()["means"]  # an earlier output is replaced


def test_seeds_below_zero(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(study.arguments("--seed", "-1")) == 1
    assert capsys.readouterr().err == "e2enet compare: --seed -1: expected a number from 0\n"


def test_characters_that_the_output_lacks_lose_nothing(study: Study) -> None:
    """As where Windows writes into a file."""
    csv_file = study.folder / "cases.csv"
    command = [program("e2enet"), *study.arguments("--csv", str(csv_file))]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert csv_file.is_file()


def without_foreground(trained: Path, folder: Path) -> Path:
    """The same network with segmentations of background alone."""
    shutil.copytree(trained, folder)
    for file in folder.glob("fold_*/validation/*.nii.gz"):
        image = sitk.ReadImage(str(file))
        empty = sitk.GetImageFromArray(np.zeros_like(sitk.GetArrayFromImage(image)))
        empty.CopyInformation(image)
        sitk.WriteImage(empty, str(file))
    return folder


def test_a_trained_model_folder(trained: Path, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a model of the same network that finds nothing: the Dice is nnU-Net's own, and only the costs are equal."""
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "out.json"
    report = tmp_path / "out.html"
    both = [f"E2ENet={trained}", f"nothing={without_foreground(trained, tmp_path / trained.name)}"]
    options = ["--workers", "1", "--no-cache", "--json", str(output), "--report", str(report)]
    assert main(["compare", *both, *options]) == 0
    content = json.loads(output.read_text())
    found = {case["case"]: case["models"]["E2ENet"] for case in content["cases"]}
    values = {str(c["values"][0]): c["name"] for c in content["classes"]}
    n = 0
    for summary in trained.glob("fold_*/validation/summary.json"):
        for theirs in json.loads(summary.read_text())["metric_per_case"]:
            case = Path(theirs["prediction_file"]).name.removesuffix(".nii.gz")
            for key, metrics in theirs["metrics"].items():
                n += 1
                ours = found[case][values[key]]["dice"]
                assert (math.nan if ours is None else ours) == pytest.approx(metrics["Dice"], abs=1e-6, nan_ok=True)
    assert n == len(found) * len(values) > 0
    costs = content["models"][0]["costs"]
    assert costs["macs_executed"] == costs["macs_dense"] > costs["macs_active"]
    assert [t["fold"] for t in content["models"][0]["trainings"]] == ["0", "1"]
    assert content["models"][1]["costs"] == costs
    assert all(not dice for case in content["cases"] for dice in (m["dice"] for m in case["models"]["nothing"].values()))
    means = {name: content["means"]["dice"][name]["mean"]["mean"] for name in ("E2ENet", "nothing")}
    assert means["E2ENet"] > means["nothing"] == 0
    scores = content["trade_off"]["scores"]
    assert scores["E2ENet"]["active"] == pytest.approx(3)  # the best in all of Dice, parameters and arithmetic
    assert scores["nothing"]["active"] == pytest.approx(2)
    page = report.read_text()
    assert page.count("data:image/webp;base64,") >= 2
    assert "training loss by epoch" in page


def test_everything_that_does_not_match_is_named_at_once(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = study.models
    (a / "case_0.nii.gz").unlink()
    write_map(b / "case_1.nii.gz", label_map(1, shape=(8, 16, 13)))
    write_map(a / "case_2.nii.gz", label_map(2), spacing=(3.0, 1.0, 1.5))
    write_map(a / "case_3.nii.gz", label_map(3), origin=20)
    (a / "case_5.nii.gz").write_bytes(b"no image")
    (study.reference / "case_4.nii.gz").unlink()
    description = {"labels": {"background": 0, "liver": 1, "lesion": 2}, "file_ending": ".nii.gz"}
    (b / "dataset.json").write_text(json.dumps(description))
    report = study.folder / "out.html"
    assert main(study.arguments("--report", str(report))) == 1
    message = capsys.readouterr().err
    for words in (
        "tumour is 2 in model_a and missing in model_b",
        "only some have case_0, among them model_b",
        "no reference in",
        "case_4",
        "case_1: 13 x 16 x 8 voxels, the reference has 12 x 16 x 8",
        "case_2: spacing 1.5 x 1 x 3 mm",
        "case_3: origin (20, 20, 20) mm",
        "case_5.nii.gz cannot be read as an image",
    ):
        assert words in message
    assert not report.exists()
    assert not (study.folder / "cache").exists()


def test_common_cases_alone(study: Study) -> None:
    (study.models[0] / "case_0.nii.gz").unlink()
    (study.models[1] / "case_5.nii.gz").unlink()
    content = study.json("--common")
    assert [case["case"] for case in content["cases"]] == ["case_1", "case_2", "case_3", "case_4"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: ["compare", str(s.models[0])], "give at least two"),
        (lambda s: ["compare", str(s.models[0]), str(s.folder / "none")], "is not a folder"),
        (lambda s: ["compare", f"x={s.models[0]}", f"x={s.models[1]}"], "same name"),
        (lambda s: s.arguments("--tolerance", "spleen=1"), "no class spleen"),
        (lambda s: s.arguments("--tolerance", "wide"), "not a number of mm"),
        (lambda s: s.arguments("--report", str(s.folder / "none" / "x.html")), "is missing"),
        (lambda s: s.arguments("--csv", str(s.folder)), "it is a folder; name a file"),
        (lambda s: s.arguments("--csv", "/proc/cases.csv"), "cannot write into /proc"),
        (lambda s: s.arguments("--failure-dice", "7"), "--failure-dice 7: expected a Dice, from 0 to 1"),
        (lambda s: s.arguments("--workers", "0"), "at least one"),
        (lambda s: ["compare", *map(str, s.models)], "--reference"),
        (lambda s: s.arguments("--model", f"model_x={s.folder}"), "model_x"),
    ],
)
def test_bad_input_is_one_line(
    study: Study, change: Any, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(name, raising=False)
    assert main(change(study)) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_tolerances_of_classes(study: Study) -> None:
    strict, loose = study.json(), study.json("--tolerance", "1", "--tolerance", "tumour=50")
    assert [c["tolerance_mm"] for c in loose["classes"]] == [1, 50]
    means = [content["means"]["nsd"]["model_a"] for content in (strict, loose)]
    assert means[0]["liver"] == means[1]["liver"]
    assert means[0]["tumour"]["mean"] < means[1]["tumour"]["mean"] == 1


def test_unchanged_cases_come_from_the_cache(study: Study) -> None:
    sources = read_sources([str(model) for model in study.models])
    cases = match_cases(sources, study.reference)
    labels = sources[0].labels

    def run(tolerance: float = 1.0, workers: int = 1) -> Any:
        tolerances = [tolerance] * 2
        return measure([s.name for s in sources], cases, labels, tolerances, study.folder / "cache", workers)

    first, second = run(), run()
    assert (first.from_cache, second.from_cache) == (0, 12)
    for name, values in first.values.items():
        np.testing.assert_array_equal(values, second.values[name])
    time.sleep(0.02)
    write_map(study.models[1] / "case_3.nii.gz", label_map(99))
    changed = run()
    assert changed.from_cache == 11
    assert not np.array_equal(changed.values["dice"][1, 3], first.values["dice"][1, 3])
    assert run(tolerance=2.0).from_cache == 0
    for file in (study.folder / "cache").rglob("output.pkl"):
        file.write_text("damaged")
    repaired = run(workers=2)
    for name, values in changed.values.items():
        np.testing.assert_array_equal(values, repaired.values[name])


def test_the_cache_knows_the_order_of_regions(tmp_path: Path) -> None:
    """nnU-Net draws regions in the order of dataset.json, and another file may have another order."""
    study = Study(tmp_path, labels=REGIONS)
    reordered = dict(reversed(REGIONS.items()))
    (study.models[1] / "dataset.json").write_text(json.dumps({"labels": reordered, "file_ending": ".nii.gz"}))
    first = study.json()["means"]["dice"]
    study.models.reverse()
    second = study.json()
    assert [c["name"] for c in second["classes"]] == ["inner", "core", "whole"]
    for model, means in first.items():
        assert {name: mean["mean"] for name, mean in means.items()} == pytest.approx(
            {name: mean["mean"] for name, mean in second["means"]["dice"][model].items()}
        )


def test_results_without_a_common_case_are_called_that(
    study: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although their references are found by themselves."""
    monkeypatch.setenv("nnUNet_raw", str(study.folder))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    dataset = study.folder / "Dataset001_x"
    dataset.mkdir()
    study.reference.rename(dataset / "labelsTr")
    for model in study.models:
        (model / "plans.json").write_text('{"dataset_name": "Dataset001_x"}')
    for file in study.models[1].glob("case_*"):
        file.rename(file.with_name(f"other_{file.name}"))
    assert main(["compare", *map(str, study.models), "--no-cache"]) == 1
    assert "only some have case_0" in capsys.readouterr().err


def test_folds_are_known_whichever_result_comes_first(study: Study) -> None:
    sources = read_sources([str(model) for model in study.models])
    folds = dict.fromkeys(sources[1].predictions, "3")
    for order in (1, -1):
        given = [sources[0], replace(sources[1], folds=folds)][::order]
        assert {case.fold for case in match_cases(given, study.reference)} == {"3"}


def test_records_that_cannot_be_read_leave_the_accuracy(study: Study, trained: Path, tmp_path: Path) -> None:
    from nnunetv2_e2enet.evaluation import comparison

    model = tmp_path / trained.name
    shutil.copytree(trained, model)
    source, _ = read_sources([str(m) for m in study.models])
    (model / "plans.json").write_text("{}")
    facts = comparison.model_facts(replace(source, model=model))
    assert facts.costs is None
    assert facts.note.startswith(f"{model} cannot be described (KeyError")
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    for logging in (None, {**checkpoint["logging"], "val_losses": [None, 0.5]}):
        torch.save({**checkpoint, "logging": logging}, file)
        shutil.copy(trained / "plans.json", model / "plans.json")
        facts = comparison.model_facts(replace(source, model=model))
        assert facts.costs is not None
        assert len(facts.trainings) == 2


def test_workers_are_no_more_than_the_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a batch job that has one core of the machine."""
    asked: list[int] = []

    def asked_for(*given: Any) -> Any:
        asked.append(given[5])
        return measure(*given[:5], 1, *given[6:])

    monkeypatch.setattr(measure_module, "measure", asked_for)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {3}, raising=False)
    study = Study(tmp_path, cases=8)
    command = study.arguments()
    at = command.index("--workers")
    assert main(command[:at] + command[at + 2 :]) == 0
    assert asked == [1]


def test_files_for_machines(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    table = study.folder / "cases.csv"
    assert main(study.arguments("--json", "--csv", str(table))) == 0
    content = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 6 * 2 * 2
    for row in rows:
        case = next(c for c in content["cases"] if c["case"] == row["case"])
        metrics = case["models"][row["model"]][row["class"]]
        assert {name: float(row[name]) if row[name] else None for name in metrics} == metrics
    assert content["provenance"]["versions"]["nnunetv2-e2enet"]
    assert {failure["kind"] for failure in content["failures"]} <= {"missed", "invented", "low Dice"}
    assert content["paired_tests"]["dice"][0]["scope"] == "mean"


class Page(HTMLParser):
    """What a page loads, and what it says of its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.images: list[str | None] = []
        self.drawings: list[str | None] = []
        self.tags: set[str] = set()
        self.anchors: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.loaded += [str(values[name]) for name in ("src", "srcset", "data", "poster", "xlink:href") if name in values]
        if tag in ("link", "image"):
            self.loaded.append(str(values.get("href")))
        if tag == "a":
            self.anchors.append(str(values["href"]))
        if values.get("id"):
            self.ids.add(str(values["id"]))
        if tag == "img":
            self.images.append(values.get("alt"))
        if tag == "svg" and values.get("aria-hidden") != "true":
            self.drawings.append(values.get("aria-label"))


@pytest.mark.parametrize("models", [2, 3])
def test_the_report_needs_nothing_else_and_says_what_its_pictures_show(tmp_path: Path, models: int) -> None:
    study = Study(tmp_path / "a<b>&c", models)
    report = tmp_path / "out.html"
    assert main(study.arguments("--report", str(report))) == 0
    text = report.read_text()
    page = Page(text)
    assert all(url.startswith(("data:", "#")) for url in page.loaded)
    assert all(anchor.startswith("#") and anchor[1:] in page.ids for anchor in page.anchors)
    assert not page.tags & {"script", "iframe", "object", "embed", "link"}
    assert "@import" not in text
    assert text.count("url(") == text.count("url(#")
    assert len(page.images) >= 4
    assert all(page.images)
    assert len(page.drawings) > 6
    assert all(page.drawings)
    assert "a<b>" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert ("Critical difference" in text) == (models > 2)
    assert "has the perfect value where another one invents it" in text
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_cases_without_any_foreground(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    for file in study.folder.rglob("*.nii.gz"):
        write_map(file, np.zeros((4, 5, 6), np.uint8))
    report = study.folder / "out.html"
    assert main(study.arguments("--report", str(report))) == 0
    assert "too few cases for a test (0)" in " ".join(capsys.readouterr().out.split())
    content = study.json()
    assert content["means"]["dice"]["model_a"]["mean"]["mean"] is None
    assert content["failures"] == []


def test_two_dimensions(tmp_path: Path) -> None:
    for i in range(3):
        voxels = np.zeros((20, 30), np.uint8)
        voxels[3:9, 4 : 10 + i] = 1
        for folder, values in (("labelsTr", voxels), ("model_a", voxels), ("model_b", np.roll(voxels, i, axis=0))):
            (tmp_path / folder).mkdir(exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / folder / f"case_{i}.png"))
    description = tmp_path / "dataset.json"
    description.write_text(json.dumps({"labels": {"background": 0, "nucleus": 1}, "file_ending": ".png"}))
    report = tmp_path / "out.html"
    folders = [str(tmp_path / name) for name in ("model_a", "model_b")]
    options = ["--reference", str(tmp_path / "labelsTr"), "--dataset-json", str(description), "--workers", "1", "--no-cache"]
    assert main(["compare", *folders, *options, "--report", str(report)]) == 0
    assert "No picture" in report.read_text()


def test_ctrl_c_leaves_nothing_half_written_and_the_next_run_goes_on(tmp_path: Path) -> None:
    study = Study(tmp_path, cases=1)
    for i in range(30):
        for folder in (study.reference, *study.models):
            shutil.copy(folder / "case_0.nii.gz", folder / f"case_{i}.nii.gz") if i else None
    report, cache = tmp_path / "out.html", tmp_path / "cache"
    command = [program("e2enet"), *study.arguments("--report", str(report), "--workers", "2")]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # tests that run in the background of a shell inherit that Ctrl-C is ignored
    ready = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    process = subprocess.Popen(command, **pipes, **ready)
    deadline = time.monotonic() + 120
    while not list(cache.rglob("output.pkl")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not report.exists()
    finished = list(cache.rglob("output.pkl"))
    assert finished
    assert all(joblib.load(file).shape == (2, len(ClassMetrics._fields)) for file in finished)
    assert main(study.arguments("--report", str(report))) == 0
    assert report.exists()


def test_without_the_extra_the_message_says_how_to_get_it(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "NEEDED", ("monai", "no_such_library"))
    assert main(study.arguments()) == 1
    expected = "needs no_such_library, not installed here: in the clone of the repository, pip install '.[evaluation]'"
    assert expected in capsys.readouterr().err
