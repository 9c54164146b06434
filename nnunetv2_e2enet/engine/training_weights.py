"""Weights of a network in training: packed again in each iteration, and where the gradient of each lies."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnunetv2_e2enet.engine.core import Core
from nnunetv2_e2enet.engine.description import Block, NetworkDescription, Node, describe, form
from nnunetv2_e2enet.engine.layout import LINE
from nnunetv2_e2enet.engine.units import in_units
from nnunetv2_e2enet.engine.weights import (
    ConvLayout,
    ConvWeights,
    Floats,
    Ints,
    NormWeights,
    PackedBlock,
    PackedNode,
    PackedWeights,
    UpsampleWeights,
    grouped_places,
    lay_out_conv,
)
from nnunetv2_e2enet.network.connections import maskable_layers
from nnunetv2_e2enet.network.e2enet import E2ENet

PASSES = 250  # forward passes for which units of maps in float16 are good; weights change little in so many iterations
TAPS = 9
POINTS = 36  # of a kernel in the Winograd domain


@dataclass(frozen=True)
class TrainedBlock(PackedBlock):
    """A shift block and its backward pass.

    Attributes:
        turned: of a conv at stride 1, from outputs to inputs, kernels turned by half a turn.
        turned_direct: of another conv, ``[position in the stride's window][group of inputs][tap][output][6]``.
        places: of each sum over tiles in the gradient: a kernel of a conv at stride 1, otherwise a weight; -1: none.
        parameter, gamma, beta: the conv's weight and the norm's, by their place among the network's parameters.
    """

    turned: ConvWeights | None
    turned_direct: Floats | None
    places: Ints
    parameter: int
    gamma: int | None
    beta: int | None


@dataclass(frozen=True)
class TrainedNode(PackedNode):
    """``turned`` is from outputs to inputs, ``[position in the stride's window][connection]``."""

    turned: UpsampleWeights
    places: Ints
    parameter: int


@dataclass(frozen=True)
class TrainedHead:
    """``turned`` is ``[group of inputs][class][6]``."""

    turned: Floats
    places: Ints
    parameter: int
    bias: int | None


@dataclass(frozen=True)
class Packing:
    """How an array follows from a parameter: single weights in another order, or kernels in the Winograd domain."""

    parameter: int
    places: Ints
    target: Floats
    kernels: bool = False
    turned: bool = False


class TrainingWeights:
    """A network for the kernels, with all that its backward pass needs.

    Args:
        network: one that ``describe`` accepts.

    Attributes:
        core: without tile registers.
        packed: what the forward pass reads.
        heads: finest first.
        shapes: of the network's parameters.
        read: places of those whose values matter; the bias of a convolution before a norm has no effect.
        lock: held while what was packed is read: the backward pass packs turned kernels into memory of the forward pass.
    """

    def __init__(self, network: E2ENet, core: Core) -> None:
        self.core = core
        self.lock = threading.Lock()
        self._packings: list[Packing] = []
        self._places = {id(parameter): k for k, parameter in enumerate(network.parameters())}
        self._names = _places_by_name(network)
        self.shapes = [parameter.shape for parameter in network.parameters()]
        self._form = form(network)
        self._masks = [layer.mask.clone() for _, layer in maskable_layers(network)]
        self._factors: dict[int, Tensor] = {}  # by parameter: what it is multiplied by as it is packed
        self._passes = 0
        self._packed: list[tuple[int, int]] = []  # address and version of each parameter at the last forward pass
        with torch.device("cpu"):  # whatever the default device is
            self._lay_out(network)
        self.read = {packing.parameter for packing in self._packings}

    def _lay_out(self, network: E2ENet) -> None:
        description = describe(network)
        if self.core.storage == "float16":
            description = in_units(description)
        encoder, decoder = network.encoder, network.decoder
        heads = [self._head(head) for head in reversed(decoder.seg_layers)]
        self.heads = [trained for _, trained in heads]
        self.packed = PackedWeights(
            input_channels=description.input_channels,
            strides=description.strides,
            encoder=[
                [
                    self._block(block, module, is_first=block is description.encoder[0][0])
                    for block, module in zip(level, modules.children(), strict=True)
                ]
                for level, modules in zip(description.encoder, encoder.stages, strict=True)
            ],
            stages=self._stages(description, decoder.stages),
            heads=[packed for packed, _ in heads],
        )

    def fits(self, network: E2ENet, core: Core) -> bool:
        """Whether kernels, topology and places of parameters are still those that were packed, and units are new enough."""
        if core is not self.core or (self._factors and self._passes >= PASSES):
            return False
        if self._form != form(network) or self._names != _places_by_name(network):
            return False
        if self.shapes != [parameter.shape for parameter in network.parameters()]:
            return False
        layers = [layer for _, layer in maskable_layers(network)]
        return all(torch.equal(mask, layer.mask) for mask, layer in zip(self._masks, layers, strict=True))

    def reached_from(self, heads: Sequence[int]) -> set[int]:
        """The places of all parameters that the logits of these heads depend on."""
        parts = [f"decoder.seg_layers.{len(self.heads) - 1 - head}." for head in heads]
        levels: set[int] = set()  # whose maps are read, from stage to stage
        for stage in reversed(range(len(self.packed.stages))):
            levels = {near for level in levels for near in (level - 1, level, level + 1) if near >= 0}
            levels |= {head for head in heads if len(self.packed.stages[stage]) == head + 1}  # the last stage with its level
            parts += [f"decoder.stages.{stage}.{level}." for level in levels]
        parts += [f"encoder.stages.{level}." for level in range(max(levels, default=-2) + 2)]
        return {place for name, place in self._names.items() if name.startswith(tuple(parts))}

    def refresh(self, parameters: Sequence[Tensor | None], threads: int, backward: bool = False) -> None:
        """Pack the present values of all parameters that are read.

        Turned kernels take the memory of the kernels that the forward pass reads, and are packed for the backward pass only.
        All the rest is packed again where a forward pass with other parameters came between.
        """
        values = {place: value for place, value in enumerate(parameters) if value is not None and place in self.read}
        state = [(value.data_ptr(), value._version) for value in values.values()]
        if not backward:
            self._passes += 1
            self._pack(values, threads, turned=False)
        else:
            if state != self._packed:
                self._pack(values, threads, turned=False)
            self._pack(values, threads, turned=True)
        self._packed = state

    def _pack(self, values: Mapping[int, Tensor], threads: int, turned: bool) -> None:
        for packing in self._packings:
            if packing.turned != turned:
                continue
            weight = values[packing.parameter].detach()
            if packing.parameter in self._factors:
                weight = weight * self._factors[packing.parameter]
            weight = weight.contiguous()
            places, target, n = packing.places.ctypes.data, packing.target.ctypes.data, len(packing.places)
            if packing.kernels:
                self.core.pack_kernels(weight.data_ptr(), places, n, packing.turned, target, threads)
            else:
                self.core.pack_weights(weight.data_ptr(), places, n, target, threads)

    def finish_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Turn gradients of the weights as they were packed into those of the parameters."""
        for parameter, factor in self._factors.items():
            gradients[parameter].mul_(factor)

    # ---- building ---------------------------------------------------------------------------------------------------

    def _stages(self, description: NetworkDescription, modules: nn.ModuleList) -> list[list[PackedNode]]:
        return [
            [self._node(node, module) for node, module in zip(nodes, stage.children(), strict=True)]
            for nodes, stage in zip(description.stages, modules, strict=True)
        ]

    def _place(self, parameter: object) -> int:
        return self._places[id(parameter)]

    def _array(self, parameter: int, places: Tensor | Ints) -> Floats:
        """An array of the weights in these places, which follows the parameter."""
        flat = np.ascontiguousarray(np.asarray(places).reshape(-1), np.int32)
        target = np.empty(len(flat), np.float32)
        self._packings.append(Packing(parameter, flat, target))
        return target

    def _kernels(
        self, parameter: int, layout: ConvLayout, places: Tensor, memory: Floats, turned: bool = False
    ) -> ConvWeights:
        flat = np.ascontiguousarray(places.numpy(), np.int32)
        target = memory[: POINTS * len(flat)].reshape(POINTS, len(flat))
        self._packings.append(Packing(parameter, flat, target, kernels=True, turned=turned))
        return layout.holding(target)

    def _norm(self, block: Block, gamma: int | None, beta: int | None) -> NormWeights:
        channels = np.arange(len(block.gamma), dtype=np.int32)
        return NormWeights(
            np.ones(len(channels), np.float32) if gamma is None else self._array(gamma, channels),
            np.zeros(len(channels), np.float32) if beta is None else self._array(beta, channels),
            block.eps,
            block.slope,
            None if block.unit is None else block.unit.float().numpy(),
        )

    def _multiply(self, parameter: int, rows: Tensor | None, columns: Tensor | None) -> None:
        """Multiply a parameter by one factor for each place of its first axis, and one for each of its second."""
        if rows is None and columns is None:
            return
        shape = self.shapes[parameter]
        factor = torch.ones(shape[:2], dtype=torch.float32, device="cpu")
        if rows is not None:
            factor *= rows[:, None]
        if columns is not None:
            factor *= columns
        self._factors[parameter] = factor.reshape(*factor.shape, *[1] * (len(shape) - 2))

    def _block(self, block: Block, module: nn.Module, is_first: bool = False) -> TrainedBlock:
        outputs, inputs = block.mask.shape
        norm = module.norm
        assert isinstance(module.conv, nn.Module)
        assert isinstance(norm, nn.Module)
        parameter = self._place(module.conv.weight)
        self._multiply(parameter, block.unit, block.back)
        gamma = None if norm.weight is None else self._place(norm.weight)
        beta = None if norm.bias is None else self._place(norm.bias)
        conv = turned = direct = turned_direct = None
        if block.stride == (1, 1, 1):
            layout, back = lay_out_conv(block.mask), lay_out_conv(block.mask.T)
            sizes = POINTS * len(layout.places), POINTS * len(back.places)
            memory = np.empty(max(sizes), np.float32)
            # The backward pass computes the first map of the network once more
            other = np.empty(sizes[1], np.float32) if is_first else memory
            conv = self._kernels(parameter, layout, layout.places, memory)
            # The place (in, out) of a connection from outputs to inputs, as a place (out, in)
            places = torch.where(back.places < 0, -1, back.places % outputs * inputs + back.places // outputs)
            turned = self._kernels(parameter, back, places, other, turned=True)
            dots = self._dense_places(block.mask) if layout.dense else layout.places
        else:
            taps = torch.arange(outputs * inputs * TAPS).reshape(outputs, inputs, TAPS)
            direct = self._array(parameter, grouped_places(taps.transpose(1, 2)))
            turned_direct = self._array(parameter, _turned_taps(taps, block.stride))
            full = torch.ones_like(block.mask)
            dots = torch.cat([_times(self._dense_places(full), TAPS, tap) for tap in range(TAPS)])
        return TrainedBlock(
            conv=conv,
            direct=direct,
            stride=block.stride,
            shift=np.array(block.shift, np.int32),
            norm=self._norm(block, gamma, beta),
            inputs=inputs,
            outputs=outputs,
            turned=turned,
            turned_direct=turned_direct,
            places=_lines(dots),
            parameter=parameter,
            gamma=gamma,
            beta=beta,
        )

    def _dense_places(self, mask: Tensor) -> Tensor:
        """Places of the sums over tiles, one for each pair of an output and an input, in the blocks of the kernels.

        A connection that is off, and the padding of a block, have the place -1.
        """
        rows, columns = self.core.dot_shape
        outputs, inputs = mask.shape
        places = torch.where(mask, torch.arange(mask.numel()).reshape(mask.shape), -1)
        padded = places.new_full((-(-outputs // rows) * rows, -(-inputs // columns) * columns), -1)
        padded[:outputs, :inputs] = places
        blocks: Tensor = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten()
        return blocks

    def _node(self, node: Node, module: nn.Module) -> TrainedNode:
        assert isinstance(module.upsample, nn.Module)
        assert isinstance(module.blocks, nn.Module)
        parameter = self._place(module.upsample.weight)
        self._multiply(parameter, None, node.up_unit)
        depth, subs = node.up_stride[0], node.up_stride[1] * node.up_stride[2]
        places = torch.arange(node.up_weight.numel()).reshape(*node.up_mask.shape, depth, subs)
        coarse, output = node.up_mask.nonzero(as_tuple=True)  # by coarse map
        output_of, coarse_of = node.up_mask.T.nonzero(as_tuple=True)  # by output
        active = places[coarse_of, output_of]  # (connection, depth, sub)
        upsample = self._upsample(parameter, active.transpose(0, 1), node.up_mask.T, coarse_of)
        turned = self._upsample(parameter, places[coarse, output].flatten(1).T, node.up_mask, output)
        return TrainedNode(
            upsample=upsample,
            up_stride=node.up_stride,
            pool_stride=node.pool_stride,
            blocks=[self._block(b, m) for b, m in zip(node.blocks, module.blocks.children(), strict=True)],
            turned=turned,
            places=np.ascontiguousarray(active.flatten(1).T, np.int32),
            parameter=parameter,
        )

    def _upsample(self, parameter: int, places: Tensor, mask: Tensor, index: Tensor) -> UpsampleWeights:
        """``mask`` is (to, from), ``index`` says where each connection comes from."""
        start = np.zeros(len(mask) + 1, np.int32)
        np.cumsum(mask.sum(1).numpy(), out=start[1:])
        order = np.arange(len(mask), dtype=np.int32)
        return UpsampleWeights(self._array(parameter, places), start, order, index.numpy().astype(np.uint16))

    def _head(self, head: nn.Module) -> tuple[tuple[Floats, Floats | None, int], TrainedHead]:
        assert isinstance(head.weight, Tensor)
        parameter = self._place(head.weight)
        bias = None if head.bias is None else self._place(head.bias)
        classes, inputs = head.weight.shape[:2]
        places = torch.arange(classes * inputs).reshape(classes, inputs)
        weight = self._array(parameter, grouped_places(places[:, None]))
        offset = None if bias is None else self._array(bias, np.arange(classes, dtype=np.int32))
        turned = self._array(parameter, grouped_places(places.T[:, None]))
        dots = self._dense_places(torch.ones(classes, inputs, dtype=torch.bool))
        return (weight, offset, classes), TrainedHead(turned, _lines(dots), parameter, bias)


def _places_by_name(network: E2ENet) -> dict[str, int]:
    """The place of each parameter among those of the network; one that layers share has several names."""
    places = {id(parameter): k for k, parameter in enumerate(network.parameters())}
    return {name: places[id(parameter)] for name, parameter in network.named_parameters(remove_duplicate=False)}


def _turned_taps(taps: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Places of the weights that reach each position in the stride's window, as direct_gradient.cpp reads them."""
    found = []
    for a in range(stride[1]):
        for b in range(stride[2]):
            rows = [t for t in range(3) if (a + 1 - t) % stride[1] == 0]
            columns = [t for t in range(3) if (b + 1 - t) % stride[2] == 0]
            some = taps[:, :, [3 * row + column for row in rows for column in columns]]
            found.append(grouped_places(some.permute(1, 2, 0)).flatten())
    return torch.cat(found)


def _times(places: Tensor, factor: int, offset: int) -> Tensor:
    return torch.where(places < 0, -1, places * factor + offset)


def _lines(places: Tensor) -> Ints:
    """The places, padded with -1 to whole cache lines, in which sums are stored."""
    padded = np.full(-(-len(places) // LINE) * LINE, -1, np.int32)
    padded[: len(places)] = places.numpy()
    return padded
