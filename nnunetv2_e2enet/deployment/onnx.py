"""ONNX for other runtimes: one file a fold, and a JSON file that describes preprocessing and export.

Inactive weights become zeros of ordinary convolutions, which a runtime multiplies like any other number.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_e2enet.deployment.description import Description
from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import temporary_path
from nnunetv2_e2enet.network import E2ENet, maskable_layers
from nnunetv2_e2enet.network.blocks import ShiftBlock, as_given
from nnunetv2_e2enet.network.conversion import MASKABLE
from nnunetv2_e2enet.network.depth_shift import DEPTH_AXIS
from nnunetv2_e2enet.network.recomputation import RECOMPUTE

OPSET = 18
INPUT, OUTPUT = "image", "logits"


class _PlainShiftBlock(nn.Module):
    """A shift block in operations that every runtime has: slices, pads, a concatenation."""

    recompute = RECOMPUTE[0]

    def __init__(self, block: ShiftBlock) -> None:
        super().__init__()
        self.conv, self.norm, self.nonlin = block.conv, block.norm, block.nonlin
        of_neighbours = groupby(block.offsets())  # those that move together
        self.runs = [(offset, len(list(channels))) for offset, channels in of_neighbours]

    def forward(self, *maps: Tensor, flows: Callable[..., Sequence[Any]] = as_given) -> Tensor:
        tensors = flows(*maps)
        x = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)
        if len(self.runs) > 1 or self.runs[0][0]:
            parts = x.split([length for _, length in self.runs], dim=1)
            x = torch.cat([_moved(part, offset) for part, (offset, _) in zip(parts, self.runs, strict=True)], dim=1)
        x = self.conv(x)
        if isinstance(self.norm, (nn.InstanceNorm2d, nn.InstanceNorm3d)) and not self.norm.track_running_stats:
            x = _centred(x)
        activation: Tensor = self.nonlin(self.norm(x))
        return activation


def _centred(x: Tensor) -> Tensor:
    """A map minus its mean, with the same instance norm. Sums of millions of float32 are exact around zero alone."""
    mean = x
    for axis in range(2, x.dim()):
        mean = mean.mean(axis, keepdim=True)
    return x - mean


def _moved(x: Tensor, offset: int) -> Tensor:
    depth = x.shape[DEPTH_AXIS]
    if not offset:
        return x
    if abs(offset) >= depth:
        return torch.zeros_like(x)
    kept = x.narrow(DEPTH_AXIS, max(-offset, 0), depth - abs(offset))
    return F.pad(kept, (0, 0, 0, 0, max(offset, 0), max(-offset, 0)))


def plain_network(network: E2ENet) -> nn.Module:
    """The same function of one patch in operations that an exporter knows: without masks and writes into slices.

    Args:
        network: in evaluation mode; not changed.
    """
    plain = deepcopy(network)
    for _, layer in maskable_layers(plain):
        layer.weight = nn.Parameter(layer.masked_weight().detach())
        del layer.mask, layer.explored
        unmasked: type = next(base for base in type(layer).__mro__ if base in MASKABLE)
        layer.__class__ = unmasked
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, ShiftBlock):
                setattr(module, name, _PlainShiftBlock(child))
    plain.decoder.deep_supervision = False
    return nn.Sequential(plain.encoder, plain.decoder).eval()


def export_network(network: E2ENet, patch_size: list[int], path: Path) -> None:
    """Write one network as ONNX: ``image`` of shape ``(batch, channels, *patch_size)`` to ``logits``, any batch size."""
    example = torch.zeros((2, network.input_channels, *patch_size))
    program = torch.onnx.export(
        plain_network(network),
        (example,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)


def write_onnx(folder: Path, model: PackedModel) -> list[Path]:
    """Write ``fold_X.onnx`` for each fold, and ``model.json``.

    Args:
        folder: to be made; it appears when all is written.
        model: a packed model.

    Returns:
        The files.

    Raises:
        E2ENetError: the folder is there already or cannot be written.
    """
    if folder.exists():
        raise E2ENetError(f"{folder} is there already: choose another folder, or remove it")
    description = model.description
    network = description.network().to_empty(device="cpu")
    patch_size = list(description.managers()[1].patch_size)
    names = [f"fold_{fold}.onnx" for fold in description.folds]
    temporary = temporary_path(folder)
    try:
        temporary.mkdir()
    except OSError as error:
        raise E2ENetError(f"cannot write {folder} ({error.strerror}): choose a place with write permission") from error
    try:
        for name, state in zip(names, model.states(), strict=True):
            network.load_state_dict(state)
            export_network(network, patch_size, temporary / name)
        (temporary / "model.json").write_text(json.dumps(_runtime_facts(description, names), indent=1), encoding="utf-8")
        temporary.replace(folder)
    except OSError as error:
        raise E2ENetError(f"cannot write {folder} ({error.strerror}): is there room?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [folder / name for name in (*names, "model.json")]


def _first_stage(name: str | None, labels: Sequence[int]) -> dict[str, Any]:
    """What a cascade's second stage reads after the channels: a mask for each label of the first stage's segmentation."""
    return {} if name is None else {"previous_stage": name, "masks_of_labels": [int(label) for label in labels]}


def _runtime_facts(description: Description, files: list[str]) -> dict[str, Any]:
    """The facts that a program around the network needs, in nnU-Net's words."""
    plans, settings = description.managers()
    labels = plans.get_label_manager(description.dataset)
    configuration = settings.configuration
    return {
        "written_by": description.written_by,
        "trainer": description.trainer,
        "configuration": description.configuration,
        "dataset_name": plans.dataset_name,
        "files": dict(zip(description.folds, files, strict=True)),
        "input": {
            "name": INPUT,
            "channel_names": description.channel_names,
            "patch_size": settings.patch_size,
            **_first_stage(settings.previous_stage_name, labels.foreground_labels),
        },
        "output": {
            "name": OUTPUT,
            "activation": "sigmoid" if labels.has_regions else "softmax",
            "labels": description.dataset["labels"],
            "regions_class_order": description.dataset.get("regions_class_order"),
        },
        "preprocessing": {
            "image_reader_writer": plans.plans["image_reader_writer"],
            "transpose_forward": plans.transpose_forward,
            "transpose_backward": plans.transpose_backward,
            "spacing": settings.spacing,
            "normalization_schemes": settings.normalization_schemes,
            "use_mask_for_norm": settings.use_mask_for_norm,
            "foreground_intensity_properties_per_channel": plans.foreground_intensity_properties_per_channel,
            **{key: value for key, value in configuration.items() if key.startswith("resampling_fn")},
        },
        "sliding_window": {"step_size": 0.5, "gaussian_sigma_scale": 0.125, "mirroring_axes": description.mirroring_axes},
        "postprocessing": description.postprocessing,
    }
