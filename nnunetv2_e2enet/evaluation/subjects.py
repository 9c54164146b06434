"""Subjects of ``e2enet profile``: model folders, plans files, data sets; and the networks beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.choices import BESIDE, SPARSITIES
from nnunetv2_e2enet.evaluation.networks import (
    Design,
    dataset_folder,
    e2enet_variant,
    model_design,
    of_others,
    residual_encoder_variant,
)
from nnunetv2_e2enet.evaluation.sources import default_names, is_model_folder, short_trainer_name
from nnunetv2_e2enet.files import read_json
from nnunetv2_e2enet.training.architecture import is_e2enet

PRESETS = {"ResEnc M": "nnUNetPlannerResEncM", "ResEnc L": "nnUNetPlannerResEncL"}


@of_others("the plans cannot be described")
def designs(
    subjects: Sequence[str],
    configuration: str | None = None,
    trainer: str | None = None,
    dataset_json: Path | None = None,
    beside: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
) -> list[Design]:
    """All networks that were asked for, each with a name of its own.

    Args:
        subjects: folders, files, names or numbers of data sets.
        configuration: of plans; ``3d_fullres`` where there is one unless given.
        trainer: builds the networks of plans, instead of those below.
        dataset_json: of a plans file that has none beside it.
        beside: which networks to build from plans (``BESIDE``); None is all for plans and data sets, none for model folders.
        sparsities: of E2ENets that are built from plans; None is ``SPARSITIES``.

    Raises:
        E2ENetError: a subject is nothing known, or what is asked for cannot be built from it.
    """
    folders = [Path(s) for s in subjects if is_model_folder(Path(s))]
    names = dict(zip(folders, default_names(folders) if len(folders) > 1 else [_short(f) for f in folders], strict=True))
    if all(Path(s) in names for s in subjects):
        _check_plans_unneeded(configuration, trainer, dataset_json)
    elif trainer is not None and beside is not None:
        raise E2ENetError(
            f"--trainer {trainer} and --beside {' '.join(beside)} both say which networks to build from plans: leave one out"
        )
    found: list[Design] = []
    described: list[Design] = []
    for subject in subjects:
        path = Path(subject)
        if path in names:
            design = model_design(path, names[path])
            described.append(design)
            found += [design, *_beside(replace(design, checkpoint=None), None, beside or (), sparsities or SPARSITIES)]
            continue
        dataset = None if path.is_file() else dataset_folder(subject)
        if dataset is None and not path.is_file():
            raise E2ENetError(
                f"{subject} is no model folder (plans.json and fold_*), plans file, or data set in nnUNet_preprocessed: "
                "check the path, or set nnUNet_preprocessed"
            )
        stock = _from_plans(dataset / "nnUNetPlans.json" if dataset else path, configuration, dataset_json)
        if trainer is not None:
            found.append(replace(stock, name=trainer, trainer=trainer))
        else:
            described.append(stock)
            kinds = BESIDE if beside is None else beside
            found += _beside(stock, dataset.name if dataset else None, kinds, sparsities or SPARSITIES)
    _check_beside(described, beside or ())
    if sparsities and not any(is_e2enet(design.architecture) for design in found if design.architecture is not None):
        raise E2ENetError(
            "--sparsity is of E2ENets that are built from plans, and here is none: add --beside e2enet without --trainer, or "
            "leave it out"
        )
    return _with_own_names(found)


def _check_plans_unneeded(configuration: str | None, trainer: str | None, dataset_json: Path | None) -> None:
    """Raises E2ENetError where an option of plans is given to model folders, which have configuration, trainer and labels."""
    for option, value in (("-c", configuration), ("--trainer", trainer), ("--dataset-json", dataset_json)):
        if value is not None:
            raise E2ENetError(
                f"{option} {value} is for plans files and data sets, and here are model folders alone: leave it out, or name "
                "the plans file or the data set as SUBJECT"
            )


def _check_beside(designs: Sequence[Design], kinds: Sequence[str]) -> None:
    """Raises E2ENetError where a network is asked for that none of the plans describe, as those of E2ENet."""
    described = {kind for design in designs for kind in _described(design)}
    unknown = [kind for kind in kinds if kind not in described]
    if designs and unknown:
        raise E2ENetError(
            f"--beside {unknown[0]}: the plans of {designs[0].origin} describe E2ENet alone; leave it out, or name the data "
            "set or its nnUNetPlans.json as a further SUBJECT"
        )


def _described(design: Design) -> tuple[str, ...]:
    """The networks that ``_beside`` makes of a design."""
    if not is_e2enet(design.settings.configuration["architecture"]):
        return BESIDE
    return ("e2enet", "nnunet") if design.checkpoint is None else ("e2enet",)  # nnunet: that of the plans, under their name


def _short(folder: Path) -> str:
    return short_trainer_name(folder.resolve().name.split("__")[0])


def _with_own_names(found: Sequence[Design]) -> list[Design]:
    """Without repetitions; a name that comes twice gets its origin.

    Raises:
        E2ENetError: two networks have the same name and origin.
    """
    different = [design for index, design in enumerate(found) if design not in found[:index]]
    names = [design.name for design in different]
    renamed = [replace(d, name=f"{d.name} ({d.origin})") if names.count(d.name) > 1 else d for d in different]
    names = [design.name for design in renamed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise E2ENetError(f"two networks are {twice}: give plans of different names or folders, or profile them one by one")
    return renamed


def _from_plans(file: Path, configuration: str | None, dataset_json: Path | None) -> Design:
    beside = file.parent / "dataset.json"
    description = dataset_json or (beside if beside.is_file() else None)
    if description is None:
        raise E2ENetError(f"there is no dataset.json beside {file}, for channels and classes: give --dataset-json FILE")
    plans = read_json(file)
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or not configurations:
        raise E2ENetError(f"{file} has no configurations: expected nnU-Net's plans, such as nnUNetPlans.json")
    configuration = configuration or ("3d_fullres" if "3d_fullres" in configurations else next(iter(configurations)))
    name = str(plans.get("plans_name", file.stem))
    origin = ", ".join([*([str(plans["dataset_name"])] if "dataset_name" in plans else []), name, configuration])
    return Design("nnU-Net", origin, plans, read_json(description), configuration)


def _beside(design: Design, dataset_name: str | None, kinds: Sequence[str], sparsities: Sequence[float]) -> list[Design]:
    """The networks of the kinds asked for, on the patch and strides of a design."""
    found: list[Design] = []
    if "e2enet" in kinds:
        found += [e2enet_variant(design, sparsity) for sparsity in sparsities]
    if is_e2enet(design.settings.configuration["architecture"]):
        if "nnunet" in kinds and design.name == "nnU-Net":  # plans of E2ENet's planner
            found.append(replace(design, name=str(design.plans.get("plans_name", "plans"))))
        return found
    if "nnunet" in kinds:
        found.append(replace(design, name="nnU-Net", trainer="nnUNetTrainer"))
    if "resenc" in kinds:
        presets = [_preset(name, dataset_name, design.configuration) for name in PRESETS] if dataset_name else []
        known = [preset for preset in presets if preset is not None]
        found += known or [residual_encoder_variant(design)]
    return found


def _preset(name: str, dataset_name: str, configuration: str) -> Design | None:
    """A residual encoder preset with its own patch: from its plans, or planned now and not written; None if that cannot be."""
    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset_name
    description = read_json(folder / "dataset.json")
    planner = PRESETS[name]
    plans_name = planner.replace("nnUNetPlannerResEnc", "nnUNetResEncUNet") + "Plans"
    file = folder / f"{plans_name}.json"
    if file.is_file():
        return Design(name, f"{dataset_name}, {plans_name}, {configuration}", read_json(file), description, configuration)
    raw = os.environ.get("nnUNet_raw")
    if not raw or not (Path(raw) / dataset_name).is_dir() or configuration not in ("2d", "3d_fullres"):
        return None
    plans = read_json(folder / "nnUNetPlans.json")
    with redirect_stdout(StringIO()), _at_least_one_thread():
        planned = _plan(planner, dataset_name, configuration)
    plans["configurations"] = {configuration: planned}
    return Design(name, f"{dataset_name}, planned as by {planner}, {configuration}", plans, description, configuration)


@contextmanager
def _at_least_one_thread() -> Iterator[None]:
    """nnU-Net's planner computes with ``nnUNet_n_proc_DA`` threads, which is 0 for trainings without worker processes."""
    given = os.environ.get("nnUNet_n_proc_DA")
    if given != "0":
        yield
        return
    os.environ["nnUNet_n_proc_DA"] = "1"
    try:
        yield
    finally:
        os.environ["nnUNet_n_proc_DA"] = given


def _plan(planner_name: str, dataset_name: str, configuration: str) -> dict[str, Any]:
    """The configuration that nnU-Net's planner makes of a data set's fingerprint."""
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as planners
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    planner = getattr(planners, planner_name)(dataset_name)
    order, _ = planner.determine_transpose()
    spacing = planner.determine_fullres_target_spacing()
    fingerprint = planner.dataset_fingerprint
    shapes = [
        compute_new_shape(shape, old, spacing)
        for old, shape in zip(fingerprint["spacings"], fingerprint["shapes_after_crop"], strict=True)
    ]
    shape, spacing = np.median(shapes, 0)[order], spacing[order]
    voxels = float(np.prod(shape, dtype=np.float64) * planner.dataset_json["numTraining"])
    first = 1 if configuration == "2d" else 0
    identifier = planner.generate_data_identifier(configuration)
    plan: dict[str, Any] = planner.get_plans_for_configuration(spacing[first:], shape[first:], identifier, voxels, {})
    return plan
