"""Weights of the published code, by role.

The published network holds them in nested lists; exported, an array's name says what it is:
``encoder.level0.conv1.conv.weight``, ``fusion.stage5.level0.conv1.norm.bias`` (stage i, level j),
``upsample.stage5.level0.weight``, ``head.level2.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.blocks import ShiftBlock
from nnunetv2_e2enet.network.connections import MaskableLayer
from nnunetv2_e2enet.network.e2enet import E2ENet
from nnunetv2_e2enet.network.fusion import FusionNode

_WEIGHT = re.compile(r"^(encoder|fusion|upsample|head)\.")


def reference_modules(network: E2ENet) -> dict[str, nn.Module]:
    """Every module with weights, by the name that its arrays start with."""
    modules: dict[str, nn.Module] = {}
    for j, level in enumerate(network.encoder.stages):
        modules |= _block_modules(f"encoder.level{j}", level)
    for i, nodes in enumerate(network.decoder.stages, start=1):
        for j, node in enumerate(cast(Iterable[FusionNode], nodes)):
            modules |= _block_modules(f"fusion.stage{i}.level{j}", node.blocks)
            if node.upsample is not None:
                modules[f"upsample.stage{i}.level{j}"] = node.upsample
    for j, head in enumerate(reversed(network.decoder.seg_layers)):
        modules[f"head.level{j}"] = head
    return modules


def _block_modules(prefix: str, blocks: nn.Module) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for k, block in enumerate(cast(Iterable[ShiftBlock], blocks.children())):
        modules[f"{prefix}.conv{k}.conv"] = block.conv
        modules[f"{prefix}.conv{k}.norm"] = block.norm
    return modules


@torch.no_grad()
def load_reference_weights(network: E2ENet, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Copy the weights of the published network into ``network``, its topology included.

    A connection is active where its kernel is not all zero. Arrays that are no weights (``x``, ``logits.level0``) are passed
    over.

    Args:
        network: of the same levels, channels and classes.
        arrays: weights by the names above, such as an open ``.npz`` file.

    Raises:
        E2ENetError: a weight is missing, left over, or of another shape; ``network`` is unchanged then.
    """
    modules = reference_modules(network)
    targets = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters(recurse=False)}
    given = {name for name in arrays if _WEIGHT.match(name)}
    if given != targets.keys():
        missing, extra = sorted(targets.keys() - given), sorted(given - targets.keys())
        raise E2ENetError(
            f"the arrays are not those of this network: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}: build it with the levels and blocks that the arrays were saved with"
        )
    values = {name: torch.as_tensor(np.asarray(arrays[name])) for name in targets}
    for name, parameter in targets.items():
        if values[name].shape != parameter.shape:
            raise E2ENetError(
                f"{name} has shape {tuple(values[name].shape)} in the arrays and {tuple(parameter.shape)} in the network"
            )
    for name, parameter in targets.items():
        parameter.copy_(values[name])
    for module in modules.values():
        if isinstance(module, MaskableLayer):
            module.set_topology(module.weight.flatten(2).ne(0).any(dim=2))
