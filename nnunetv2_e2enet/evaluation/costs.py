"""Counted costs of a network: parameters and multiply-accumulates, stored, active, executed; by level and flow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.network import E2ENet, MaskableLayer, accounts, fusion_flows, fusion_nodes


@dataclass(frozen=True)
class Costs:
    """Of one network and one patch.

    Attributes:
        parameters_stored: in memory and in checkpoints.
        parameters_active: of these, the ones in use with the present topology.
        macs_dense: multiply-accumulates of all connections.
        macs_active: of the active connections and the dense layers.
        macs_executed: products with weights that the predicting program computes.
    """

    parameters_stored: int
    parameters_active: int
    macs_dense: int
    macs_active: int
    macs_executed: int


def count_costs(network: nn.Module, input_shape: Sequence[int], by_engine: bool = False) -> Costs:
    """Count parameters and multiply-accumulates on shapes alone; nothing is computed.

    Args:
        network: any network, on any device.
        input_shape: batch (of 1), channels, and the patch.
        by_engine: whether an E2ENet is predicted by the CPU engine, not by PyTorch.
    """
    parameters = accounts.parameter_counts(network)
    macs = accounts.multiply_accumulates(network, input_shape)
    executed = macs.total  # PyTorch multiplies masked weights like any others
    if by_engine and isinstance(network, E2ENet):
        executed = engine.executed_macs(network, input_shape[2:])
    return Costs(parameters.total, parameters.active, macs.total, macs.active, executed)


@dataclass(frozen=True)
class Share:
    """Costs of one flow of one level. Fields as in ``Costs``; biases and norms are a flow of their own."""

    level: int
    flow: str
    parameters_stored: int
    parameters_active: int
    macs_dense: int
    macs_active: int


FLOWS = ("encoder", "forward", "upward", "downward", "second block", "decoder", "upsampling", "head", "norm, bias")
_PLACES = (  # of modules outside fusion nodes
    (re.compile(r"encoder\.stages\.(?P<level>\d+)\."), "encoder"),
    (re.compile(r"encoder\.(?P<stem>stem)\."), "encoder"),
    (re.compile(r"decoder\.stages\.(?P<reversed>\d+)\."), "decoder"),
    (re.compile(r"decoder\.transpconvs\.(?P<reversed>\d+)$"), "upsampling"),
    (re.compile(r"decoder\.seg_layers\.(?P<reversed>\d+)$"), "head"),
)


def breakdown(network: nn.Module, input_shape: Sequence[int]) -> list[Share]:
    """The costs of E2ENet or one of nnU-Net's U-Nets by level (0 is the finest) and flow.

    A fusion node's first convolution works on three flows at once; its costs are divided by the channels that each flow
    brings, and by the connections that are active among them. Modules of an unknown kind are at level -1, flow "other".
    """
    macs = accounts.macs_by_module(network, input_shape)
    flows_of = fusion_flows(network)
    totals: defaultdict[tuple[int, str], NDArray[np.int64]] = defaultdict(lambda: np.zeros(4, np.int64))
    for name, module in network.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if not own:
            continue
        level, flow = _place(name, network)
        if not isinstance(module, _ConvNd):
            totals[level, "norm, bias"] += [own, own, 0, 0]
            continue
        bias = 0 if module.bias is None else module.bias.numel()
        totals[level, "norm, bias"] += [bias, bias, 0, 0]
        parts = _parts(module, flow, flows_of.get(name, {}))
        weights_each = module.weight[0, 0].numel()
        macs_each = macs[module] // sum(connections for _, connections, _ in parts)
        for part, connections, active in parts:
            both = np.array([connections, active])
            totals[level, part] += np.concatenate([both * weights_each, both * macs_each])
    order = {flow: i for i, flow in enumerate(FLOWS)}
    keys = sorted(totals, key=lambda key: (key[0], order.get(key[1], len(order))))
    return [Share(level, flow, *totals[level, flow].tolist()) for level, flow in keys if totals[level, flow].any()]


def _place(name: str, network: nn.Module) -> tuple[int, str]:
    for prefix, node in fusion_nodes(network).items():
        if name.startswith(f"{prefix}."):
            part = name.removeprefix(f"{prefix}.")
            return node.level, "upward" if part == "upsample" else "node" if part.startswith("blocks.0.") else "second block"
    encoder = getattr(network, "encoder", None)
    levels = len(getattr(encoder, "stages", ()))
    for pattern, flow in _PLACES:
        found = pattern.match(name)
        if not found:
            continue
        groups = found.groupdict()
        if "stem" in groups:
            return 0, flow
        if "reversed" not in groups:
            return int(groups["level"]), flow
        finest = len(network.decoder.seg_layers) - 1 if isinstance(network, E2ENet) else levels - 2
        return finest - int(groups["reversed"]), flow
    return -1, "other"


def _parts(module: _ConvNd, flow: str, flows: Mapping[str, slice]) -> list[tuple[str, int, int]]:
    """Flow, connections, active connections of a convolution."""
    if not isinstance(module, MaskableLayer):
        n = module.weight.shape[:2].numel()
        return [(flow, n, n)]
    if not flows:
        return [(flow, module.n_connections, module.n_active)]
    pieces = {name: module.mask[:, channels] for name, channels in flows.items()}
    return [(name, mask.numel(), int(mask.sum())) for name, mask in pieces.items()]
