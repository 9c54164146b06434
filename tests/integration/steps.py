"""The workflow of one cell, step by step: nnU-Net's commands, and what must be true afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from integration import checks
from integration.cell import E2ENET, FIVE_FOLDS, PLANS, STOCK, Cell
from integration.checks import expect, expect_files, expect_predictions, expect_same, expect_trained

PRETRAINED_FOLD, INTERRUPTED_FOLD = 3, 4


@dataclass(frozen=True)
class Step:
    """One row of the table.

    Attributes:
        name: of the step.
        run: does it, and raises StepError if it fails.
        needs: steps of the same cell without which it cannot be done.
        cascade_needs: steps of ``3d_lowres`` without which the cascade cannot do it.
    """

    name: str
    run: Callable[[Cell], None]
    needs: tuple[str, ...] = ()
    cascade_needs: tuple[str, ...] = ()


def train_folds(cell: Cell) -> None:
    for fold in cell.folds:
        if fold not in (PRETRAINED_FOLD, INTERRUPTED_FOLD):
            cell.train(fold, "--npz")
            expect_trained(cell.fold(fold))


def train_fold_all(cell: Cell) -> None:
    cell.train("all")
    expect_trained(cell.fold("all"))


def train_with_pretrained_weights(cell: Cell) -> None:
    """The loaded topology is what training goes on from: of its connections, (1 - 0.5) (1 - 0.25) survive two updates."""
    given = cell.fold(0) / "checkpoint_final.pth"
    cell.train(PRETRAINED_FOLD, "--npz", "-pretrained_weights", given)
    expect_trained(cell.fold(PRETRAINED_FOLD))
    before, after = checks.masks(cell.fold(0)), checks.masks(cell.fold(PRETRAINED_FOLD))
    n_loaded = sum(int(mask.sum()) for mask in before.values())
    n_kept = sum(int((mask & after[name]).sum()) for name, mask in before.items())
    expect(n_kept >= 0.36 * n_loaded, f"{n_kept} of {n_loaded} loaded connections were kept: fewer than two updates leave")


def resume_a_killed_training(cell: Cell) -> None:
    """It is killed when it has written its first checkpoint, after the first epoch."""
    folder = cell.fold(INTERRUPTED_FOLD)
    cell.train(INTERRUPTED_FOLD, "--npz", killed_by=folder / "checkpoint_best.pth")
    expect(not (folder / "checkpoint_final.pth").exists(), "the training had ended before it could be killed")
    before = checks.training_log(folder)
    cell.train(INTERRUPTED_FOLD, "--npz", "--c")
    expect_trained(folder)
    epochs = checks.epochs_in(checks.training_log(folder).removeprefix(before))
    expect(epochs == list(range(checks.N_EPOCHS))[-len(epochs) :] != [], f"the resumed training had epochs {epochs}")
    expect(0 not in epochs, "the resumed training began anew")


def validate_best(cell: Cell) -> None:
    _validate(cell, "--val_best")


def validate(cell: Cell) -> None:
    """Gives what was validated at the end of the training."""
    _validate(cell)
    kept = cell.predictions("validation after training")
    expect_same(kept, cell.fold(0) / "validation")


def _validate(cell: Cell, *options: str) -> None:
    fold, kept = cell.fold(0), cell.predictions("validation after training")
    if not kept.exists():
        shutil.copytree(fold / "validation", kept)
    checkpoint = (fold / "checkpoint_final.pth").read_bytes()
    (fold / "validation" / "summary.json").unlink()
    cell.train(0, "--val", "--npz", *options)
    expect_files(fold / "validation" / "summary.json")
    expect((fold / "checkpoint_final.pth").read_bytes() == checkpoint, "validation has changed the checkpoint")


def accumulate(cell: Cell) -> None:
    folds = tuple(map(str, cell.folds))
    model = ("-c", cell.configuration, "-tr", E2ENET, "-p", PLANS, "-f", *folds)
    cell.run("nnUNetv2_accumulate_crossval_results", cell.number, *model)
    summary = _accumulated(cell) / "summary.json"
    n_cases = len(json.loads(summary.read_text())["metric_per_case"])
    n_expected = len(list((cell.raw / "labelsTr").glob("*.nii.gz"))) * len(folds) // len(FIVE_FOLDS)
    expect(n_cases == n_expected, f"{summary} is of {n_cases} cases, but {n_expected} were expected")


def evaluate(cell: Cell) -> None:
    """What accumulation has found, found again from its files."""
    merged = _accumulated(cell)
    reference = cell.work.preprocessed / cell.scheme.dataset / "gt_segmentations"
    description = ("-djfile", merged / "dataset.json", "-pfile", merged / "plans.json")
    expected = _dice(merged / "summary.json")
    output = cell.log.with_suffix(".json")
    cell.run("nnUNetv2_evaluate_folder", reference, merged, *description, "-o", output, "-np", "1", "--chill")
    expect(_dice(output) == expected, f"evaluate_folder found a Dice of {_dice(output)}, accumulation {expected}")
    if not cell.scheme.regions:
        labels = json.loads((merged / "dataset.json").read_text())["labels"]
        ignore = ("-il", str(labels.pop("ignore"))) if cell.scheme.ignore else ()
        foreground = [str(value) for value in labels.values() if value]
        what = ("-l", *foreground, *ignore, "-o", output, "-np", "1", "--chill")
        cell.run("nnUNetv2_evaluate_simple", reference, merged, *what)
        expect(_dice(output) == expected, f"evaluate_simple found a Dice of {_dice(output)}, accumulation {expected}")


def _accumulated(cell: Cell) -> Path:
    return cell.model(E2ENET) / f"crossval_results_folds_{'_'.join(map(str, cell.folds))}"


def _dice(summary: Path) -> str:
    """As text, because no number is equal to NaN."""
    return str(json.loads(summary.read_text())["foreground_mean"]["Dice"])


def train_stock(cell: Cell) -> None:
    for fold in cell.folds:
        cell.train(fold, "--npz", trainer=STOCK)
        expect_files(cell.fold(fold, STOCK) / "validation" / "summary.json")
    if cell.configuration == "3d_lowres":  # the cascade of stock nnU-Net is trained on what this predicts
        cell.train("all", trainer=STOCK)


def find_best_configuration(cell: Cell) -> None:
    options = ("-c", cell.configuration, "-tr", E2ENET, STOCK, "-f", *map(str, cell.folds), "-np", "1")
    cell.run("nnUNetv2_find_best_configuration", cell.number, *options)
    found = json.loads((cell.work.results / cell.scheme.dataset / "inference_information.json").read_text())
    names = [cell.model(trainer).name for trainer in (E2ENET, STOCK)]
    ensemble = f"ensemble___{names[0]}___{names[1]}___{'_'.join(map(str, cell.folds))}"
    expect(set(found["all_results"]) == {*names, ensemble}, f"compared were {', '.join(found['all_results'])}")
    postprocessing = Path(found["best_model_or_ensemble"]["postprocessing_file"])
    expect_files(postprocessing)
    shutil.copy(postprocessing, _postprocessing(cell))


def determine_postprocessing(cell: Cell) -> None:
    merged = _accumulated(cell)
    reference = cell.work.preprocessed / cell.scheme.dataset / "gt_segmentations"
    cell.run("nnUNetv2_determine_postprocessing", "-i", merged, "-ref", reference, "-np", "1")
    expect_files(merged / "postprocessing.pkl", merged / "postprocessed" / "summary.json")


def _postprocessing(cell: Cell) -> Path:
    return cell.model(E2ENET) / "best_postprocessing.pkl"


def predict_one_fold(cell: Cell) -> None:
    expect_predictions(cell, cell.predict("one fold", "--save_probabilities"))


def predict_several_folds(cell: Cell) -> None:
    folder = cell.predict("several folds", "--save_probabilities", folds=(0, 1))
    expect_predictions(cell, folder)
    checks.expect_different(folder, cell.predictions("one fold"))


def predict_fold_all(cell: Cell) -> None:
    expect_predictions(cell, cell.predict("fold all", folds=("all",)))


def predict_with_best_checkpoint(cell: Cell) -> None:
    """As from results in which that checkpoint is the only one, under the usual name."""
    folder = cell.predict("best checkpoint", "--save_probabilities", "-chk", "checkpoint_best.pth")
    expect_predictions(cell, folder)
    renamed = cell.predictions("results of the best checkpoint")
    model = cell.model(E2ENET, renamed)
    shutil.copytree(cell.model(E2ENET), model, ignore=shutil.ignore_patterns("fold_*", "crossval*"))
    (model / "fold_0").mkdir()
    shutil.copy(cell.fold(0) / "checkpoint_best.pth", model / "fold_0" / "checkpoint_final.pth")
    expect_same(folder, cell.predict("renamed checkpoint", "--save_probabilities", results=renamed))


def predict_without_mirroring(cell: Cell) -> None:
    folder = cell.predict("no mirroring", "--save_probabilities", "--disable_tta")
    expect_predictions(cell, folder)
    checks.expect_different(folder, cell.predictions("one fold"))


def predict_in_parts(cell: Cell) -> None:
    for part in ("0", "1"):
        cell.predict("parts", "--save_probabilities", "-num_parts", "2", "-part_id", part)
    expect_same(cell.predictions("one fold"), cell.predictions("parts"))


def predict_from_modelfolder(cell: Cell) -> None:
    model = ("-m", cell.model(E2ENET), "-f", "0")
    cell.run("nnUNetv2_predict_from_modelfolder", *model, *cell.images("modelfolder"), "--save_probabilities")
    expect_same(cell.predictions("one fold"), cell.predictions("modelfolder"))


def ensemble(cell: Cell) -> None:
    stock = cell.predict("stock", "--save_probabilities", trainer=STOCK)
    output = cell.predictions("ensemble")
    cell.run("nnUNetv2_ensemble", "-i", cell.predictions("one fold"), stock, "-o", output, "-np", "1", "--save_npz")
    expect_predictions(cell, output)
    ours, theirs, both = map(checks.probabilities, (cell.predictions("one fold"), stock, output))
    for name, probability in both.items():
        difference = float(abs(probability - (ours[name] + theirs[name]) / 2).max())
        expect(difference < 1e-3, f"the ensemble's {name} is {difference:.2g} from the mean of its members")


def apply_postprocessing(cell: Cell) -> None:
    output = cell.predictions("postprocessed")
    given, model = cell.predictions("ensemble"), cell.model(E2ENET)
    description = ("-plans_json", model / "plans.json", "-dataset_json", model / "dataset.json")
    command = ("-i", given, "-o", output, "-pp_pkl_file", _postprocessing(cell), "-np", "1")
    cell.run("nnUNetv2_apply_postprocessing", *command, *description)
    expect_predictions(cell, output)


def export_and_install(cell: Cell) -> None:
    archive = cell.predictions("model.zip")
    installed = cell.predictions("installed results")
    installed.mkdir()
    model = ("-d", cell.number, "-c", cell.configuration, "-tr", E2ENET, "-f", "0")
    cell.run("nnUNetv2_export_model_to_zip", *model, "-o", archive)
    cell.run("nnUNetv2_install_pretrained_model_from_zip", archive, environment={"nnUNet_results": str(installed)})
    expect_files(cell.model(E2ENET, installed) / "fold_0" / "checkpoint_final.pth")
    cell.predict("installed", "--save_probabilities", results=installed)
    expect_same(cell.predictions("one fold"), cell.predictions("installed"))


STEPS = (
    Step("train folds", train_folds, (), ("train fold all",)),
    Step("train fold all", train_fold_all, (), ("train fold all",)),
    Step("-pretrained_weights", train_with_pretrained_weights, ("train folds",)),
    Step("--c", resume_a_killed_training, (), ("train fold all",)),
    Step("--val_best", validate_best, ("train folds",)),
    Step("--val", validate, ("train folds", "--val_best")),
    Step("accumulate_crossval_results", accumulate, ("train folds", "-pretrained_weights", "--c")),
    Step("evaluate", evaluate, ("accumulate_crossval_results",)),
    Step("determine_postprocessing", determine_postprocessing, ("accumulate_crossval_results",)),
    Step("train stock nnU-Net", train_stock, (), ("train stock nnU-Net",)),
    Step("find_best_configuration", find_best_configuration, ("--val", "accumulate_crossval_results", "train stock nnU-Net")),
    Step("predict, one fold", predict_one_fold, ("train folds",), ("predict, one fold",)),
    Step("predict, several folds", predict_several_folds, ("predict, one fold",)),
    Step("predict, fold all", predict_fold_all, ("train fold all",), ("predict, one fold",)),
    Step("predict, best checkpoint", predict_with_best_checkpoint, ("predict, one fold",)),
    Step("predict, no mirroring", predict_without_mirroring, ("predict, one fold",)),
    Step("predict, in parts", predict_in_parts, ("predict, one fold",)),
    Step("predict_from_modelfolder", predict_from_modelfolder, ("predict, one fold",)),
    Step("ensemble", ensemble, ("predict, one fold", "train stock nnU-Net")),
    Step("apply_postprocessing", apply_postprocessing, ("ensemble", "find_best_configuration")),
    Step("export, install, predict", export_and_install, ("predict, one fold",)),
)
