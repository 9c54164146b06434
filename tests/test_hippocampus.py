"""Real scans (MSD Task04 Hippocampus, CC-BY-SA 4.0) through nnU-Net's console commands, from conversion to evaluation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from integration.commands import Runner
from support import Project, assert_dice_is_that_of_the_files, nnunet_environment, run_command

N_TRAINING, N_HELD_OUT = 5, 1


@pytest.fixture(scope="module")
def task(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the cases, in the format of the Medical Segmentation Decathlon; labelled ones are held out beside it."""
    source = shared / "data" / "Task04_Hippocampus"
    if not source.is_dir():
        pytest.skip(f"needs the Hippocampus scans in {source}, which are not there")
    folder = tmp_path_factory.mktemp("msd") / "Task04_Hippocampus"
    description = json.loads((source / "dataset.json").read_text())
    labelled = sorted(case["image"] for case in description["training"])
    test = sorted(description["test"])[:N_HELD_OUT]
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    description["training"] = []
    for image in labelled[:N_TRAINING]:
        label = image.replace("imagesTr", "labelsTr")
        for file in (image, label):
            shutil.copy(source / file, folder / file)
        description["training"].append({"image": image, "label": label})
    for image in test:
        shutil.copy(source / image, folder / image)
    description.update(test=test, numTraining=N_TRAINING, numTest=len(test))
    (folder / "dataset.json").write_text(json.dumps(description))
    for image in labelled[N_TRAINING : N_TRAINING + N_HELD_OUT]:
        case = Path(image).name.replace(".nii.gz", "")
        (folder.parent / "images").mkdir(exist_ok=True)
        (folder.parent / "labels").mkdir(exist_ok=True)
        shutil.copy(source / image, folder.parent / "images" / f"{case}_0000.nii.gz")
        shutil.copy(source / image.replace("imagesTr", "labelsTr"), folder.parent / "labels" / f"{case}.nii.gz")
    return folder


def test_the_whole_way(task: Path, tmp_path: Path, runner: Runner) -> None:
    project = Project(tmp_path, "Dataset004_Hippocampus", runner)
    for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / folder).mkdir()
    project.run("nnUNetv2_convert_MSD_dataset", "-i", str(task), "-np", "2")
    prepare = ["nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "--verify_dataset_integrity"]
    project.run(*prepare, "-np", "2", "-npfp", "2")
    trainer = "nnUNetTrainerE2ENet_smoke"
    for fold in ("0", "1"):
        project.train(trainer, fold=fold)
    model = project.model(trainer)
    for fold in (0, 1):
        summary = load_json(str(model / f"fold_{fold}" / "validation" / "summary.json"))
        assert len(summary["metric_per_case"]) == N_TRAINING // 5
        checkpoint = torch.load(model / f"fold_{fold}" / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        masks = [value for key, value in checkpoint["network_weights"].items() if key.endswith(".mask")]
        assert all(int(mask.sum()) == round(0.2 * mask.numel()) for mask in masks)

    options = ["-d", "4", "-c", "3d_fullres", "-f", "0", "1", "-tr", trainer, "-device", "cpu", "-npp", "1", "-nps", "1"]
    for images, output in ((project.raw / "imagesTs", tmp_path / "test"), (task.parent / "images", tmp_path / "held_out")):
        project.run("nnUNetv2_predict", "-i", str(images), "-o", str(output), *options)
        for image in images.glob("*.nii.gz"):
            prediction = sitk.ReadImage(str(output / image.name.replace("_0000.nii.gz", ".nii.gz")))
            assert prediction.GetSize() == sitk.ReadImage(str(image)).GetSize()
            assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2}
    description = ["-djfile", str(project.raw / "dataset.json"), "-pfile", str(model / "plans.json")]
    labels, predictions = str(task.parent / "labels"), str(tmp_path / "held_out")
    project.run("nnUNetv2_evaluate_folder", labels, predictions, *description)
    result = load_json(str(tmp_path / "held_out" / "summary.json"))
    assert len(result["metric_per_case"]) == N_HELD_OUT
    assert_dice_is_that_of_the_files(result)


@pytest.mark.slow
def test_two_trainings_are_compared(task: Path, tmp_path: Path, registered: None) -> None:  # noqa: ARG001
    environment = nnunet_environment(tmp_path)
    for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / folder).mkdir()
    run_command("nnUNetv2_convert_MSD_dataset", "-i", str(task), "-np", "2", env=environment)
    run_command("nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "-np", "2", "-npfp", "2", env=environment)
    results = tmp_path / "nnUNet_results" / "Dataset004_Hippocampus"
    models = {}
    for name, trainer in (("E2ENet_smoke", "nnUNetTrainerE2ENet_smoke"), ("nnU-Net_smoke", "nnUNetTrainer_smoke")):
        run_command("nnUNetv2_train", "4", "3d_fullres", "0", "-tr", trainer, "-device", "cpu", env=environment)
        models[name] = results / f"{trainer}__nnUNetPlans__3d_fullres"
    output, report = tmp_path / "out.json", tmp_path / "out.html"
    written = ["--report", str(report), "--json", str(output), "--no-cache", "--workers", "1"]
    run_command("e2enet", "compare", *map(str, models.values()), *written, env=environment)
    content = json.loads(output.read_text())
    assert "Worst case 1: hippocampus" in report.read_text()
    keys = {c["name"]: str(c["values"][0]) for c in content["classes"]}
    for name, model in models.items():
        summary = load_json(str(model / "fold_0" / "validation" / "summary.json"))
        theirs = {Path(case["prediction_file"]).name: case["metrics"] for case in summary["metric_per_case"]}
        assert len(theirs) == len(content["cases"]) > 0
        for case in content["cases"]:
            for label, metrics in case["models"][name].items():
                expected = theirs[f"{case['case']}.nii.gz"][keys[label]]["Dice"]
                assert metrics["dice"] == pytest.approx(expected, abs=1e-6)
        assert content["means"]["dice"][name]["mean"]["mean"] == pytest.approx(summary["foreground_mean"]["Dice"], abs=1e-6)
