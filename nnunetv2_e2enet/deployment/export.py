"""From nnU-Net's model folder to a packed model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunetv2_e2enet import __version__
from nnunetv2_e2enet.deployment.description import Description
from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.deployment.packing import Arrays, pack
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import read_json
from nnunetv2_e2enet.training.checkpoints import check_architecture, read_checkpoint

CHECKPOINT = "checkpoint_final.pth"

_REMEDY = "train that fold again, or leave it out with -f"

_KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"


def pack_model(folder: Path, folds: Sequence[str] | None = None, checkpoint: str = CHECKPOINT) -> PackedModel:
    """Read a model folder that nnU-Net trained. Nothing in its checkpoints is executed.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION``.
        folds: their names; all that have the checkpoint unless given, ``all`` only if there is no other.
        checkpoint: file in each fold's folder.

    Raises:
        E2ENetError: the folder is no model folder, a checkpoint is missing or damaged, or the model is not E2ENet's.
    """
    model = folder.resolve().parent
    if folder.name.startswith("fold_") and (model / "plans.json").is_file():
        raise E2ENetError(f"{folder} is a fold of the model folder {model}: name that one, and the fold with -f")
    if not (folder / "plans.json").is_file():
        raise E2ENetError(f"{folder} is no nnU-Net model folder: expected one with plans.json, dataset.json and fold_*")
    names = _folds(folder, folds, checkpoint)
    content = read_checkpoint(folder / f"fold_{names[0]}" / checkpoint, _REMEDY)
    axes = content.get("inference_allowed_mirroring_axes")
    description = Description(
        plans=read_json(folder / "plans.json"),
        dataset=read_json(folder / "dataset.json"),
        configuration=content["init_args"]["configuration"],
        trainer=content["trainer_name"],
        folds=names,
        checkpoint=checkpoint,
        mirroring_axes=None if axes is None else [int(axis) for axis in axes],
        postprocessing=_postprocessing(folder, names),
        written_by=f"nnunetv2-e2enet {__version__}",
    )
    try:
        network = description.network()
        description.check()
    except E2ENetError as error:
        raise E2ENetError(f"{folder}: {error}") from error
    architecture = description.managers()[1].configuration["architecture"]
    packed: dict[str, Arrays] = {}
    for name in names:
        path = folder / f"fold_{name}" / checkpoint
        content = read_checkpoint(path, _REMEDY)
        check_architecture(path, content, architecture, "plans.json", _REMEDY)
        try:
            packed[name] = pack(content["network_weights"], network)
        except E2ENetError as error:
            raise E2ENetError(f"{path}: {error}; {_REMEDY}") from error
    return PackedModel(description, packed)


def _folds(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> list[str]:
    present = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}"))
    wanted = list(dict.fromkeys(folds)) if folds is not None else [name for name in present if name != "all"] or present
    missing = [name for name in wanted if name not in present]
    if not present:
        found = ", ".join(sorted({path.name for path in folder.glob("fold_*/checkpoint_*.pth")}))
        raise E2ENetError(
            f"{folder} has no {checkpoint} in any fold, found {found or 'none'}: choose a checkpoint with -chk, or finish the "
            "training"
        )
    if missing or not wanted:
        raise E2ENetError(
            f"{folder} has no {checkpoint} of {'fold ' + missing[0] if missing else 'any fold'}, found those of "
            f"{', '.join(present)}: choose folds with -f, another checkpoint with -chk, or finish the training"
        )
    return wanted


def _postprocessing(folder: Path, folds: Sequence[str]) -> list[list[int]]:
    """What nnUNetv2_find_best_configuration found for these folds, in any order; nothing where it was not asked."""
    prefix = "crossval_results_folds_"
    files = sorted(folder.glob(f"{prefix}*/postprocessing.json"))
    path = next((file for file in files if set(file.parent.name.removeprefix(prefix).split("_")) == set(folds)), None)
    if path is None:
        return []
    found = read_json(path)
    strange = [name for name in found["postprocessing_fns"] if name != _KEEP_LARGEST]
    if strange:
        raise E2ENetError(f"{path} names {strange[0]}, but a packed model knows {_KEEP_LARGEST} alone: move the file away")
    steps = [arguments["labels_or_regions"] for arguments in found["postprocessing_kwargs"]]
    return [step if isinstance(step, list) else [step] for step in steps]
