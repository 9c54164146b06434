"""`e2enet compare` on model folders of two folds: what its options choose, and splits that do not belong together."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import golden
import pytest
from matplotlib.figure import Figure

from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation import memory
from nnunetv2_e2enet.evaluation.networks import Design
from nnunetv2_e2enet.evaluation.report import page, pictures
from nnunetv2_e2enet.evaluation.sources import find_images


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> golden.Study:
    """Not to be changed."""
    return golden.Study(tmp_path_factory.mktemp("options") / "study")


@pytest.fixture(scope="module")
def whole(study: golden.Study) -> dict[str, Any]:
    """The comparison without options."""
    return compared(study)


def arguments(study: golden.Study, *more: str, stock: Path | None = None) -> list[str]:
    results = [f"E2ENet={study.e2enet}", f"nnU-Net={stock or study.stock}"]
    return ["compare", *results, "--workers", "1", "--cache", str(study.folder / "cache"), *more]


def compared(study: golden.Study, *more: str, stock: Path | None = None) -> dict[str, Any]:
    return json.loads(study.run(*arguments(study, *more, "--json", stock=stock)))


def refused(study: golden.Study, capsys: pytest.CaptureFixture[str], *more: str, stock: Path | None = None) -> str:
    with study.active():
        assert main(arguments(study, *more, stock=stock)) == 1
    return capsys.readouterr().err


def copied_stock(study: golden.Study, folder: Path) -> tuple[Path, list[Path]]:
    """A copy of the model folder, and its folders of validation predictions."""
    model = shutil.copytree(study.stock, folder / study.stock.name)
    return model, [model / f"fold_{fold}" / "validation" for fold in range(golden.FOLDS)]


def test_folds_choose_cases(study: golden.Study, whole: dict[str, Any]) -> None:
    assert [case["case"] for case in whole["cases"]] == study.cases
    content = compared(study, "--folds", "0")
    assert content["cases"] == [case for case in whole["cases"] if case["fold"] == "0"]
    assert [case["case"] for case in content["cases"]] == study.cases[:: golden.FOLDS]
    for model, means in content["means"]["dice"].items():
        assert means["mean"]["mean"] == pytest.approx(whole["fold_means"]["dice"][model]["0"], rel=1e-12)
    assert [[training["fold"] for training in model["trainings"]] for model in content["models"]] == [["0"], ["0"]]
    assert [[training["fold"] for training in model["trainings"]] for model in whole["models"]] == [["0", "1"]] * 2


def test_folds_that_are_not_there(study: golden.Study, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(study, capsys, "--folds", "0", "3")
    assert "has no validation predictions (*.nii.gz) of fold_3, found those of ['0', '1']" in message


def test_a_case_that_two_folds_validate(study: golden.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, (first, second) = copied_stock(study, tmp_path)
    case = study.cases[0]
    shutil.copy(first / f"{case}.nii.gz", second)
    message = refused(study, capsys, stock=model)
    assert f"{model}: folds 0 and 1 both validate {case}: the folds come from different splits" in message


def test_a_case_that_another_fold_validates(
    study: golden.Study, whole: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, (first, second) = copied_stock(study, tmp_path)
    case = study.cases[0]
    (first / f"{case}.nii.gz").rename(second / f"{case}.nii.gz")
    message = refused(study, capsys, stock=model)
    assert f"the splits differ: {case} are validated by different folds" in message
    common = compared(study, "--common", stock=model)
    assert common["means"] == whole["means"]
    assert {c["case"]: c["fold"] for c in common["cases"]} == {**{c["case"]: c["fold"] for c in whole["cases"]}, case: None}


@pytest.mark.parametrize(("a1", "a2"), [(2, 0), (0.5, 3)])
def test_weights_of_the_score(study: golden.Study, a1: float, a2: float) -> None:
    """As in docs/comparison.md: a1 * Dice / best Dice + a2 * (fewest parameters / parameters + least MAC / MAC)."""
    content = compared(study, "--weights", str(a1), str(a2))
    assert (content["trade_off"]["a1"], content["trade_off"]["a2"]) == (a1, a2)
    costs = {model["name"]: model["costs"] for model in content["models"]}
    dice = {name: content["means"]["dice"][name]["mean"]["mean"] for name in costs}
    assert len(set(dice.values())) == 2
    for kind in ("active", "executed"):
        for name, cost in costs.items():
            parameters = least(costs, "parameters_active") / cost["parameters_active"]
            arithmetic = least(costs, f"macs_{kind}") / cost[f"macs_{kind}"]
            expected = a1 * dice[name] / max(dice.values()) + a2 * (parameters + arithmetic)
            assert content["trade_off"]["scores"][name][kind] == pytest.approx(expected, rel=1e-12)


def least(costs: Mapping[str, Mapping[str, float]], name: str) -> float:
    return min(cost[name] for cost in costs.values())


def test_weights_below_zero(study: golden.Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(study, capsys, "--weights", "1", "-2") == "e2enet compare: --weights 1 -2: expected numbers from 0\n"


def test_images_of_the_report(study: golden.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the data set, or from another folder, which may lack some. Pictures and page are empty, for the time."""
    drawn: dict[str, Path | None] = {}

    def empty(image: Path | None, segmentations: Mapping[str, Path], _labels: Mapping[int, str]) -> Figure:
        drawn[segmentations["Reference"].name] = image
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(pictures, "overlay", empty)
    monkeypatch.setattr(page, "report_html", lambda *_: "")
    own = study.raw / "imagesTr"
    command = arguments(study, "--report", str(tmp_path / "out.html"), "--folds", "0")
    study.run(*command)
    cases = [name.removesuffix(".nii.gz") for name in drawn]
    assert len(cases) > 1
    assert list(drawn.values()) == [own / f"{case}_0000.nii.gz" for case in cases]
    others = shutil.copytree(own, tmp_path / "images")
    (others / f"{cases[0]}_0000.nii.gz").unlink()
    study.run(*command, "--images", str(others))
    assert list(drawn.values()) == [None, *(others / f"{case}_0000.nii.gz" for case in cases[1:])]


def test_images_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(E2ENetError, match="none is not a folder: expected the images"):
        find_images([], tmp_path / "none")


def test_memory_and_time_are_measured_on_request(
    study: golden.Study, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the models whose folders are known. Memory is measured in processes of its own, for which numbers stand here."""
    assert whole["profiles"]["models"] == []
    asked: list[tuple[str, bool, int]] = []

    def peak(design: Design, training: bool, batch_size: int, _device: str, _threads: int) -> float:
        asked.append((design.name, training, batch_size))
        return 2.0**30 * len(asked)

    monkeypatch.setattr(memory, "peak_bytes", peak)
    output = study.folder / "measured.json"
    printed = study.run("compare", f"rough={study.rough}", *arguments(study, "--measure", "--json", str(output))[1:])
    content = json.loads(output.read_text())
    assert asked == [(name, training, 2 if training else 1) for name in ("E2ENet", "nnU-Net") for training in (True, False)]
    profiles = content["profiles"]["models"]
    assert [profile["name"] for profile in profiles] == ["E2ENet", "nnU-Net"]
    found = [(profile["training_bytes"], profile["prediction_bytes"]) for profile in profiles]
    assert found == [(2**30, 2 * 2**30), (3 * 2**30, 4 * 2**30)]
    assert [len(profile["seconds"]) for profile in profiles] == [content["profiles"]["settings"]["rounds"]] * 2
    assert all(f"{gibibytes}.0" in printed for gibibytes in (1, 2, 3, 4))


def test_what_cannot_be_measured_leaves_the_comparison(study: golden.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the network takes, and time, are missing; terminal and page say why."""
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: math.nan)
    page = study.folder / "measured.html"
    printed = study.run(*arguments(study, "--measure", "--report", str(page)))
    note = "a training step ran out of memory, or was ended from outside; a prediction ran out of memory, or was"
    for name in ("E2ENet", "nnU-Net"):
        assert f"{name}: {note}" in " ".join(printed.split())
        assert f"{name}: {note}" in page.read_text()
