"""Where predictions lie: nnU-Net's model folders with their validation predictions, or folders of predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.labels import Labels, read_labels
from nnunetv2_e2enet.files import read_json


@dataclass(frozen=True)
class Source:
    """The predictions of one model.

    Attributes:
        name: what tables call it.
        folder: as given.
        predictions: file by case.
        folds: fold by case; empty for a folder of predictions.
        labels: what its ``dataset.json`` says.
        file_ending: of label maps, with the dot.
        dataset: nnU-Net's name of the data set, where known.
        model: the model folder, where known: its plans and checkpoints tell the costs.
    """

    name: str
    folder: Path
    predictions: dict[str, Path]
    folds: dict[str, str]
    labels: Labels
    file_ending: str
    dataset: str | None
    model: Path | None


def is_model_folder(folder: Path) -> bool:
    """Whether a folder is nnU-Net's ``TRAINER__PLANS__CONFIGURATION``, by its content."""
    return (folder / "plans.json").is_file() and any(folder.glob("fold_*"))


def read_sources(
    given: Sequence[str],
    folds: Sequence[str] | None = None,
    dataset_json: Path | None = None,
    models: Sequence[str] = (),
) -> list[Source]:
    """One source for each ``FOLDER`` or ``NAME=FOLDER``.

    Args:
        given: at least two.
        folds: of model folders, such as ``["0", "1"]``; all with validation predictions unless given.
        dataset_json: names the labels where a folder of predictions has no ``dataset.json``.
        models: ``NAME=FOLDER`` of the model folders that made folders of predictions, which tell their costs.

    Raises:
        E2ENetError: fewer than two, two of one name, or a folder without predictions.
    """
    if len(given) < 2:
        raise E2ENetError(f"{len(given)} result to compare: give at least two folders")
    named = [_split_name(text) for text in given]
    folders = [folder for _, folder in named]
    for folder in folders:
        if not folder.is_dir():
            raise E2ENetError(f"{folder} is not a folder: expected an nnU-Net model folder or a folder of predictions")
    names = [name or default for (name, _), default in zip(named, default_names(folders), strict=True)]
    if len(set(names)) < len(names):
        raise E2ENetError(f"two results have the same name ({', '.join(names)}): give them names as in NAME=FOLDER")
    sources = []
    for name, folder in zip(names, folders, strict=True):
        read = _read_model_folder(folder, folds) if is_model_folder(folder) else _read_predictions(folder, dataset_json)
        sources.append(replace(read, name=name))
    return _with_models(sources, models)


def _with_models(sources: list[Source], models: Sequence[str]) -> list[Source]:
    folders = dict(_split_name(text) for text in models)
    strangers = [name for name in folders if name not in {source.name for source in sources}]
    if strangers:
        found = ", ".join(source.name for source in sources)
        raise E2ENetError(f"--model names {strangers[0] or 'no result'}: expected NAME=FOLDER with one of the names {found}")
    for folder in folders.values():
        if not is_model_folder(folder):
            raise E2ENetError(f"--model {folder} is no nnU-Net model folder: expected one with plans.json and fold_*")
    return [replace(source, model=folders.get(source.name, source.model)) for source in sources]


def default_names(folders: Sequence[Path]) -> list[str]:
    """Names from the parts of nnU-Net's ``trainer__plans__configuration`` in which the folders differ.

    Folders of one name are called after the folder that they are in.
    """
    resolved = [folder.resolve() for folder in folders]
    texts = [folder.name for folder in resolved]
    if len(set(texts)) < len(texts):
        return [f"{folder.parent.name}/{folder.name}" for folder in resolved]
    parts = [text.split("__") for text in texts]
    if any(len(p) != 3 for p in parts):
        return texts
    differing = [i for i in range(3) if len({p[i] for p in parts}) > 1]
    return ["__".join(short_trainer_name(p[i]) if i == 0 else p[i] for i in differing) for p in parts]


def short_trainer_name(trainer: str) -> str:
    """``E2ENet_S90`` for ``nnUNetTrainerE2ENet_S90``, ``nnU-Net_250epochs`` for ``nnUNetTrainer_250epochs``."""
    variant = trainer.removeprefix("nnUNetTrainer")
    return variant if variant and not variant.startswith("_") else f"nnU-Net{variant}"


def _split_name(text: str) -> tuple[str, Path]:
    """``NAME=FOLDER``, divided where a folder follows; a text that is a folder as it stands has no name."""
    if not Path(text).exists():
        places = [i for i, character in enumerate(text) if character == "=" and i > 0]
        for place in reversed(places):
            if Path(text[place + 1 :]).exists() or place == places[0]:
                return text[:place], Path(text[place + 1 :])
    return "", Path(text)


def _read_model_folder(folder: Path, folds: Sequence[str] | None) -> Source:
    description = read_json(folder / "dataset.json")
    ending = _file_ending(description, folder)
    present = sorted(f for f in folder.glob("fold_*") if any((f / "validation").glob(f"*{ending}")))
    names = [f.name.removeprefix("fold_") for f in present]
    if folds is None:
        wanted = [n for n in names if n != "all"]
        if not wanted and "all" in names:
            raise E2ENetError(
                f"{folder} has fold_all alone, whose validation predictions are of training cases and no measure of accuracy: "
                "train folds, or name it with --folds all"
            )
    else:
        wanted = list(folds)
    missing = [n for n in wanted if n not in names]
    if missing or not wanted:
        expected = ", ".join(f"fold_{n}" for n in missing) or "a fold"
        raise E2ENetError(
            f"{folder} has no validation predictions (*{ending}) of {expected}, found those of {names or 'no fold'}: "
            "finish the training, or run nnUNetv2_train with --val"
        )
    predictions: dict[str, Path] = {}
    fold_of: dict[str, str] = {}
    for name in wanted:
        for file in sorted((folder / f"fold_{name}" / "validation").glob(f"*{ending}")):
            case = file.name.removesuffix(ending)
            if case in fold_of:
                raise E2ENetError(
                    f"{folder}: folds {fold_of[case]} and {name} both validate {case}: the folds come from different splits"
                )
            predictions[case], fold_of[case] = file, name
    dataset = read_json(folder / "plans.json").get("dataset_name")
    labels = read_labels(description, str(folder / "dataset.json"))
    return Source("", folder, predictions, fold_of, labels, ending, dataset, folder)


def _read_predictions(folder: Path, dataset_json: Path | None) -> Source:
    own = folder / "dataset.json"
    file = dataset_json if dataset_json is not None else own
    if not file.is_file():
        raise E2ENetError(f"{file} is missing, so the labels in {folder} have no names: give --dataset-json FILE")
    description = read_json(file)
    ending = _file_ending(description, file)
    predictions = {f.name.removesuffix(ending): f for f in sorted(folder.glob(f"*{ending}"))}
    if not predictions:
        raise E2ENetError(f"{folder} holds no *{ending} file and no fold_*: expected predictions or an nnU-Net model folder")
    plans = folder / "plans.json"
    dataset = read_json(plans).get("dataset_name") if plans.is_file() else None
    return Source("", folder, predictions, {}, read_labels(description, str(file)), ending, dataset, None)


def _file_ending(description: dict[str, Any], where: Path) -> str:
    ending = description.get("file_ending")
    if not isinstance(ending, str) or not ending:
        raise E2ENetError(f"{where}: the dataset.json has no file_ending: expected nnU-Net's dataset.json")
    return ending


def find_reference(sources: Sequence[Source], given: Path | None) -> Path:
    """The folder of reference segmentations.

    Args:
        sources: the models that are compared.
        given: the folder that the user named; otherwise looked up as nnU-Net stores them, by the name of the data set.

    Raises:
        E2ENetError: the folder is not there.
    """
    if given is not None:
        if not given.is_dir():
            raise E2ENetError(f"{given} is not a folder: expected the reference segmentations")
        return given
    candidates = [
        Path(os.environ[variable]) / source.dataset / folder
        for source in sources
        if source.dataset
        for variable, folder in (("nnUNet_preprocessed", "gt_segmentations"), ("nnUNet_raw", "labelsTr"))
        if os.environ.get(variable)
    ]
    all_cases = [set(source.predictions) for source in sources]
    wanted = set.intersection(*all_cases) or set.union(*all_cases)
    for folder in candidates:
        if folder.is_dir() and any((folder / f"{case}{sources[0].file_ending}").is_file() for case in wanted):
            return folder
    looked = (
        ", ".join(dict.fromkeys(map(str, candidates)))
        or "nowhere, as no result has a plans.json, or nnUNet_preprocessed and nnUNet_raw are not set"
    )
    raise E2ENetError(f"no reference segmentations of these cases (looked in {looked}): name their folder with --reference")


def find_images(sources: Sequence[Source], given: Path | None) -> Path | None:
    """The folder of images (``CASE_0000`` and file ending), for pictures; None where it is not known."""
    if given is not None:
        if not given.is_dir():
            raise E2ENetError(f"{given} is not a folder: expected the images")
        return given
    raw = os.environ.get("nnUNet_raw")
    for source in sources:
        for name in ("imagesTr", "imagesTs"):
            folder = Path(raw) / source.dataset / name if raw and source.dataset else None
            if folder and any((folder / f"{case}_0000{source.file_ending}").is_file() for case in source.predictions):
                return folder
    return None
