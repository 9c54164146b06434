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


class Counts(NamedTuple):
    """``total`` of the dense network, ``maskable`` of them, and ``active``: those of active connections and dense layers."""

    total: int
    maskable: int
    active: int


def parameter_counts(network: nn.Module) -> Counts:
    """Count the parameters of a network."""
    layers = [layer for _, layer in maskable_layers(network)]
    maskable = sum(layer.shape.numel() for layer in layers)
    total = maskable + sum(p.numel() for p in network.parameters()) - sum(layer.weight.numel() for layer in layers)
    off = sum((layer.n_connections - layer.n_active) * layer.weights_per_connection for layer in layers)
    return Counts(total, maskable, total - off)


def multiply_accumulates(network: nn.Module, input_shape: Sequence[int]) -> Counts:
    """Count those of a prediction's convolutions; ``input_shape`` is ``(batch, channels, *patch)``."""
    macs = macs_by_module(network, input_shape)
    layers = [layer for _, layer in maskable_layers(network)]
    off = sum(macs[layer] // layer.n_connections * (layer.n_connections - layer.n_active) for layer in layers)
    return Counts(macs[network], sum(macs[layer] for layer in layers), macs[network] - off)


def macs_by_module(network: nn.Module, input_shape: Sequence[int]) -> dict[nn.Module, int]:
    """Multiply-accumulates of each module in a prediction, those of the modules within included.

    ``torch.utils.flop_counter`` counts them; one is two operations. Of a module that nnU-Net's networks hold under two names,
    the counter knows one.
    """
    training = network.training
    network.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run_on_meta(network, input_shape)
    finally:
        network.train(training)
    operations = counter.get_flop_counts()
    root = type(network).__name__
    macs: dict[nn.Module, int] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        found = operations.get(f"{root}.{name}" if name else "Global", {})
        macs[module] = max(sum(found.values()) // 2, macs.get(module, 0))
    return macs


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
