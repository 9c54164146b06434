"""Costs of a network: parameters, multiply-accumulates, feature maps, bytes kept for backward.

All costs but the parameters are counted by running the network on the meta device, where tensors have shapes and no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_e2enet.network.connections import maskable_layers


class ParameterCounts(NamedTuple):
    """``total`` of the dense network, ``maskable`` of them, and ``active``: those in use, maskable or not."""

    total: int
    maskable: int
    active: int


class MultiplyAccumulates(NamedTuple):
    """``total`` of the dense network, ``maskable`` of them, and ``active``: those of active connections and dense layers."""

    total: int
    maskable: int
    active: int


def parameter_counts(network: nn.Module) -> ParameterCounts:
    """Count the parameters of a network."""
    layers = [layer for _, layer in maskable_layers(network)]
    maskable = sum(layer.shape.numel() for layer in layers)
    total = maskable + sum(p.numel() for p in network.parameters()) - sum(layer.weight.numel() for layer in layers)
    off = sum((layer.n_connections - layer.n_active) * layer.weights_per_connection for layer in layers)
    return ParameterCounts(total, maskable, total - off)


def multiply_accumulates(network: nn.Module, input_shape: Sequence[int]) -> MultiplyAccumulates:
    """Count those of a prediction with ``torch.utils.flop_counter``, where one multiply-accumulate is two operations."""
    training = network.training
    network.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run_on_meta(network, input_shape)
    finally:
        network.train(training)
    by_module = counter.get_flop_counts()
    root = type(network).__name__
    names = {module: name for name, module in network.named_modules(remove_duplicate=False) if f"{root}.{name}" in by_module}
    maskable = off = 0
    for _, layer in maskable_layers(network):  # which nnU-Net's networks hold under two names
        macs = sum(by_module[f"{root}.{names[layer]}"].values()) // 2 if layer in names else 0  # of a layer that never runs
        maskable += macs
        off += macs // layer.n_connections * (layer.n_connections - layer.n_active)
    total = counter.get_total_flops() // 2
    return MultiplyAccumulates(total, maskable, total - off)


def conv_output_elements(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Elements of the outputs of all convolutions in a forward pass; counted on shapes alone."""
    elements = 0

    def count(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    handles = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, _ConvNd)]
    try:
        with torch.no_grad():
            run_on_meta(network, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    return elements


def saved_bytes(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Bytes of the distinct tensors that autograd saves for backward, without the parameters themselves."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address may come back as another's

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        parameters = {name: p.detach().to("meta").requires_grad_() for name, p in network.named_parameters()}
        kept = run_on_meta(network, input_shape, parameters)
    del kept
    own = {p.untyped_storage()._cdata for p in parameters.values()}
    return sum(size for key, size in sizes.items() if key not in own)


def run_on_meta(
    network: nn.Module, input_shape: Sequence[int], parameters: dict[str, Tensor] | None = None
) -> Tensor | list[Tensor]:
    """Run on the meta device; the outputs have shapes and no values.

    ``parameters``, meta tensors, stand in the place of the network's own.
    """
    if parameters is None:
        parameters = {name: p.detach().to("meta") for name, p in network.named_parameters()}
    buffers = {name: b.to("meta") for name, b in network.named_buffers()}
    x = torch.empty(tuple(input_shape), device="meta", dtype=next(iter(parameters.values())).dtype)
    # nnU-Net's networks hold modules under two names, and tied weights would be put back wrongly there
    outputs: Tensor | list[Tensor] = functional_call(network, {**parameters, **buffers}, (x,), tie_weights=False)
    return outputs
