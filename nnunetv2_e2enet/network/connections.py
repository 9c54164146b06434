"""Convolutions whose connections can be switched off, one by one or in blocks.

A *connection* is one (input map -> output map) kernel. Its mask is a buffer of the layer, so the topology of a network
travels with its weights: in ``state_dict``, checkpoints, fold ensembles and exported models. In a structured topology,
*blocks* of consecutive output maps share their input maps; its mask is one per connection all the same. ``compact.py`` has the
layers that store the weights of active connections alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.convolution import conv2d, conv3d

NEGATIVE_SLOPE = 1e-2  # of the leaky ReLU after each convolution


def he_normal_(weight: Tensor) -> Tensor:
    """Fill a weight with He normal numbers for a leaky ReLU of slope 0.01 (He et al., ICCV 2015), as nnU-Net does."""
    return nn.init.kaiming_normal_(weight, a=NEGATIVE_SLOPE)


def check_sparsity(sparsity: float) -> None:
    """Raises E2ENetError unless ``0 <= sparsity < 1``."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise E2ENetError(
            f"feature_sparsity is {sparsity!r}, but it is the share of connections that are off: use a number from 0 (dense) "
            "to below 1, such as 0.8"
        )


class _StraightThroughMask(torch.autograd.Function):
    """Masked weights forward, the dense gradient backward, for gradient growth."""

    @staticmethod
    def forward(_ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class MaskableLayer(nn.Module, ABC):
    """A convolution seen as connections; mixed into the four classes below.

    Attributes:
        mask: bool, the first two axes of ``shape``; True where a connection is active. Inactive weights have no effect in the
            forward pass, whatever value they hold.
        explored: bool, like ``mask``; True where a connection has ever been active.
        dense_gradients: let ``weight.grad`` hold the gradient of inactive connections too (for gradient growth).
        input_deviation: standard deviation of each input map over batch and space, ``(n_inputs,)``; None until a criterion of
            DSFF has asked for it (``TopologyUpdater.observation``).
        block_size: output maps that share their input maps; see ``share_inputs``.
        equal_blocks: whether each block has as many input maps as any other.
        stores_active_only: whether ``weight`` holds the weights of active connections alone; see ``CompactLayer``.
        output_axis: of ``mask`` and ``shape``.
    """

    output_axis: ClassVar[int] = 0
    stores_active_only: ClassVar[bool] = False
    weight: Tensor
    bias: Tensor | None
    groups: int
    mask: Tensor
    explored: Tensor
    dense_gradients: bool
    input_deviation: Tensor | None
    block_size: int
    equal_blocks: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # of the convolution that this is mixed into
        shape = self.weight.shape[:2]
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("explored", torch.ones(shape, dtype=torch.bool))
        self.dense_gradients = False
        self.input_deviation = None
        self.block_size = 1
        self.equal_blocks = False
        self._inputs_per_block = self.n_inputs

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """``(batch, in, *space)`` to ``(batch, out, *space)``; ``with_bias=False`` leaves the bias out."""
        return self.convolved(x, self.masked_weight(), self.bias if with_bias else None, self.groups)

    @abstractmethod
    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """The convolution of the layer with other weights, shaped as one of so many groups takes them."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the weights of all connections, active or not."""
        return torch.Size([*self.mask.shape, *self.weight.shape[2:]])

    @property
    def n_connections(self) -> int:
        """Connections, active or not: input maps times output maps."""
        return self.mask.numel()

    @property
    def n_active(self) -> int:
        """Active connections."""
        return int(self.mask.sum())

    @property
    def input_axis(self) -> int:
        """The axis of ``mask`` and ``weight`` along which the input maps lie."""
        return 1 - self.output_axis

    @property
    def weights_per_connection(self) -> int:
        """Weights of one kernel."""
        return self.weight[0, 0].numel()

    @property
    def n_inputs(self) -> int:
        """Input maps."""
        return self.mask.shape[self.input_axis]

    @property
    def n_outputs(self) -> int:
        """Output maps."""
        return self.mask.shape[self.output_axis]

    @property
    def n_blocks(self) -> int:
        """Blocks of output maps that share their input maps."""
        return self.n_outputs // self.block_size

    def connections_at(self, density: float) -> int:
        """Active connections at a density: the nearest number that whole blocks, or equal blocks, can have."""
        if self.equal_blocks:
            return max(1, round(density * self.n_inputs)) * self.n_outputs
        return round(density * self.n_connections / self.block_size) * self.block_size

    def share_inputs(self, block_size: int, equal_blocks: bool = False) -> None:
        """Let blocks of ``block_size`` output maps share their input maps in all topologies from now on.

        All blocks of a layer are of the same size. Where ``block_size`` does not divide the output maps, it is the largest
        number below that does: 24 of 48 maps for 32. With ``equal_blocks`` all blocks have the same number of input maps.

        Raises:
            E2ENetError: ``block_size`` is not a whole number of at least 1.
        """
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise E2ENetError(
                f"block_size is {block_size!r}, but it is the number of output maps that share their input maps: use a whole "
                "number such as 8, 16 or 32; 1 lets each map have its own"
            )
        self.block_size = next(size for size in range(block_size, 0, -1) if self.n_outputs % size == 0)
        self.equal_blocks = equal_blocks

    def by_block(self, connections: Tensor) -> Tensor:
        """Sums over the output maps of each block: from one number a connection to one for each block and input map."""
        sums: Tensor = connections.unflatten(self.output_axis, (-1, self.block_size)).sum(self.output_axis + 1)
        return sums

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """The reverse of ``by_block``: each output map of a block gets the number of the block."""
        return blocks.repeat_interleave(self.block_size, self.output_axis)

    def shared_block_size(self) -> int:
        """The largest blocks of consecutive output maps that share their input maps, read from the mask alone."""
        maps = self.mask.movedim(self.output_axis, 0)
        sizes = (size for size in range(len(maps), 0, -1) if len(maps) % size == 0)
        return next(size for size in sizes if torch.equal(maps, maps[::size].repeat_interleave(size, 0)))

    def fits_blocks(self, mask: Tensor | None = None) -> bool:
        """Whether the output maps of each block share their inputs in ``mask``, with ``equal_blocks`` equally many."""
        mask = self.mask if mask is None else mask
        equal = not self.equal_blocks or bool((mask.sum(self.input_axis) == self._inputs_per_block).all())
        return equal and torch.equal(mask, self.from_blocks(self.by_block(mask).bool()))

    def gather(self, values: Tensor) -> Tensor:
        """Values for all connections, of shape ``shape``, in the form in which ``weight`` is stored: here as they are."""
        return values

    def spread(self, values: Tensor) -> Tensor:
        """The reverse of ``gather``: values shaped like ``weight`` for all connections, zero where ``weight`` has none."""
        return values

    def over_kernel(self, mask: Tensor) -> Tensor:
        """A per-connection tensor, shaped so that it broadcasts over ``weight``."""
        return mask.reshape(*mask.shape, *[1] * (self.weight.dim() - 2))

    def masked_weight(self) -> Tensor:
        """The weights of all connections, zero where they are off."""
        mask = self.over_kernel(self.mask)
        if self.dense_gradients:
            weight: Tensor = _StraightThroughMask.apply(self.weight, mask)  # type: ignore[no-untyped-call]
            return weight
        return torch.where(mask, self.weight, 0)

    @torch.no_grad()
    def set_topology(self, mask: Tensor) -> None:
        """Start from this topology: set the mask, mark nothing else as explored, zero the inactive weights."""
        self.change_topology(mask, torch.zeros_like(self.mask))
        self.explored.copy_(mask)

    @torch.no_grad()
    def change_topology(self, mask: Tensor, restarted: Tensor, states: Sequence[Tensor] = ()) -> None:
        """Set the mask. Weights stay with their connections and are zero where those are off or start anew.

        Args:
            mask: of the new topology.
            restarted: bool, like ``mask``; connections whose weights and states become zero.
            states: tensors shaped like ``weight``, such as an optimizer's; changed in place, as the weights are.
        """
        tensors = (self.weight, *states)
        spread = [self.spread(tensor).masked_fill_(self.over_kernel(restarted), 0) for tensor in tensors]
        self._set_mask(mask)
        for tensor, values in zip(tensors, spread, strict=True):
            tensor.copy_(self.gather(values))
        self.clear_inactive_weights()

    def _set_mask(self, mask: Tensor) -> None:
        self.mask.copy_(mask)

    @torch.no_grad()
    def set_random_topology(self, n_active: int, generator: torch.Generator | None = None) -> None:
        """Activate ``n_active`` connections, in whole blocks drawn uniformly at random; ``generator`` lives on the CPU."""
        if self.weight.is_meta:  # a shape without values has no topology
            return
        shape = self.by_block(self.mask).shape
        if self.equal_blocks:
            inputs = n_active // self.n_outputs
            order = torch.rand(shape, generator=generator, device="cpu").argsort(self.input_axis).argsort(self.input_axis)
            self.set_topology(self.from_blocks(order < inputs))
            self._inputs_per_block = inputs
            return
        order = torch.randperm(shape.numel(), generator=generator, device="cpu")
        blocks = torch.zeros(shape.numel(), dtype=torch.bool, device="cpu")
        blocks[order[: n_active // self.block_size]] = True
        self.set_topology(self.from_blocks(blocks.reshape(shape)))

    @torch.no_grad()
    def initialize_weights(self, gain: float = 1.0) -> None:
        """He normal weights for all active connections, zeros for all others.

        The standard deviation is that of the dense layer: it follows from the number of maps, not from the sparsity.

        Args:
            gain: factor of all weights.
        """
        values = he_normal_(self.weight.new_empty(self.shape)).mul_(gain)
        self.weight.copy_(self.gather(values))
        self.clear_inactive_weights()

    @torch.no_grad()
    def clear_inactive_weights(self) -> None:
        """Zero the stored weights of connections that are off."""
        self.weight.masked_fill_(self.over_kernel(~self.mask), 0)


class MaskedConv2d(MaskableLayer, nn.Conv2d):
    """``nn.Conv2d`` with a mask."""

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """As ``MaskableLayer.convolved``."""
        return conv2d(self, x, weight, bias, groups)


class MaskedConv3d(MaskableLayer, nn.Conv3d):
    """``nn.Conv3d`` with a mask."""

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """As ``MaskableLayer.convolved``."""
        return conv3d(self, x, weight, bias, groups)


class MaskedConvTranspose2d(MaskableLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    """``nn.ConvTranspose2d`` with a mask."""

    output_axis = 1

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """As ``MaskableLayer.convolved``."""
        options = (self.stride, self.padding, self.output_padding, groups, self.dilation)
        return F.conv_transpose2d(x, weight, bias, *options)  # type: ignore[arg-type]


class MaskedConvTranspose3d(MaskableLayer, nn.ConvTranspose3d):  # type: ignore[misc]
    """``nn.ConvTranspose3d`` with a mask."""

    output_axis = 1

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """As ``MaskableLayer.convolved``."""
        options = (self.stride, self.padding, self.output_padding, groups, self.dilation)
        return F.conv_transpose3d(x, weight, bias, *options)  # type: ignore[arg-type]


MASKED_CONV: dict[int, Callable[..., MaskableLayer]] = {2: MaskedConv2d, 3: MaskedConv3d}
MASKED_CONV_TRANSPOSE: dict[int, Callable[..., MaskableLayer]] = {2: MaskedConvTranspose2d, 3: MaskedConvTranspose3d}


def maskable_layers(network: nn.Module) -> Iterator[tuple[str, MaskableLayer]]:
    """Name and layer of all maskable layers of a network, in a fixed order."""
    for name, module in network.named_modules():
        if isinstance(module, MaskableLayer):
            yield name, module
