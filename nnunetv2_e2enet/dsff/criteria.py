"""Criteria by which connections are kept and tried. A new criterion is one class (docs/extending.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.connections import MaskableLayer


class Importance(Protocol):
    """The criterion by which active connections are kept.

    An importance may set ``needs_input_deviations = True``: ``score`` then finds ``input_deviation`` in each layer. A
    ``label`` names the score in figures; without one, the name of the class does.
    """

    def score(self, layer: MaskableLayer) -> Tensor:
        """One number a connection, shaped like ``layer.mask``; the active ones with the lowest are pruned.

        Those of active connections are finite. Others have no effect.
        """


class Growth(Protocol):
    """The criterion by which inactive connections are tried.

    A growth may set ``needs_dense_gradients = True``: ``score`` then finds the gradients of all connections in ``weight.grad``
    of each layer.
    """

    def score(self, layer: MaskableLayer, generator: torch.Generator) -> Tensor:
        """One number a connection, shaped like ``layer.mask``; the inactive ones with the highest are grown.

        Those of inactive connections are finite. ``generator`` (on the CPU) is the only source of randomness.
        """


@dataclass(frozen=True)
class KernelL1Norm:
    """L1 norm of a connection's kernel (paper, section 3.2)."""

    label: ClassVar[str] = "L1 norm of the kernel"

    def score(self, layer: MaskableLayer) -> Tensor:
        """One number a connection, shaped like ``layer.mask``; float32."""
        return layer.spread(layer.weight.detach()).flatten(2).abs().sum(dim=2, dtype=torch.float32)


@dataclass(frozen=True)
class InputScaledL1Norm:
    """L1 norm of a connection's kernel times the standard deviation of its input map.

    A small kernel on a map of large amplitude moves the output as much as a large kernel on a map of small amplitude. Both get
    the same score. Compare Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.
    """

    label: ClassVar[str] = "L1 norm of the kernel x deviation of the input map"
    needs_input_deviations: ClassVar[bool] = True

    def score(self, layer: MaskableLayer) -> Tensor:
        """One number a connection, shaped like ``layer.mask``; float32.

        Raises:
            E2ENetError: the input maps of the layer have not been observed.
        """
        if layer.input_deviation is None:
            raise E2ENetError(
                "InputScaledL1Norm found no deviation of the input maps: run the network within TopologyUpdater.observation() "
                "before the update"
            )
        deviation = layer.input_deviation.unsqueeze(layer.output_axis)
        return KernelL1Norm().score(layer) * deviation


@dataclass(frozen=True)
class RandomGrowth:
    """Uniform at random (paper, section 3.2, after Mocanu et al., Nature Communications 2018)."""

    def score(self, layer: MaskableLayer, generator: torch.Generator) -> Tensor:
        """One number from 0 to 1 a connection, shaped like ``layer.mask``; float64."""
        return torch.rand(layer.mask.shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class GradientGrowth:
    """Largest absolute gradient, summed over the kernel (Evci et al., "Rigging the Lottery", ICML 2020).

    Needs a backward pass within ``TopologyUpdater.observation()`` before the update.
    """

    needs_dense_gradients: ClassVar[bool] = True

    def score(self, layer: MaskableLayer, generator: torch.Generator) -> Tensor:  # noqa: ARG002 (nothing is random)
        """One number a connection, shaped like ``layer.mask``; float32.

        Raises:
            E2ENetError: the layer has no gradient.
        """
        gradient = layer.weight.grad
        if gradient is None:
            raise E2ENetError(
                "gradient growth found no gradient: run a backward pass within TopologyUpdater.observation() before the update"
            )
        return gradient.flatten(2).abs().sum(dim=2, dtype=torch.float32)


def importance_of(criterion: Importance, name: str, layer: MaskableLayer) -> Tensor:
    """The importance of each connection of the layer ``name``: floating point, finite where connections are active.

    Raises:
        E2ENetError: the scores are of another shape, or weights or scores of active connections are not finite.
    """
    scores = _as_numbers(criterion, criterion.score(layer), name, layer)
    if torch.isfinite(scores[layer.mask]).all():
        return scores
    if not torch.isfinite(layer.weight).all():
        raise E2ENetError(
            f"{name} has weights that are not finite: the training has diverged. Resume it from its last checkpoint with a "
            "lower initial_lr"
        )
    raise E2ENetError(
        f"{type(criterion).__name__} gives active connections of {name} scores that are not finite, by which nothing can be "
        "ranked: let score return finite numbers where layer.mask is True"
    )


def growth_of(criterion: Growth, name: str, layer: MaskableLayer, generator: torch.Generator) -> Tensor:
    """The growth score of each connection of the layer ``name``: floating point, finite where connections are inactive.

    Raises:
        E2ENetError: the scores are of another shape, or those of inactive connections are not finite.
    """
    scores = _as_numbers(criterion, criterion.score(layer, generator), name, layer)
    if not torch.isfinite(scores[~layer.mask]).all():
        raise E2ENetError(
            f"{type(criterion).__name__} gives inactive connections of {name} scores that are not finite, by which nothing "
            "can be ranked: observe another batch, with a smaller loss scale after an overflow of half precision"
        )
    return scores


def _as_numbers(criterion: Importance | Growth, scores: Tensor, name: str, layer: MaskableLayer) -> Tensor:
    """Scores in floating point, where the layer is; E2ENetError if they are not shaped like its mask."""
    if scores.shape != layer.mask.shape:
        raise E2ENetError(
            f"{type(criterion).__name__} gives {name} scores of shape {list(scores.shape)}, but one number a connection is "
            f"needed, {list(layer.mask.shape)}: shape them like layer.mask"
        )
    device = layer.mask.device
    if device.type == "mps" or not scores.is_floating_point():  # Apple's GPUs have no float64
        scores = scores.float()
    return scores.to(device)
