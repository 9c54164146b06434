"""The distribution of active connections over layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from nnunetv2_e2enet.network.connections import MaskableLayer, check_sparsity


class Distribution(Protocol):
    """The number of active connections of each layer."""

    def active(self, sparsity: float, layers: Mapping[str, MaskableLayer]) -> dict[str, int]:
        """Active connections of each layer, by its name."""


@dataclass(frozen=True)
class Uniform:
    """The same sparsity in every layer: ``round((1 - S) * C_in * C_out)`` active connections (the paper's)."""

    def active(self, sparsity: float, layers: Mapping[str, MaskableLayer]) -> dict[str, int]:
        """Active connections of each layer, by its name.

        Raises:
            E2ENetError: the sparsity is not from 0 to below 1.
        """
        check_sparsity(sparsity)
        return {name: layer.connections_at(1 - sparsity) for name, layer in layers.items()}


@dataclass(frozen=True)
class ErdosRenyiKernel:
    """Erdős-Rényi-kernel: small layers denser than large ones (Evci et al., "Rigging the Lottery", ICML 2020, section 3).

    A layer's density is proportional to the sum of its weight's dimensions over their product. The share of active weights in
    all layers is ``1 - S``. A layer whose density would exceed 1 is dense, and the others share the rest.
    """

    def active(self, sparsity: float, layers: Mapping[str, MaskableLayer]) -> dict[str, int]:
        """Active connections of each layer, by its name.

        Raises:
            E2ENetError: the sparsity is not from 0 to below 1.
        """
        check_sparsity(sparsity)
        raw = {name: sum(layer.shape) / layer.shape.numel() for name, layer in layers.items()}
        dense: set[str] = set()
        while True:
            budget = (1 - sparsity) * sum(layer.shape.numel() for layer in layers.values())
            budget -= sum(layers[name].shape.numel() for name in dense)
            free = [name for name in layers if name not in dense]
            weighted = sum(raw[name] * layers[name].shape.numel() for name in free)
            scale = budget / weighted if free else 0.0
            too_dense = {name for name in free if scale * raw[name] > 1}
            if not too_dense:
                break
            dense |= too_dense
        density = {name: 1.0 if name in dense else scale * raw[name] for name in layers}
        return {name: layer.connections_at(density[name]) for name, layer in layers.items()}
