"""DSFF and the depth shift inside other networks, an open question of the paper.

The functions take any network built like those of ``dynamic_network_architectures``: an ``encoder``, and a ``decoder`` whose
heads are ``decoder.seg_layers``. Such networks hold modules under several names; a module is replaced under all of them.
"""

from __future__ import annotations

import pydoc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.connections import (
    MASKED_CONV,
    MASKED_CONV_TRANSPOSE,
    MaskableLayer,
    check_sparsity,
    maskable_layers,
)
from nnunetv2_e2enet.network.depth_shift import check_shift_size, check_trained_shift_size, depth_shift

MASKABLE: dict[type[nn.Module], Callable[..., MaskableLayer]] = {
    nn.Conv2d: MASKED_CONV[2],
    nn.Conv3d: MASKED_CONV[3],
    nn.ConvTranspose2d: MASKED_CONV_TRANSPOSE[2],
    nn.ConvTranspose3d: MASKED_CONV_TRANSPOSE[3],
}


class DepthShift(nn.Module):
    """The restricted depth shift as a module; the shift size travels with the weights."""

    def __init__(self, shift_size: int) -> None:
        super().__init__()
        check_shift_size(shift_size)
        self.shift_size = shift_size

    def forward(self, x: Tensor) -> Tensor:
        """Move the channel groups of ``(batch, channels, depth, height, width)``."""
        return depth_shift(x, self.shift_size)

    def get_extra_state(self) -> Tensor:
        """The shift size, which is saved with the weights."""
        return torch.tensor(self.shift_size)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises E2ENetError if the weights were trained with another shift size."""
        check_trained_shift_size(state, self.shift_size)

    def extra_repr(self) -> str:
        """The shift size, for ``print``."""
        return f"shift_size={self.shift_size}"


def make_maskable(network: nn.Module) -> nn.Module:
    """Put maskable layers in the place of the decoder's convolutions and upsampling; encoder and heads stay dense.

    Args:
        network: changed in place; weights are kept, all connections are active.

    Returns:
        ``network``.

    Raises:
        E2ENetError: there is nothing that could be replaced.
    """
    decoder = getattr(network, "decoder", nn.Module())
    kept = {*_modules(network, "encoder"), *_modules(decoder, "encoder"), *_modules(decoder, "seg_layers")}
    convs = [m for m in decoder.modules() if type(m) in MASKABLE and m not in kept and getattr(m, "groups", 1) == 1]
    if not convs:
        raise E2ENetError(
            f"{type(network).__name__} has no dense convolutions in a decoder, where DSFF could be put: take plans of a U-Net "
            "such as nnUNetPlans or a ResEnc preset"
        )
    _replace(network, {conv: _maskable(conv) for conv in convs})
    return network


def put_depth_shift(network: nn.Module, shift_size: int) -> nn.Module:
    """Put a depth shift and a convolution without depth in the place of every 3D convolution whose kernel has depth.

    Convolutions that have no depth, as nnU-Net plans them where slices are thick, stay as they are.

    Args:
        network: changed in place; the new convolutions' weights start anew.
        shift_size: channel groups of the depth shift, odd.

    Returns:
        ``network``.

    Raises:
        E2ENetError: there is nothing that could be replaced, or the shift size cannot be used.
    """
    convs = [m for m in network.modules() if type(m) is nn.Conv3d and m.kernel_size[0] > 1]
    if not convs:
        raise E2ENetError(
            f"{type(network).__name__} has no 3D convolutions with depth, in the place of which a depth shift could be put: "
            "take a 3D configuration of a U-Net"
        )
    _replace(network, {conv: nn.Sequential(DepthShift(shift_size), _without_depth(conv)) for conv in convs})
    return network


def converted_network(
    network_class_name: str, *, feature_sparsity: float | None = None, shift_size: int = 1, **arguments: Any
) -> nn.Module:
    """A network of nnU-Net's plans with maskable layers or depth shifts.

    Args:
        network_class_name: of the network to convert, as plans give it.
        feature_sparsity: share of the decoder's connections that are off, drawn at random; None leaves the decoder as it is.
        shift_size: channel groups of the depth shift; 1 leaves the convolutions as they are.
        arguments: of the network.

    Raises:
        E2ENetError: there is no such network, or it has nothing that could be replaced.
    """
    network_class: Any = pydoc.locate(network_class_name)
    if network_class is None:
        raise E2ENetError(f"the plans' network {network_class_name} cannot be imported: install what it is part of")
    network: nn.Module = network_class(**arguments)
    if shift_size != 1:
        put_depth_shift(network, shift_size)
    if feature_sparsity is not None:
        check_sparsity(feature_sparsity)
        for _, layer in maskable_layers(make_maskable(network)):
            layer.set_random_topology(layer.connections_at(1 - feature_sparsity))
    return network


def _modules(module: nn.Module, name: str) -> Iterator[nn.Module]:
    part = getattr(module, name, None)
    return part.modules() if isinstance(part, nn.Module) else iter(())


def _replace(network: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    for module in list(network.modules()):
        for name, child in module._modules.items():  # named_children() would pass over the second name of a child
            if child is not None and child in new:
                module._modules[name] = new[child]


def _maskable(conv: Any) -> MaskableLayer:
    arguments: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    if isinstance(conv, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
        arguments["output_padding"] = conv.output_padding
    bias = conv.bias is not None
    layer = MASKABLE[type(conv)](conv.in_channels, conv.out_channels, conv.kernel_size, bias=bias, **arguments)
    layer.to(conv.weight.device)
    layer.weight, layer.bias = conv.weight, conv.bias
    return layer


def _without_depth(conv: nn.Conv3d) -> nn.Conv3d:
    _, height, width = conv.kernel_size
    arguments: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "dilation", "groups", "padding_mode")}
    if isinstance(conv.padding, tuple):
        arguments["padding"] = (0, *conv.padding[1:])
    layer = nn.Conv3d(conv.in_channels, conv.out_channels, (1, height, width), bias=conv.bias is not None, **arguments)
    return layer.to(conv.weight.device, conv.weight.dtype)
