"""Maskable layers that store the weights of active connections alone.

All blocks of such a layer have equally many input maps, so that the weights are those of a grouped convolution with a group
for each block. State dicts hold the weights of all connections, as for any maskable layer, and loading expects them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network._raw_map import FeatureMap, RawMap, values_of
from nnunetv2_e2enet.network.acceleration import prepare_kernels
from nnunetv2_e2enet.network.connections import (
    MaskableLayer,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)
from nnunetv2_e2enet.network.depth_shift import depth_shift
from nnunetv2_e2enet.network.memory_format import is_channels_last
from nnunetv2_e2enet.network.sparse_convolution import LARGEST_BLOCK, can_compute, sparse_convolution

LEAST_BLOCK = 16  # output maps of a block that is worth a matrix product of its own


class CompactLayer(MaskableLayer):
    """A maskable layer whose ``weight``, its gradient and optimizer state are those of active connections.

    ``store_active_only`` makes one. The values of ``weight`` are in the order of the mask, so their places change with the
    topology. A mean over a training is one of state dicts. A new topology must have as many inputs in each block.

    Attributes:
        active_inputs: the input maps of each block in ascending order, ``(blocks, inputs per block)``; follows the mask.
    """

    stores_active_only = True
    active_inputs: Tensor
    stride: tuple[int, ...]

    def reads_maps(self, feature_map: FeatureMap) -> bool:
        """Whether the kernels take a list of maps like this one as they are; not where a hook wants to see a tensor."""
        hooks = (self._forward_pre_hooks, self._forward_hooks, self._backward_pre_hooks, self._backward_hooks)
        return can_compute(self, values_of(feature_map)) and not any(hooks)

    def forward(self, x: FeatureMap | Sequence[FeatureMap], with_bias: bool = True, shift_size: int = 1) -> Tensor:
        """As ``MaskableLayer.forward``, over ``depth_shift(x, shift_size)``."""
        maps = [x] if isinstance(x, (Tensor, RawMap)) else x
        bias, transposed = self.bias if with_bias else None, self.output_axis == 1
        if can_compute(self, values_of(maps[0])):
            weight = self._by_output() if transposed else self.weight
            return sparse_convolution(maps, shift_size, weight, bias, self.active_inputs, self.stride, transposed)
        joined = depth_shift(maps, shift_size)
        if self.computes_active_only:
            inputs, weight, groups = self.grouped(joined)
            return self.convolved(inputs, weight, bias, groups)
        return super().forward(joined, with_bias)

    @property
    def computes_active_only(self) -> bool:
        """Whether the forward pass gathers input maps: with zero padding only."""
        return self.training and getattr(self, "padding_mode", "zeros") == "zeros"

    def grouped(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """The layer as a grouped convolution, a group for each block: its input maps, the weights, the number of groups.

        Shapes follow from block size and sparsity alone, so that a new topology changes indices and nothing else.
        """
        axis = -1 if is_channels_last(x) else 1  # of a view, so that the result has its channels last too
        inputs = x.movedim(1, axis).index_select(axis, self.active_inputs.flatten()).movedim(axis, 1)
        return inputs, self.weight, self.n_blocks

    def find_inputs(self) -> Tensor:
        """The value of ``active_inputs`` for the present mask."""
        blocks = self.mask.movedim(self.output_axis, 0)[:: self.block_size].to(torch.uint8)
        return blocks.argsort(dim=1, descending=True, stable=True)[:, : self._inputs_per_block].contiguous()

    def _set_mask(self, mask: Tensor) -> None:
        super()._set_mask(mask)
        self.active_inputs.copy_(self.find_inputs())

    def _places(self) -> tuple[Tensor, Tensor]:
        """Indices of the active connections in a tensor ``(blocks, input maps, ...)``."""
        inputs = self.active_inputs
        return torch.arange(len(inputs), device=inputs.device)[:, None], inputs

    def gather(self, values: Tensor) -> Tensor:
        """The values of active connections, shaped like ``weight``, of values for all connections, of shape ``shape``."""
        blocks: Tensor = values.movedim(self.output_axis, 0).unflatten(0, (-1, self.block_size)).transpose(1, 2)
        active = blocks[self._places()]  # (blocks, inputs per block, outputs, ...)
        return (active.transpose(1, 2) if self.output_axis == 0 else active).flatten(0, 1)

    def spread(self, values: Tensor) -> Tensor:
        """The reverse of ``gather``: values shaped like ``weight`` for all connections, zero for those that are off."""
        active = values.unflatten(0, (self.n_blocks, -1))
        active = active.transpose(1, 2) if self.output_axis == 0 else active
        blocks = values.new_zeros(self.n_blocks, self.n_inputs, *active.shape[2:]).index_put(self._places(), active)
        return blocks.transpose(1, 2).flatten(0, 1).movedim(0, self.output_axis).contiguous()

    def _by_output(self) -> Tensor:
        """The weights of a transposed convolution as those of an ordinary one: ``(outputs, inputs per block, *kernel)``."""
        weight: Tensor = self.weight.unflatten(0, (self.n_blocks, -1)).transpose(1, 2).flatten(0, 1)
        return weight

    def masked_weight(self) -> Tensor:
        """The weights of all connections, zero where they are off."""
        return self.spread(self.weight)

    def clear_inactive_weights(self) -> None:
        """Nothing to do: weights of inactive connections are not stored."""

    def share_inputs(self, block_size: int, equal_blocks: bool = False) -> None:  # noqa: ARG002
        """Raises E2ENetError: the stored weights belong to the present blocks."""
        raise E2ENetError("the layer stores its active weights alone, whose blocks are what they are: build it anew")

    def change_topology(self, mask: Tensor, restarted: Tensor, states: Sequence[Tensor] = ()) -> None:
        """As for any maskable layer.

        Raises:
            E2ENetError: a block of the new topology has another number of inputs.
        """
        if not self.fits_blocks(mask):
            raise E2ENetError(
                f"a layer that stores {self._inputs_per_block} inputs for each block of {self.block_size} output maps got a "
                "topology of other blocks: take one of the same sparsity and block size, set with equal_blocks"
            )
        super().change_topology(mask, restarted, states)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.spread(self.weight if keep_vars else self.weight.detach())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Raises E2ENetError if the topology of ``state_dict`` is of other blocks."""
        mask = state_dict.get(f"{prefix}mask", self.mask)
        if mask.shape == self.mask.shape and not self.fits_blocks(mask.to(self.mask)):
            raise E2ENetError(
                f"{prefix}mask has not {self._inputs_per_block} input maps for each block of {self.block_size} output maps: "
                "load weights of the same sparsity in such blocks, or use the trainer that they were trained with"
            )
        parameter, stored = self.weight, self.weight.data
        parameter.data = self.spread(stored)
        super()._load_from_state_dict(state_dict, prefix, *args)  # with torch's own checks
        self.active_inputs = self.active_inputs.to(self.mask.device).copy_(self.find_inputs())
        active = self.gather(self.weight.data)
        if self.weight is parameter:
            parameter.data = stored.copy_(active)
        else:  # with assign=True
            self.weight = nn.Parameter(active, parameter.requires_grad)


class CompactConv2d(CompactLayer, MaskedConv2d):
    """A compact ``MaskedConv2d``."""


class CompactConv3d(CompactLayer, MaskedConv3d):
    """A compact ``MaskedConv3d``."""


class CompactConvTranspose2d(CompactLayer, MaskedConvTranspose2d):  # type: ignore[misc]
    """A compact ``MaskedConvTranspose2d``."""


class CompactConvTranspose3d(CompactLayer, MaskedConvTranspose3d):  # type: ignore[misc]
    """A compact ``MaskedConvTranspose3d``."""


COMPACT: dict[type[MaskableLayer], type[CompactLayer]] = {
    MaskedConv2d: CompactConv2d,
    MaskedConv3d: CompactConv3d,
    MaskedConvTranspose2d: CompactConvTranspose2d,
    MaskedConvTranspose3d: CompactConvTranspose3d,
}
"""The class of the compact layer, by the class of the layer that stores all weights."""


def store_active_only(layer: MaskableLayer) -> None:
    """Turn a maskable layer into a compact one, in its place; ``weight`` stays the same Parameter.

    To be called before there is optimizer state and before DistributedDataParallel. A compact layer stays as it is.

    Raises:
        E2ENetError: the blocks do not have equally many inputs, gradients of all connections are wanted, or ``layer`` is of
            another class than the four of ``connections.py``.
    """
    if layer.dense_gradients:
        raise E2ENetError(
            "dense_gradients, which growth by gradient needs, are those of all connections: store the weights of all"
        )
    if layer.stores_active_only:
        return
    if type(layer) not in COMPACT:
        raise E2ENetError(f"{type(layer).__name__} has no compact form, only {', '.join(cls.__name__ for cls in COMPACT)}")
    layer._inputs_per_block = int(layer.mask.sum(layer.input_axis)[0])
    if not (layer.equal_blocks and layer.fits_blocks()):
        raise E2ENetError(
            f"blocks of {layer.block_size} output maps do not have equally many input maps each: call share_inputs(..., "
            "equal_blocks=True) and set_random_topology before store_active_only"
        )
    layer.__class__ = COMPACT[type(layer)]
    assert isinstance(layer, CompactLayer)
    layer.register_buffer("active_inputs", layer.find_inputs(), persistent=False)
    layer.weight.data = layer.gather(layer.weight.data)
    prepare_kernels(layer.weight.device, convolutions=True)


def store_all(layer: MaskableLayer) -> None:
    """The reverse of ``store_active_only``, in the same place; any other layer stays as it is."""
    if layer.stores_active_only:
        layer.weight.data = layer.spread(layer.weight.data)
        delattr(layer, "active_inputs")
        layer.__class__ = next(cls for cls, compact in COMPACT.items() if compact is type(layer))


def store_active_if_in_blocks(layer: MaskableLayer) -> None:
    """``store_active_only`` where the mask alone shows equal blocks of a size for the kernels, otherwise nothing."""
    block_size = layer.shared_block_size()
    per_block = layer.mask.sum(layer.input_axis)
    equal = bool((per_block == per_block[0]).all()) and bool(per_block[0])
    if equal and LEAST_BLOCK <= block_size <= LARGEST_BLOCK and not layer.mask.all():
        layer.share_inputs(block_size, equal_blocks=True)
        store_active_only(layer)
