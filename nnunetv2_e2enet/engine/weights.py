"""Weights as the kernels read them: active connections only, in the order of visiting."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunetv2_e2enet.engine.amx import split_bfloat16
from nnunetv2_e2enet.engine.description import Block, NetworkDescription, Node

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Places = NDArray[np.uint16]

DENSE_ROWS = 6  # output maps that the dense product computes together
DENSE_FROM = 0.6  # share of active connections from which visiting all of them is faster
AMX_FROM = 0.3  # the same where AMX visits them, from AMX_INPUTS on
AMX_INPUTS = 12
CHUNK = 128  # input maps whose transformed tiles stay in the first-level cache

POINTS = (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)
"""Interpolation points of Winograd's F(4 x 4, 3 x 3) (Lavin and Gray, arXiv 1509.09308) besides infinity, as in core.h.

Results round half as much as with 0, 1, -1, 2, -2, and all coefficients of the transforms of maps are exact in float32.
"""


def _kernel_transform() -> Tensor:
    """A row a point: 1, x, x^2 over the product of its distances to the others."""
    distances = [prod(x - other for other in POINTS if other != x) for x in POINTS]
    rows = [[x**k / distance for k in range(3)] for x, distance in zip(POINTS, distances, strict=True)]
    return torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)


_G = _kernel_transform()


@dataclass(frozen=True)
class ConvWeights:
    """The weights of a conv at stride 1, in the Winograd domain.

    Attributes:
        weight: ``[36][connection]``, or ``[36][group][input][6]`` where it is dense, or as ``split_bfloat16`` makes it.
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
    """The weights of a transposed conv: ``weight`` is ``[depth position][connection][row position * column position]``."""

    weight: Floats
    start: Ints
    output: Ints
    index: Places


@dataclass(frozen=True)
class NormWeights:
    """Weights of an instance norm and the slope of the leaky ReLU behind it."""

    gamma: Floats
    beta: Floats
    eps: float
    slope: float
    unit: Floats | None = None


@dataclass(frozen=True)
class PackedBlock:
    """``conv`` for stride 1, otherwise ``direct``: ``[group][tap][input][6]``, or as ``split_bfloat16`` makes it."""

    conv: ConvWeights | None
    direct: Floats | None
    stride: tuple[int, int, int]
    shift: Ints
    norm: NormWeights
    inputs: int
    outputs: int


@dataclass(frozen=True)
class PackedNode:
    """A fusion node: transposed convolution, pooling, and convolutions."""

    upsample: UpsampleWeights
    up_stride: tuple[int, int, int]
    pool_stride: tuple[int, int, int] | None
    blocks: list[PackedBlock]


@dataclass(frozen=True)
class PackedWeights:
    """A whole network for the kernels; the fields are those of NetworkDescription."""

    input_channels: int
    strides: list[tuple[int, int, int]]
    encoder: list[list[PackedBlock]]
    stages: list[list[PackedNode]]
    heads: list[tuple[Floats, Floats | None, int]]


def _floats(tensor: Tensor) -> Floats:
    array: Floats = tensor.to(torch.float32).contiguous().numpy().copy()
    return array


def _ints(tensor: Tensor) -> Ints:
    array: Ints = tensor.to(torch.int32).contiguous().numpy().copy()
    return array


def _indices(tensor: Tensor) -> Places:
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
    """The places of the kernels of a conv at stride 1, whatever their values; other fields are those of ConvWeights.

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
        """A convolution with these connections and the weights ``[36][connection]``."""
        return ConvWeights(
            weight, self.start, self.output, self.index, self.chunk_first, self.inputs, self.outputs, self.dense
        )


def grouped_places(places: Tensor) -> Tensor:
    """The places as ``_grouped`` lays out weights, -1 where a group is not full."""
    return _grouped(places + 1) - 1


def _is_dense(mask: Tensor, least: float) -> bool:
    return bool(mask.double().mean() >= least)


def _places(mask: Tensor) -> Tensor:
    return torch.arange(mask.numel()).reshape(mask.shape)


def _lay_out_dense(places: Tensor, mask: Tensor) -> ConvLayout:
    outputs, inputs = mask.shape
    none = np.zeros(0, np.int32)
    return ConvLayout(places.flatten(), none, none, none.astype(np.uint16), np.zeros(1, np.int32), inputs, outputs, True)


def lay_out_conv(mask: Tensor) -> ConvLayout:
    """``mask`` is bool ``(out, in)``; dense, in groups of outputs, from DENSE_FROM on."""
    if _is_dense(mask, DENSE_FROM):
        return _lay_out_dense(grouped_places(torch.where(mask, _places(mask), -1)), mask)
    return _lay_out_sparse(mask)


def _lay_out_sparse(mask: Tensor) -> ConvLayout:
    outputs, inputs = mask.shape
    places = _places(mask)
    chunks = -(-inputs // CHUNK)
    first = torch.linspace(0, inputs, chunks + 1, dtype=torch.float64).round().long()
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
        index=_indices(torch.cat(indices)),
        chunk_first=_ints(first),
        inputs=inputs,
        outputs=outputs,
        dense=False,
    )


def pack_conv(weight: Tensor, mask: Tensor, amx: bool) -> ConvWeights:
    """``weight`` is ``(out, in, 3, 3)``, ``mask`` bool ``(out, in)``; ``amx`` for AMX where the mask is dense enough."""
    dense = amx and mask.shape[1] >= AMX_INPUTS and _is_dense(mask, AMX_FROM)
    if dense:
        layout = _lay_out_dense(torch.where(mask, _places(mask), -1), mask)
    else:
        layout = _lay_out_sparse(mask) if amx else lay_out_conv(mask)
    kernels = weight.flatten(2).flatten(0, 1).double()[layout.places.clamp(min=0)]
    kernels[layout.places < 0] = 0
    transformed = (kernels @ torch.kron(_G, _G).T).T
    return layout.holding(split_bfloat16(transformed.unflatten(1, mask.shape)) if dense else _floats(transformed))


def _pack_dense(weight: Tensor, amx: bool) -> Floats:
    """``weight`` is ``(out, tap, in)``."""
    return split_bfloat16(weight.flatten(1)) if amx else _floats(_grouped(weight))


def pack_upsample(weight: Tensor, mask: Tensor) -> UpsampleWeights:
    """``weight`` is ``(in, out, depth, row, column)``, ``mask`` bool ``(in, out)``."""
    output, index = mask.T.nonzero(as_tuple=True)
    active = weight[index, output].flatten(2)
    counts = mask.sum(0)
    return UpsampleWeights(
        weight=_floats(active.transpose(0, 1)),
        start=_ints(torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])),
        output=_ints(torch.arange(mask.shape[1])),
        index=_indices(index),
    )


def _pack_block(block: Block, amx: bool) -> PackedBlock:
    outputs, inputs = block.mask.shape
    conv = direct = None
    if block.stride == (1, 1, 1):
        conv = pack_conv(block.weight, block.mask, amx)
    else:
        weight = torch.where(block.mask[..., None, None], block.weight, 0)
        direct = _pack_dense(weight.flatten(2).transpose(1, 2), amx)
    unit = None if block.unit is None else _floats(block.unit)
    norm = NormWeights(_floats(block.gamma), _floats(block.beta), block.eps, block.slope, unit)
    return PackedBlock(conv, direct, block.stride, np.array(block.shift, np.int32), norm, inputs, outputs)


def _pack_node(node: Node, amx: bool) -> PackedNode:
    upsample = pack_upsample(node.up_weight, node.up_mask)
    return PackedNode(upsample, node.up_stride, node.pool_stride, [_pack_block(b, amx) for b in node.blocks])


def pack(description: NetworkDescription, amx: bool = False) -> PackedWeights:
    """Bring the weights of a network into the layout of the kernels; ``amx``: of those whose dense products use AMX."""
    return PackedWeights(
        input_channels=description.input_channels,
        strides=description.strides,
        encoder=[[_pack_block(b, amx) for b in level] for level in description.encoder],
        stages=[[_pack_node(n, amx) for n in stage] for stage in description.stages],
        heads=[
            (_pack_dense(weight[:, None], amx), None if bias is None else _floats(bias), weight.shape[0])
            for weight, bias in description.heads
        ],
    )
