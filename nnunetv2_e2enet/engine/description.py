"""A network read module by module for the engine, or the reason why it has to stay with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from nnunetv2_e2enet.network.blocks import ShiftBlock
from nnunetv2_e2enet.network.compact import COMPACT
from nnunetv2_e2enet.network.connections import MaskableLayer, MaskedConv2d, MaskedConv3d, maskable_layers
from nnunetv2_e2enet.network.connections import MaskedConvTranspose2d as UpConv2d
from nnunetv2_e2enet.network.connections import MaskedConvTranspose3d as UpConv3d
from nnunetv2_e2enet.network.convolution import CONV
from nnunetv2_e2enet.network.e2enet import E2ENet
from nnunetv2_e2enet.network.encoder import Encoder
from nnunetv2_e2enet.network.fusion import SOURCES, FusionDecoder, FusionNode
from nnunetv2_e2enet.network.pooling import plain_stride

_CONVS = (nn.Conv2d, nn.Conv3d, *CONV.values(), *(c for conv in (MaskedConv2d, MaskedConv3d) for c in (conv, COMPACT[conv])))
_UP_CONVS = (UpConv2d, UpConv3d, COMPACT[UpConv2d], COMPACT[UpConv3d])
_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)

Stride = tuple[int, int, int]


class NotSupportedError(Exception):
    """The engine does not support the network; the message is the reason, without a full stop."""


@dataclass(frozen=True)
class Block:
    """A shift block.

    Attributes:
        weight: ``(out, in, 3, 3)``, what is off is zero.
        mask: ``(out, in)``, bool.
        shift: slices that each input channel moves.
        gamma, beta: of the norm.
        slope: of the leaky ReLU.
        unit: powers of two, ``(out,)``, that the convolution's outputs were multiplied by; None: one.
        back: powers of two, ``(in,)``, that the weights were multiplied by, as their inputs are in another unit; None: one.
    """

    weight: Tensor
    mask: Tensor
    stride: Stride
    shift: list[int]
    gamma: Tensor
    beta: Tensor
    eps: float
    slope: float
    unit: Tensor | None = None
    back: Tensor | None = None


@dataclass(frozen=True)
class Node:
    """A fusion node.

    Attributes:
        up_weight: ``(coarser, channels, *stride)``.
        up_mask: ``(coarser, channels)``.
        up_unit: powers of two, ``(channels,)``, that the upward flow was multiplied by; None: one.
    """

    up_weight: Tensor
    up_mask: Tensor
    up_stride: Stride
    pool_stride: Stride | None
    blocks: list[Block]
    up_unit: Tensor | None = None


@dataclass(frozen=True)
class NetworkDescription:
    """A network without torch modules. Everything per level is finest first; ``heads[0]`` gives the segmentation."""

    input_channels: int
    strides: list[Stride]
    encoder: list[list[Block]]
    stages: list[list[Node]]
    heads: list[tuple[Tensor, Tensor | None]]


def describe(network: E2ENet) -> NetworkDescription:
    """Read a network.

    Raises:
        NotSupportedError: with the reason.
    """
    check_modules(network)
    encoder, decoder = network.encoder, network.decoder
    description = NetworkDescription(
        input_channels=network.input_channels,
        strides=[_stride3(s) for s in encoder.strides],
        encoder=[[_block(block) for block in level.children()] for level in encoder.stages],
        stages=[[_node(node, level) for level, node in enumerate(stage.children())] for stage in decoder.stages],
        heads=[_head(head) for head in reversed(decoder.seg_layers)],
    )
    _check_fit(description)
    return description


FORM = (
    *("kernel_size", "stride", "padding", "output_padding", "padding_mode", "dilation", "groups", "ceil_mode"),
    *("eps", "track_running_stats", "negative_slope", "shift_size"),
)
"""Attributes of modules on which the logits depend."""


def form(network: E2ENet) -> list[object]:
    """All that a description has from a network besides weights and masks: classes and geometry of its modules, in order."""
    strides = [tuple(stride) for stride in network.encoder.strides]  # lists, which may be changed in place
    return [network.input_channels, strides, *((type(module), *map(vars(module).get, FORM)) for module in network.modules())]


def check_classes(network: nn.Module) -> None:
    """Raises NotSupportedError if the network, its encoder or its decoder is of a class that the engine does not know."""
    parts = (
        (network, E2ENet),
        (getattr(network, "encoder", None), Encoder),
        (getattr(network, "decoder", None), FusionDecoder),
    )
    for part, known in parts:
        if type(part) is not known:
            raise NotSupportedError(f"{type(part).__name__} is not {known.__name__} itself")


def check_modules(network: E2ENet) -> None:
    """Check that all modules are of known classes, without hooks, in float32 on the CPU.

    Raises:
        NotSupportedError: with the reason.
    """
    check_classes(network)
    check_hooks(network)
    for name, tensor in tensors(network):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            raise NotSupportedError(f"{name} is not an ordinary tensor on the CPU")
        if tensor.dtype not in (torch.float32, torch.bool):
            raise NotSupportedError(f"{name} is {tensor.dtype}, not float32")


def check_hooks(network: nn.Module) -> None:
    """Check for hooks, weights that are no parameters, and dropout that stays on in prediction.

    They come and go without a change of the parameters.

    Raises:
        NotSupportedError: a module, or torch for all modules, has forward hooks; the forward of a module was replaced, not
            that of its class; a weight is no parameter; dropout is on in evaluation mode.
    """
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        raise NotSupportedError("forward hooks are registered for all modules, and would not be called")
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotSupportedError(f"{name or 'the network'} has forward hooks, which would not be called")
        if name and "forward" in vars(module):  # the network's own is what asks the engine
            raise NotSupportedError(f"{name} has a forward of its own, which would not be called")
        for key in ("weight", "bias"):
            if key in vars(module) or key in module._buffers:
                raise NotSupportedError(f"{name}.{key} is no parameter, and a change of it would not be seen")
        if type(module) in _DROPOUTS and module.training and not network.training:
            raise NotSupportedError(f"{name} is in training mode, the network is not")


def tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    """All that the logits depend on: parameters and masks."""
    masks = [(f"{name}.mask", layer.mask) for name, layer in maskable_layers(network)]
    return [*network.named_parameters(), *masks]


def _check_fit(network: NetworkDescription) -> None:
    """Check that each layer has the channels and strides of the layers around it, which the kernels take for granted.

    Raises:
        NotSupportedError: PyTorch says what is wrong, or computes something else.
    """
    strides, encoder, levels = network.strides, network.encoder, len(network.strides)
    nodes = [len(stage) for stage in network.stages]
    if len(encoder) != levels or not all(encoder) or nodes != [*range(levels - 1, 0, -1)] or len(network.heads) >= levels:
        raise NotSupportedError(f"the blocks, fusion nodes and heads are not those of {levels} levels")
    features = [blocks[0].mask.shape[0] for blocks in encoder]
    chains = [*zip(range(levels), encoder, [network.input_channels, *features[:-1]], strides, strict=True)]
    for level, node in [pair for stage in network.stages for pair in enumerate(stage)]:
        finer, pool_stride = (features[level - 1], strides[level]) if level else (0, None)
        up_shapes = {node.up_weight.shape[:2], node.up_mask.shape}
        if up_shapes != {(features[level + 1], features[level])} or node.up_stride != strides[level + 1]:
            raise NotSupportedError(f"an upward flow to level {level} does not fit the levels")
        if node.pool_stride != pool_stride:
            raise NotSupportedError(f"a downward flow to level {level} does not fit the levels")
        chains.append((level, node.blocks, 2 * features[level] + finer, (1, 1, 1)))
    for level, blocks, inputs, stride in chains:
        for block in blocks:
            shapes = {block.weight.shape[:2], block.mask.shape}
            if shapes != {(features[level], inputs)} or len(block.shift) != inputs or block.stride != stride:
                raise NotSupportedError(f"a convolution of level {level} does not fit the layers before it")
            if {len(block.gamma), len(block.beta)} != {features[level]}:
                raise NotSupportedError(f"a norm of level {level} does not fit its convolution")
            inputs, stride = features[level], (1, 1, 1)
    for level, (weight, bias) in enumerate(network.heads):
        if weight.shape[1] != features[level] or (bias is not None and len(bias) != len(weight)):
            raise NotSupportedError(f"a head does not fit the maps of level {level}")


def _stride3(stride: Sequence[int] | int) -> Stride:
    values = (stride,) * 3 if isinstance(stride, int) else (1,) * (3 - len(stride)) + tuple(stride)
    return values[0], values[1], values[2]


def _block(block: nn.Module) -> Block:
    if type(block) is not ShiftBlock:
        raise NotSupportedError(f"a block is {type(block).__name__}")
    conv, norm, nonlin = block.conv, block.norm, block.nonlin
    if type(conv) not in _CONVS:
        raise NotSupportedError(f"a convolution is {type(conv).__name__}")
    assert isinstance(conv, (nn.Conv2d, nn.Conv3d))
    kernel = _stride3(conv.kernel_size)
    if kernel != (1, 3, 3) or _padding(conv) != (0, 1, 1) or conv.groups != 1 or set(conv.dilation) != {1}:
        raise NotSupportedError(f"a convolution has kernel {kernel}, padding, dilation or groups of its own")
    if conv.padding_mode != "zeros":
        raise NotSupportedError(f"a convolution pads with {conv.padding_mode}")
    if type(norm) not in _NORMS:
        raise NotSupportedError(f"the norm is {type(norm).__name__}")
    assert isinstance(norm, (nn.InstanceNorm2d, nn.InstanceNorm3d))
    if norm.track_running_stats or norm.running_mean is not None:
        raise NotSupportedError("the norm keeps running statistics")
    if type(nonlin) is not nn.LeakyReLU or not 0 <= nonlin.negative_slope <= 1:
        raise NotSupportedError(f"the activation is {nonlin}")
    if block.dropout is not None and type(block.dropout) not in _DROPOUTS:
        raise NotSupportedError(f"the dropout is {type(block.dropout).__name__}")
    weight, mask = _weight(conv)
    out_channels, in_channels = weight.shape[:2]
    return Block(
        weight=weight.reshape(out_channels, in_channels, 3, 3),
        mask=mask,
        stride=_stride3(conv.stride if len(conv.stride) == 3 else (1, *conv.stride)),
        shift=block.offsets(),
        gamma=norm.weight.detach() if norm.weight is not None else torch.ones(out_channels),
        beta=norm.bias.detach() if norm.bias is not None else torch.zeros(out_channels),
        eps=norm.eps,
        slope=nonlin.negative_slope,
    )


def _padding(conv: nn.Conv2d | nn.Conv3d) -> Stride | None:
    padding = conv.padding
    if isinstance(padding, str):
        return None
    return (0, padding[0], padding[1]) if len(padding) == 2 else (padding[0], padding[1], padding[2])


def _weight(layer: nn.Module) -> tuple[Tensor, Tensor]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, MaskableLayer):
        return layer.spread(weight.detach()), layer.mask
    return weight.detach(), torch.ones(weight.shape[:2], dtype=torch.bool)


def _node(node: nn.Module, level: int) -> Node:
    if type(node) is not FusionNode:
        raise NotSupportedError(f"a fusion node is {type(node).__name__}")
    if list(node.flows) != [flow for flow, source in SOURCES.items() if level + source >= 0]:
        raise NotSupportedError(f"a fusion node of level {level} fuses the flows {', '.join(node.flows)} alone")
    upsample, pool = node.upsample, node.downsample
    if not isinstance(upsample, (UpConv2d, UpConv3d)) or type(upsample) not in _UP_CONVS or upsample.bias is not None:
        raise NotSupportedError("the upward flow is not a transposed convolution without bias")
    if tuple(upsample.kernel_size) != tuple(upsample.stride) or any((*upsample.padding, *upsample.output_padding)):
        raise NotSupportedError("the upward flow's kernel is not its stride")
    if upsample.groups != 1 or set(upsample.dilation) != {1}:
        raise NotSupportedError("the upward flow has dilation or groups of its own")
    pool_stride = None if pool is None else plain_stride(pool)
    if pool is not None and pool_stride is None:
        raise NotSupportedError(f"the downward flow is {pool}")
    weight, mask = _weight(upsample)
    return Node(
        up_weight=weight.reshape(*weight.shape[:2], *_stride3(upsample.stride)),
        up_mask=mask,
        up_stride=_stride3(upsample.stride),
        pool_stride=None if pool_stride is None else _stride3(pool_stride),
        blocks=[_block(block) for block in node.blocks.children()],
    )


def _head(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    if type(head) not in (nn.Conv2d, nn.Conv3d):
        raise NotSupportedError(f"a head is {type(head).__name__}")
    assert isinstance(head, (nn.Conv2d, nn.Conv3d))
    if set(head.kernel_size) != {1} or set(head.stride) != {1} or head.groups != 1 or any(head.padding):
        raise NotSupportedError("a head is not a convolution of one voxel")
    return head.weight.detach().flatten(1), None if head.bias is None else head.bias.detach()
