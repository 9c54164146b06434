"""Powers of two that keep feature maps within the range of float16, 2^-14 to 2^16, whatever the scale of weights and images.

Instance norm takes every scale away again, and what is multiplied by a power of two loses no digit. So each output of a
convolution is stored in a unit of its own, and the norm's eps is multiplied by its square. How large values can get is known
before the first patch: of n values that instance norm has passed, none lies further than sqrt(n) deviations from the mean.
"""

from __future__ import annotations

from dataclasses import replace
from math import frexp, isfinite

import torch
from torch import Tensor

from nnunetv2_e2enet.engine.description import Block, NetworkDescription, Node

LARGEST = 11  # exponent: sqrt(n) of a map of 4 M voxels; images are stored with values up to the same
ROOM = 3  # exponent: the unit makes what is expected of a map at most 2^-3, so that 2^19 times as much does not overflow


def image_factor(x: Tensor) -> float:
    """The power of two that makes the largest value of an image 2^10 to 2^11, for the convolution that reads it."""
    low, high = x.aminmax()
    largest = max(-float(low), float(high))
    return _power(LARGEST - frexp(largest)[1]) if isfinite(largest) else 1.0


def in_units(description: NetworkDescription) -> NetworkDescription:
    """The same network with other units: of the outputs of each convolution (``Block.unit``), and of each upward flow.

    The magnitude of a channel bounds its values, which are at most 2^11 times as large. Of a conv's output it is
    ``|gamma| + |beta|`` after the norm.
    """
    magnitude = torch.ones(description.input_channels, dtype=torch.float64)
    encoder, magnitudes = [], []
    for blocks in description.encoder:
        scaled_blocks, magnitude = _chain(blocks, magnitude)
        encoder.append(scaled_blocks)
        magnitudes.append(magnitude)
    stages = []
    for stage in description.stages:
        before = list(magnitudes)
        nodes = []
        for level, node in enumerate(stage):
            finer = [] if node.pool_stride is None else [before[level - 1]]
            scaled, magnitudes[level] = _node(node, before[level], before[level + 1], finer)
            nodes.append(scaled)
        stages.append(nodes)
    return replace(description, encoder=encoder, stages=stages)


def _power(exponent: int) -> float:
    """A power of two whose square and inverse are float32's as well."""
    return float(2.0 ** min(max(exponent, -60), 60))


def _unit(expected: Tensor) -> Tensor:
    """Powers of two that make these numbers at most 2^-3; one where there is nothing to expect."""
    exponent = (-ROOM - torch.frexp(expected).exponent).clamp(-60, 60)
    known = expected.isfinite() & (expected > 0)
    return torch.where(known, torch.ldexp(torch.ones_like(expected), exponent), 1.0)


def _block(block: Block, magnitude: Tensor) -> Block:
    weight = torch.where(block.mask[..., None, None], block.weight, 0).double()
    unit = _unit((weight * magnitude[:, None, None]).square().sum((1, 2, 3)).sqrt())
    return replace(block, weight=weight * unit[:, None, None, None], unit=unit)


def _chain(blocks: list[Block], magnitude: Tensor) -> tuple[list[Block], Tensor]:
    scaled = []
    for block in blocks:
        scaled.append(_block(block, magnitude))
        magnitude = block.gamma.double().abs() + block.beta.double().abs()
    return scaled, magnitude


def _node(node: Node, same: Tensor, coarser: Tensor, finer: list[Tensor]) -> tuple[Node, Tensor]:
    up_weight = torch.where(node.up_mask[..., None, None, None], node.up_weight, 0).double()
    # Each voxel is a sum over the coarser channels
    upward = (up_weight.abs() * coarser[:, None, None, None, None]).sum(0).flatten(1).amax(1)
    unit = _unit(upward)
    first, *others = node.blocks
    back = torch.cat([torch.ones_like(same), 1 / unit, *(torch.ones_like(flow) for flow in finer)])
    first = replace(first, weight=first.weight * back[:, None, None], back=back)
    blocks, magnitude = _chain([first, *others], torch.cat([same, upward * unit, *finer]))
    return replace(node, up_weight=up_weight * unit[:, None, None, None], blocks=blocks, up_unit=unit), magnitude
