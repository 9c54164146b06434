"""The inputs and networks that the engine takes; PyTorch computes all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from nnunetv2_e2enet.engine.core import Core, load_core
from nnunetv2_e2enet.engine.description import NotSupportedError, check_classes, describe
from nnunetv2_e2enet.network.e2enet import E2ENet
from nnunetv2_e2enet.settings import settings, variable

ENGINE_VARIABLE = variable("engine")
# Multiply-accumulates of the dense network a patch; below, in mode "auto", there is little to save
LEAST_WORK = 2e9
LEAST_TRAINING_WORK = 2e8


def check_support(network: E2ENet, x: Tensor) -> None:
    """Check the settings, the network's classes and the input, not the weights.

    Raises:
        NotSupportedError: this input stays with PyTorch.
    """
    if settings().engine == "off":
        raise NotSupportedError(f"the engine is switched off ({ENGINE_VARIABLE})")
    if type(x) is not Tensor or x.device.type != "cpu" or x.layout != torch.strided:
        raise NotSupportedError("the input is not an ordinary tensor on the CPU")
    if x.dtype != torch.float32:
        raise NotSupportedError(f"the input is {x.dtype}, not float32")
    if torch.is_autocast_cpu_enabled():
        raise NotSupportedError("autocast is on")
    check_classes(network)
    if x.dim() != network.dimension + 2 or x.shape[1] != network.input_channels or x.numel() == 0:
        raise NotSupportedError("the input has not the shape that the network expects")
    size = list(x.shape[2:])
    for stride in network.encoder.strides:
        if any(s % t for s, t in zip(size, stride, strict=True)):
            raise NotSupportedError("the input is not divisible by the strides of the network")
        size = [s // t for s, t in zip(size, stride, strict=True)]
        if all(s == 1 for s in size):
            raise NotSupportedError("a level has one voxel, for which instance norm is not defined")
    least = LEAST_TRAINING_WORK if network.training else LEAST_WORK
    if settings().engine == "auto" and _work(network, list(x.shape[2:])) < least:
        raise NotSupportedError(
            f"the network is small, a patch takes PyTorch little time ({ENGINE_VARIABLE}=on uses the engine all the same)"
        )


def _work(network: E2ENet, size: list[int]) -> float:
    """About the multiply-accumulates of the dense network for one patch."""
    voxels = []
    for stride in network.encoder.strides:
        size = [s // t for s, t in zip(size, stride, strict=True)]
        voxels.append(prod(size))
    levels = [*enumerate(network.encoder.stages)]
    levels += [pair for nodes in network.decoder.stages for pair in enumerate(nodes.children())]
    return float(sum(voxels[level] * p.numel() for level, module in levels for p in module.parameters()))


def loaded(kernels: str | None = None, storage: str | None = None) -> Core:
    """As ``load_core``.

    Raises:
        NotSupportedError: there is no such core.
    """
    core = load_core(kernels, storage)
    if isinstance(core, str):
        raise NotSupportedError(core)
    return core


def why_not(core_for: Callable[[E2ENet, Tensor], Core], network: E2ENet, input_shape: Sequence[int]) -> str | None:
    """Why a float32 input of this shape on the CPU would stay with PyTorch; None if the engine takes it.

    Args:
        core_for: the core for one kind of work; raises NotSupportedError for other inputs than those it takes.
        network: in the mode of this kind of work.
        input_shape: ``(batch, channels, *patch)``.
    """
    try:
        core_for(network, torch.empty(tuple(input_shape), dtype=torch.float32, device="cpu"))
        describe(network)
    except NotSupportedError as reason:
        return str(reason)
    return None
