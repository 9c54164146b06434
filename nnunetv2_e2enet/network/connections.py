"""Convolutions whose connections can be switched off one by one.

A *connection* is one (input map -> output map) kernel. Its mask is a buffer of the layer, so the topology of a network
travels with its weights: in ``state_dict``, checkpoints, fold ensembles and exported models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_e2enet.errors import E2ENetError


def check_sparsity(sparsity: float) -> None:
    """Raises E2ENetError unless ``0 <= sparsity < 1``."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise E2ENetError(
            f"feature_sparsity is {sparsity!r}, but it is the share of connections that are off: use a number from 0 (dense) "
            "to below 1, such as 0.8"
        )


def active_connections(sparsity: float, connections: int) -> int:
    """How many of ``connections`` are active at a sparsity: ``round((1 - S) * connections)``."""
    return round((1 - sparsity) * connections)


class _StraightThroughMask(torch.autograd.Function):
    """Masked weights forward, the dense gradient backward: what gradient growth looks at."""

    @staticmethod
    def forward(_ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class MaskableLayer(nn.Module):
    """A convolution seen as connections; mixed into the four classes below.

    Attributes:
        mask: bool, the first two axes of ``weight``; True where a connection is active. Inactive weights have no effect in the
            forward pass, whatever value they hold.
        explored: bool, like ``mask``; True where a connection has ever been active.
        dense_gradients: let ``weight.grad`` hold the gradient of inactive connections too (for gradient growth).
    """

    weight: Tensor
    mask: Tensor
    explored: Tensor
    dense_gradients: bool
    transposed: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # of the convolution that this is mixed into
        shape = self.weight.shape[:2]
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("explored", torch.ones(shape, dtype=torch.bool))
        self.dense_gradients = False

    @property
    def n_connections(self) -> int:
        return self.mask.numel()

    @property
    def n_active(self) -> int:
        return int(self.mask.sum())

    @property
    def input_axis(self) -> int:
        """The axis of ``mask`` and ``weight`` along which the input maps lie."""
        return 0 if self.transposed else 1

    @property
    def weights_per_connection(self) -> int:
        return self.weight[0, 0].numel()

    def over_kernel(self, mask: Tensor) -> Tensor:
        """A per-connection tensor, shaped so that it broadcasts over ``weight``."""
        return mask.reshape(*mask.shape, *[1] * (self.weight.dim() - 2))

    def masked_weight(self) -> Tensor:
        mask = self.over_kernel(self.mask)
        if self.dense_gradients:
            return _StraightThroughMask.apply(self.weight, mask)
        return torch.where(mask, self.weight, 0)

    @torch.no_grad()
    def set_topology(self, mask: Tensor) -> None:
        """Start from this topology: set the mask, forget what was explored, zero the weights that are off."""
        self.mask.copy_(mask)
        self.explored.copy_(mask)
        self.clear_inactive_weights()

    @torch.no_grad()
    def set_random_topology(self, n_active: int, generator: torch.Generator | None = None) -> None:
        """Activate ``n_active`` connections drawn uniformly at random; ``generator`` lives on the CPU."""
        if self.weight.is_meta:  # a shape without values has no topology
            return
        order = torch.randperm(self.n_connections, generator=generator, device="cpu")
        mask = torch.zeros(self.n_connections, dtype=torch.bool, device="cpu")
        mask[order[:n_active]] = True
        self.set_topology(mask.reshape(self.mask.shape))

    @torch.no_grad()
    def clear_inactive_weights(self) -> None:
        self.weight.masked_fill_(self.over_kernel(~self.mask), 0)


class MaskedConv2d(MaskableLayer, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.masked_weight(), self.bias)


class MaskedConv3d(MaskableLayer, nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.masked_weight(), self.bias)


class MaskedConvTranspose2d(MaskableLayer, nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv_transpose2d(x, self.masked_weight(), self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class MaskedConvTranspose3d(MaskableLayer, nn.ConvTranspose3d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv_transpose3d(x, self.masked_weight(), self.bias, self.stride, self.padding)  # type: ignore[arg-type]


MASKED_CONV: dict[int, Callable[..., MaskableLayer]] = {2: MaskedConv2d, 3: MaskedConv3d}
MASKED_CONV_TRANSPOSE: dict[int, Callable[..., MaskableLayer]] = {2: MaskedConvTranspose2d, 3: MaskedConvTranspose3d}


def maskable_layers(network: nn.Module) -> Iterator[tuple[str, MaskableLayer]]:
    """Name and layer of everything in ``network`` that DSFF can prune and grow, in a fixed order."""
    for name, module in network.named_modules():
        if isinstance(module, MaskableLayer):
            yield name, module
