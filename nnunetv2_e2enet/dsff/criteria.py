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
        """One number a connection, shaped like ``layer.mask``; the active ones with the lowest are pruned."""


class Growth(Protocol):
    """The criterion by which inactive connections are tried.

    A growth may set ``needs_dense_gradients = True``: ``score`` then finds the gradients of all connections in ``weight.grad``
    of each layer.
    """

    def score(self, layer: MaskableLayer, generator: torch.Generator) -> Tensor:
        """One number a connection, shaped like ``layer.mask``; the inactive ones with the highest are grown.

        ``generator`` (on the CPU) is the only source of randomness.
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
