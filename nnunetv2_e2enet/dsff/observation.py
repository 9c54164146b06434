"""Observations of the network for criteria: gradients of all connections, deviations of input maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.connections import MaskableLayer


@contextmanager
def observed(layers: Sequence[MaskableLayer], *, dense_gradients: bool, input_deviations: bool) -> Iterator[None]:
    """A context in which one forward and backward pass collects the observations that criteria ask for.

    At the end of the context, observations become their mean over all processes of a distributed training.

    Args:
        layers: of the network, which is not wrapped.
        dense_gradients: let ``weight.grad`` hold the gradient of inactive connections too.
        input_deviations: set ``input_deviation`` of each layer.

    Raises:
        E2ENetError: gradients of all connections are wanted of a layer that stores active weights alone.
    """
    with ExitStack() as stack:
        for layer in layers:
            if dense_gradients:
                if layer.stores_active_only:
                    raise E2ENetError(
                        "a layer that stores its active weights alone has no gradients of all connections: use RandomGrowth, "
                        "or leave out store_active_only"
                    )
                layer.dense_gradients = True
                stack.callback(setattr, layer, "dense_gradients", False)
            if input_deviations:
                stack.callback(layer.register_forward_pre_hook(_measure_input).remove)
        yield
    if distributed.is_available() and distributed.is_initialized():
        _average(layers, dense_gradients, input_deviations)


def finite(layers: Sequence[MaskableLayer], *, dense_gradients: bool, input_deviations: bool) -> bool:
    """Whether all observations are finite; after an overflow of half precision they are not."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in _observations(layers, dense_gradients, input_deviations))


@torch.no_grad()
def _measure_input(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    maps = inputs[0].detach().transpose(0, 1).flatten(1)
    layer.input_deviation = torch.stack([m.float().std(correction=0) for m in maps])


def _observations(layers: Sequence[MaskableLayer], dense_gradients: bool, input_deviations: bool) -> Iterator[Tensor]:
    for layer in layers:
        if dense_gradients and layer.weight.grad is not None:
            yield layer.weight.grad
        if input_deviations and layer.input_deviation is not None:
            yield layer.input_deviation


def _average(layers: Sequence[MaskableLayer], dense_gradients: bool, input_deviations: bool) -> None:
    for tensor in _observations(layers, dense_gradients, input_deviations):
        distributed.all_reduce(tensor)
        tensor.div_(distributed.get_world_size())
