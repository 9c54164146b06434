"""Counted costs of a network: parameters and multiply-accumulates, stored, active, executed; by level and flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
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


FLOWS = ("encoder", "forward", "upward", "downward", "second block", "decoder", "upsampling", "head", "norm, bias", "other")
SHARED = ["parameters_stored", "parameters_active", "macs_dense", "macs_active"]
"""Fields of ``Costs`` that are divided between levels and flows."""


def breakdown(network: nn.Module, input_shape: Sequence[int]) -> pd.DataFrame:
    """The costs of E2ENet or one of nnU-Net's U-Nets by level (0 is the finest) and flow; biases and norms are a flow.

    A fusion node's first convolution works on three flows at once; its costs are divided by the channels that each flow
    brings, and by the connections that are active among them. Modules of an unknown kind are at level -1, flow "other".

    Returns:
        The columns ``level``, ``flow`` and ``SHARED``.
    """
    macs = accounts.macs_by_module(network, input_shape)
    flows_of = fusion_flows(network)
    places = _places(network)
    rows: list[tuple[int, str, int, int, int, int]] = []
    for name, module in network.named_modules():
        level, flow = places.get(module, (-1, "other"))
        convolution = isinstance(module, _ConvNd)
        own = sum(p.numel() for p in module.parameters(recurse=False) if not (convolution and p is module.weight))
        rows.append((level, "norm, bias", own, own, 0, 0))
        if convolution:
            parts = _parts(module, flow, flows_of.get(name, {}))
            weights_each = module.weight[0, 0].numel()
            macs_each = macs[module] // sum(connections for _, connections, _ in parts)
            for part, n, active in parts:
                rows.append((level, part, n * weights_each, active * weights_each, n * macs_each, active * macs_each))
    shares = pd.DataFrame(rows, columns=["level", "flow", *SHARED]).astype({"flow": pd.CategoricalDtype(FLOWS)})
    sums = shares.groupby(["level", "flow"], observed=True).sum()
    return sums[sums.any(axis=1)].reset_index()


def _places(network: nn.Module) -> dict[nn.Module, tuple[int, str]]:
    """Level and flow of each module, ``node`` for the first block of a fusion node; what comes later in the list counts."""
    encoder, decoder = getattr(network, "encoder", None), getattr(network, "decoder", None)
    found = [(getattr(encoder, "stem", None), 0, "encoder")]
    found += [(stage, level, "encoder") for level, stage in enumerate(getattr(encoder, "stages", ()))]
    for name, flow in (("stages", "decoder"), ("transpconvs", "upsampling"), ("seg_layers", "head")):
        found += [(module, level, flow) for level, module in enumerate(reversed(getattr(decoder, name, ())))]
    for node in fusion_nodes(network).values():
        found += [
            (node, node.level, "second block"),
            (node.blocks[0], node.level, "node"),
            (node.upsample, node.level, "upward"),
        ]
    return {module: (level, flow) for part, level, flow in found if part is not None for module in part.modules()}


def _parts(module: _ConvNd, flow: str, flows: Mapping[str, slice]) -> list[tuple[str, int, int]]:
    """Flow, connections, active connections of a convolution."""
    if not isinstance(module, MaskableLayer):
        n = module.weight.shape[:2].numel()
        return [(flow, n, n)]
    if not flows:
        return [(flow, module.n_connections, module.n_active)]
    pieces = {name: module.mask[:, channels] for name, channels in flows.items()}
    return [(name, mask.numel(), int(mask.sum())) for name, mask in pieces.items()]
