"""What is worth keeping, and what is worth trying. A new criterion is one class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.connections import MaskableLayer


class Importance(Protocol):
    def score(self, layer: MaskableLayer) -> Tensor:
        """One number a connection, shaped like ``layer.mask``; the active ones with the lowest are pruned."""


class Growth(Protocol):
    needs_dense_gradients: bool

    def score(self, layer: MaskableLayer, generator: torch.Generator) -> Tensor:
        """One number a connection, shaped like ``layer.mask``; the inactive ones with the highest are grown.

        ``generator`` (on the CPU) is the only source of randomness.
        """


@dataclass(frozen=True)
class KernelL1Norm:
    """L1 norm of a connection's kernel (paper, section 3.2)."""

    def score(self, layer: MaskableLayer) -> Tensor:
        return layer.spread(layer.weight.detach()).flatten(2).abs().sum(dim=2, dtype=torch.float32)


@dataclass(frozen=True)
class RandomGrowth:
    """Uniform at random (paper, section 3.2, after Mocanu et al., Nature Communications 2018)."""

    needs_dense_gradients = False

    def score(self, layer: MaskableLayer, generator: torch.Generator) -> Tensor:
        return torch.rand(layer.mask.shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class GradientGrowth:
    """Largest absolute gradient, summed over the kernel (Evci et al., "Rigging the Lottery", ICML 2020).

    Needs layers with ``dense_gradients``, and a backward pass before the update.
    """

    needs_dense_gradients = True

    def score(self, layer: MaskableLayer, generator: torch.Generator) -> Tensor:  # noqa: ARG002 (nothing is random)
        gradient = layer.weight.grad
        if gradient is None:
            raise E2ENetError("gradient growth found no gradient: update the topology after a training step")
        return gradient.flatten(2).abs().sum(dim=2, dtype=torch.float32)
