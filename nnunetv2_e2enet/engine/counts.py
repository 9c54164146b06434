"""Multiply-accumulates of the engine, as it computes them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunetv2_e2enet.network import E2ENet, MaskableLayer
from nnunetv2_e2enet.network.accounts import run_on_meta

TILE = 4  # pixels along each side of a tile of F(4 x 4, 3 x 3)
PRODUCTS_PER_TILE = 36  # of one connection


def executed_macs(network: E2ENet, patch_size: Sequence[int]) -> int:
    """Multiply-accumulates with weights in the prediction of one patch, of all layers.

    Convolutions at stride 1 take 36 a connection and tile in the Winograd domain, where a direct convolution takes 144; tiles
    at the border count whole. Transforms, which multiply by constants, are not counted.

    Args:
        network: an E2ENet; its topology counts.
        patch_size: spatial axes.
    """
    return sum(_macs_of(conv, size) for conv, size in _sizes(network, patch_size).items())


def product_macs(network: E2ENet, patch_size: Sequence[int]) -> int:
    """Winograd-domain part of ``executed_macs``, which the timer ``products`` measures."""
    return sum(_macs_of(conv, size) for conv, size in _sizes(network, patch_size).items() if _in_winograd_domain(conv))


def _sizes(network: E2ENet, patch_size: Sequence[int]) -> dict[_ConvNd, Sequence[int]]:
    """Spatial axes of what each convolution computes."""
    sizes: dict[_ConvNd, Sequence[int]] = {}

    def note(module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, _ConvNd)
        sizes[module] = output.shape[2:]

    handles = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, _ConvNd)]
    try:
        with torch.no_grad():
            run_on_meta(network, (1, network.input_channels, *patch_size))
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _in_winograd_domain(conv: _ConvNd) -> bool:
    return not conv.transposed and max(conv.stride) == 1 and max(conv.kernel_size) > 1


def _macs_of(conv: _ConvNd, size: Sequence[int]) -> int:
    connections = conv.n_active if isinstance(conv, MaskableLayer) else conv.weight.shape[:2].numel()
    if conv.transposed:  # kernel and stride are the same, so one product a voxel of the result
        return connections * prod(size)
    if not _in_winograd_domain(conv):
        return connections * prod(conv.kernel_size) * prod(size)
    *slices, height, width = size
    return connections * PRODUCTS_PER_TILE * prod(slices) * ceil(height / TILE) * ceil(width / TILE)
