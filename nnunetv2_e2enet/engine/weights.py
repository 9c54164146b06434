"""Weights as the kernels read them: active connections only, in the order of visiting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunetv2_e2enet.engine.description import Block, Description, Node

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Places = NDArray[np.uint16]

DENSE_ROWS = 6  # output maps that the dense product computes together
DENSE_FROM = 0.6  # share of active connections from which visiting all of them is faster
CHUNK = 128  # input maps whose transformed tiles stay in the first-level cache

# Kernel transform of Winograd's F(4 x 4, 3 x 3) (Lavin and Gray, arXiv 1509.09308), interpolation points 0, 1, -1, 2, -2.
_G = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)


@dataclass(frozen=True)
class ConvWeights:
    """Of a conv at stride 1, in the Winograd domain.

    Attributes:
        weight: ``[36][connection]``, or ``[36][group][input][6]`` where it is dense.
        start, output: ``[chunk][outputs + 1]``, ``[chunk][outputs]``: connections of each output map, shortest list first.
        index: input map of each connection, counted from the first of its chunk.
        chunk_first: first input map of each chunk, and the number of input maps.
    """

    weight: Floats
    start: Ints
    output: Ints
    index: Places
    chunk_first: Ints
    inputs: int
    outputs: int
    dense: bool


@dataclass(frozen=True)
class UpsampleWeights:
    """Of a transposed conv: ``weight`` is ``[depth position][connection][row position * column position]``."""

    weight: Floats
    start: Ints
    output: Ints
    index: Places


@dataclass(frozen=True)
class NormWeights:
    gamma: Floats
    beta: Floats
    eps: float
    slope: float
    unit: Floats | None = None


@dataclass(frozen=True)
class PackedBlock:
    """``conv`` for stride 1, otherwise ``direct``: ``[group][tap][input][6]``."""

    conv: ConvWeights | None
    direct: Floats | None
    stride: tuple[int, int, int]
    shift: Ints
    norm: NormWeights
    inputs: int
    outputs: int


@dataclass(frozen=True)
class PackedNode:
    upsample: UpsampleWeights
    up_stride: tuple[int, int, int]
    pool_stride: tuple[int, int, int] | None
    blocks: list[PackedBlock]


@dataclass(frozen=True)
class PackedWeights:
    """A whole network for the kernels; the fields are those of Description."""

    input_channels: int
    features: list[int]
    strides: list[tuple[int, int, int]]
    encoder: list[list[PackedBlock]]
    stages: list[list[PackedNode]]
    heads: list[tuple[Floats, Floats | None, int]]

    @property
    def n_bytes(self) -> int:
        """Of all weights."""
        nodes = [node for stage in self.stages for node in stage]
        blocks = [*(b for level in self.encoder for b in level), *(b for node in nodes for b in node.blocks)]
        arrays = [b.direct for b in blocks if b.direct is not None]
        for conv in (b.conv for b in blocks):
            arrays += [] if conv is None else [conv.weight]
        arrays += [node.upsample.weight for node in nodes]
        return sum(array.nbytes for array in arrays)


def _floats(tensor: Tensor) -> Floats:
    array: Floats = tensor.to(torch.float32).contiguous().numpy().copy()
    return array


def _ints(tensor: Tensor) -> Ints:
    array: Ints = tensor.to(torch.int32).contiguous().numpy().copy()
    return array


def _places(tensor: Tensor) -> Places:
    array: Places = tensor.contiguous().numpy().astype(np.uint16)
    return array


def _grouped(weight: Tensor) -> Tensor:
    """``(out, ..., in)`` to ``(group, ..., in, 6)``, zeros where the last group is not full."""
    groups = -(-weight.shape[0] // DENSE_ROWS)
    padded = weight.new_zeros(groups * DENSE_ROWS, *weight.shape[1:])
    padded[: weight.shape[0]] = weight
    rows: Tensor = padded.unflatten(0, (groups, DENSE_ROWS)).movedim(1, -1)
    return rows


@dataclass(frozen=True)
class ConvLayout:
    """Where the kernels of a conv at stride 1 go, whatever their values; the fields are those of ConvWeights.

    Attributes:
        places: for each kernel that is stored, its place in a tensor ``(out, in)``; -1: zeros.
    """

    places: Tensor
    start: Ints
    output: Ints
    index: Places
    chunk_first: Ints
    inputs: int
    outputs: int
    dense: bool

    def holding(self, weight: Floats) -> ConvWeights:
        return ConvWeights(
            weight, self.start, self.output, self.index, self.chunk_first, self.inputs, self.outputs, self.dense
        )


def grouped_places(places: Tensor) -> Tensor:
    """As ``_grouped``, of places, -1 where a group is not full."""
    return _grouped(places + 1) - 1


def lay_out_conv(mask: Tensor) -> ConvLayout:
    """``mask`` is bool ``(out, in)``."""
    outputs, inputs = mask.shape
    places = torch.arange(mask.numel()).reshape(mask.shape)
    if mask.double().mean() >= DENSE_FROM:
        none = np.zeros(0, np.int32)
        dense = grouped_places(torch.where(mask, places, -1)).flatten()
        return ConvLayout(dense, none, none, none.astype(np.uint16), np.zeros(1, np.int32), inputs, outputs, True)
    chunks = -(-inputs // CHUNK)
    first = torch.linspace(0, inputs, chunks + 1).round().long()
    starts, orders, indices, stored = [], [], [], []
    seen = 0
    for begin, end in zip(first[:-1].tolist(), first[1:].tolist(), strict=True):
        part = mask[:, begin:end]
        counts = part.sum(1)
        order = torch.argsort(counts, stable=True)
        row, column = part[order].nonzero(as_tuple=True)
        starts.append(torch.cat([torch.zeros(1, dtype=torch.long), counts[order].cumsum(0)]) + seen)
        orders.append(order)
        indices.append(column)
        stored.append(places[order[row], begin + column])
        seen += len(row)
    return ConvLayout(
        places=torch.cat(stored),
        start=_ints(torch.cat(starts)),
        output=_ints(torch.cat(orders)),
        index=_places(torch.cat(indices)),
        chunk_first=_ints(first),
        inputs=inputs,
        outputs=outputs,
        dense=False,
    )


def pack_conv(weight: Tensor, mask: Tensor) -> ConvWeights:
    """``weight`` is ``(out, in, 3, 3)``, ``mask`` bool ``(out, in)``."""
    layout = lay_out_conv(mask)
    kernels = weight.flatten(2).flatten(0, 1).double()[layout.places.clamp(min=0)]
    kernels[layout.places < 0] = 0
    return layout.holding(_floats((kernels @ torch.kron(_G, _G).T).T))


def pack_upsample(weight: Tensor, mask: Tensor) -> UpsampleWeights:
    """``weight`` is ``(in, out, depth, row, column)``, ``mask`` bool ``(in, out)``."""
    output, index = mask.T.nonzero(as_tuple=True)
    active = weight[index, output].flatten(2)
    counts = mask.sum(0)
    return UpsampleWeights(
        weight=_floats(active.transpose(0, 1)),
        start=_ints(torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])),
        output=_ints(torch.arange(mask.shape[1])),
        index=_places(index),
    )


def _pack_block(block: Block) -> PackedBlock:
    outputs, inputs = block.mask.shape
    conv = direct = None
    if block.stride == (1, 1, 1):
        conv = pack_conv(block.weight, block.mask)
    else:
        weight = torch.where(block.mask[..., None, None], block.weight, 0)
        direct = _floats(_grouped(weight.flatten(2).transpose(1, 2)))
    unit = None if block.unit is None else _floats(block.unit)
    norm = NormWeights(_floats(block.gamma), _floats(block.beta), block.eps, block.slope, unit)
    return PackedBlock(conv, direct, block.stride, np.array(block.shift, np.int32), norm, inputs, outputs)


def _pack_node(node: Node) -> PackedNode:
    upsample = pack_upsample(node.up_weight, node.up_mask)
    return PackedNode(upsample, node.up_stride, node.pool_stride, [_pack_block(b) for b in node.blocks])


def pack(description: Description) -> PackedWeights:
    return PackedWeights(
        input_channels=description.input_channels,
        features=description.features,
        strides=description.strides,
        encoder=[[_pack_block(b) for b in level] for level in description.encoder],
        stages=[[_pack_node(n) for n in stage] for stage in description.stages],
        heads=[
            (_floats(_grouped(weight[:, None])), None if bias is None else _floats(bias), weight.shape[0])
            for weight, bias in description.heads
        ],
    )
