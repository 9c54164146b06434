"""The state of a network without inactive weights, and back.

A maskable layer is stored as the kernels of its active connections, in the order of the mask, and the mask as bits. Other
tensors are stored as they are. Connections explored in training are not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, maskable_layers

Arrays = dict[str, NDArray[Any]]
Declared = tuple[np.dtype[Any], tuple[int, ...]]

LARGEST_EXPANSION = 1000  # of a file to its network in memory; more would be a sparsity of 0.999

_SHIFT_SIZE = "_extra_state"


def stored_names(network: E2ENet) -> list[str]:
    """Names in the state of a network that are stored."""
    return [name for name in network.state_dict() if name != _SHIFT_SIZE and not name.endswith(".explored")]


def pack(state: Mapping[str, Tensor], network: E2ENet) -> Arrays:
    """Arrays of the names in ``stored_names``.

    Args:
        state: as ``network.state_dict()``, on the CPU.
        network: of that state; its values are not looked at and may be on the meta device.

    Raises:
        E2ENetError: ``state`` is not of this network, or holds weights that are not finite.
    """
    for name, value in network.state_dict().items():
        if name not in state or state[name].shape != value.shape or state[name].dtype != value.dtype:
            raise E2ENetError(f"{name} is missing in the weights, or is not {value.dtype} of shape {list(value.shape)}")
        if not torch.isfinite(state[name]).all():
            raise E2ENetError(f"{name} holds weights that are not finite: the training had diverged")
    if int(state[_SHIFT_SIZE]) != int(network.get_extra_state()):
        raise E2ENetError(
            f"the weights are of shift size {int(state[_SHIFT_SIZE])}, the plans of {int(network.get_extra_state())}"
        )
    arrays: Arrays = {name: state[name].numpy() for name in stored_names(network)}
    for name, _ in maskable_layers(network):
        mask = arrays[f"{name}.mask"]
        arrays[f"{name}.weight"] = arrays[f"{name}.weight"][mask]
        arrays[f"{name}.mask"] = np.packbits(mask)
    return arrays


def check_declared(declared: Mapping[str, Declared], network: E2ENet) -> None:
    """Raises E2ENetError unless arrays of these types and shapes, whose numbers are not looked at, can be of this network.

    Args:
        declared: type and shape of each array, by its name.
        network: may be on the meta device.
    """
    state = network.state_dict()
    wrong = sorted(set(declared) ^ set(stored_names(network)))
    if wrong:
        raise E2ENetError(f"{wrong[0]} and {len(wrong) - 1} more are missing, or not part of the network in its plans")
    expected = {name: (torch.zeros(0, dtype=state[name].dtype).numpy().dtype, tuple(state[name].shape)) for name in declared}
    for name, _ in maskable_layers(network):
        connections = state[f"{name}.mask"].numel()
        expected[f"{name}.mask"] = np.dtype(np.uint8), (-(-connections // 8),)
        kernels = min([connections, *declared[f"{name}.weight"][1][:1]])  # as many as are active
        expected[f"{name}.weight"] = np.dtype(np.float32), (kernels, *state[f"{name}.weight"].shape[2:])
    for name, (dtype, shape) in declared.items():
        if (dtype, shape) != expected[name]:
            right = expected[name]
            raise E2ENetError(f"{name} is {dtype} of shape {list(shape)}, not {right[0]} of shape {list(right[1])}")
    stored = sum(prod(shape) * dtype.itemsize for dtype, shape in declared.values())
    dense = sum(value.nbytes for value in state.values())
    if dense > LARGEST_EXPANSION * stored:
        raise E2ENetError(f"{stored} bytes of weights stand for a network of {dense} bytes")


def unpack(arrays: Mapping[str, NDArray[Any]], network: E2ENet) -> dict[str, Tensor]:
    """The state for ``network.load_state_dict``; inactive connections get the weight zero.

    Raises:
        E2ENetError: ``arrays`` is not of this network.
    """
    check_declared({name: (array.dtype, array.shape) for name, array in arrays.items()}, network)
    template = network.state_dict()
    state = {_SHIFT_SIZE: network.get_extra_state()}
    for name, _ in maskable_layers(network):
        mask = _unpack_mask(name, arrays[f"{name}.mask"], template[f"{name}.mask"].shape)
        state[f"{name}.mask"] = state[f"{name}.explored"] = torch.from_numpy(mask)
        kernels = arrays[f"{name}.weight"]
        if len(kernels) != mask.sum():
            raise E2ENetError(f"{name}.weight holds {len(kernels)} kernels, but its mask has {mask.sum()} connections")
        weight = torch.zeros(template[f"{name}.weight"].shape)
        weight[state[f"{name}.mask"]] = torch.from_numpy(kernels.copy())
        state[f"{name}.weight"] = weight
    for name in template.keys() - state.keys():
        state[name] = torch.from_numpy(arrays[name].copy())
    return state


def _unpack_mask(name: str, packed: NDArray[np.uint8], shape: torch.Size) -> NDArray[np.bool_]:
    mask = np.unpackbits(packed, count=shape.numel()).astype(bool)
    if not np.array_equal(np.packbits(mask), packed):
        raise E2ENetError(f"{name}.mask has more bits than connections")
    return mask.reshape(shape)
