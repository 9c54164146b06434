"""Bytes that a compiled step moves on a GPU, as benchmarks/gpu_bytes.py counts them without one."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
from torch import nn

from nnunetv2_e2enet.network import E2ENet, maskable_layers, store_active_only
from nnunetv2_e2enet.network.acceleration import prepare_kernels
from nnunetv2_e2enet.network.sparse_convolution import sparse_convolution
from nnunetv2_e2enet.settings import override

pytest.importorskip("triton", reason="needs Triton: pip install '.[kernels]'")
if torch.cuda.is_available():
    pytest.skip("counts are made where there is no GPU", allow_module_level=True)

import gpu_bytes

CHANNELS = [16, 32]
SIZES = [(8, 16, 16), (8, 8, 8)]
HALF = 2  # bytes of a voxel in mixed precision


@cache
def count(kernels: str, channels_last: bool = False, levels: int = 2, active_only: bool = False) -> gpu_bytes.Step:
    torch.manual_seed(0)
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]][:levels]
    with override(kernels=kernels):
        network = E2ENet(1, 2, levels, [*CHANNELS, 48][:levels], nn.Conv3d, strides, deep_supervision=False)
        if active_only:
            for _, layer in maskable_layers(network):
                layer.share_inputs(16, equal_blocks=True)
                layer.set_random_topology(layer.connections_at(0.5))
                store_active_only(layer)
        if channels_last:
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        prepare_kernels(torch.device("cpu"))
        step = gpu_bytes.count_step(network, torch.empty(1, 1, *SIZES[0], device="meta"))
    prepare_kernels(torch.device("cpu"))
    return step


def of_kind(moves: list[gpu_bytes.Moved], kind: str) -> int:
    return sum(m.bytes for m in moves if m.kind == kind)


@pytest.mark.parametrize("channels_last", [False, True])
def test_our_passes_read_and_write_each_map_once(channels_last: bool) -> None:
    """By hand: the network of two levels has two blocks in each encoder level and two in its only node."""
    step = count("on", channels_last)
    fine, coarse = (HALF * c * prod(size) for c, size in zip(CHANNELS, SIZES, strict=True))
    small = 0.05  # what belongs to channels, not voxels
    assert of_kind(step["forward"], "statistics") == pytest.approx(4 * fine + 2 * coarse, rel=small)
    # read and written: between the blocks of both levels, into the coarse one; into the transposed convolution; the node's two
    # flows; between its blocks; into the head
    joined = 2 * (fine + fine + coarse + coarse + 2 * fine + fine + fine)
    assert of_kind(step["forward"], "join") == pytest.approx(joined, rel=small)
    assert of_kind(step["backward"], "norm_gradient") == pytest.approx(5 * (4 * fine + 2 * coarse), rel=small)
    fused = of_kind(step["forward"], "fused")
    weights = sum(p.numel() for p in E2ENet(1, 2, 2, CHANNELS, nn.Conv3d, [[1, 1, 1], [1, 2, 2]]).parameters())
    assert fused < 12 * weights + 8 * prod(SIZES[0])  # masks and casts of weights, and the image


def test_convolutions_of_active_blocks_read_maps_as_they_are() -> None:
    """By hand: between the blocks of both levels, into the coarse one, into the head; nothing is written for a node."""
    step = count("on", active_only=True)
    fine, coarse = (HALF * c * prod(size) for c, size in zip(CHANNELS, SIZES, strict=True))
    small = 0.05
    assert of_kind(step["forward"], "join") == pytest.approx(2 * (fine + coarse + fine + fine), rel=small)
    assert of_kind(step["backward"], "join") == pytest.approx(2 * (fine + coarse + fine + fine), rel=small)
    assert of_kind(step["backward"], "separate") == pytest.approx(2 * (fine + coarse + fine), rel=small)


def test_passes_of_pytorch_move_more() -> None:
    ours, theirs = (gpu_bytes.summary(count(kernels)) for kernels in ("on", "off"))
    for direction in ("forward", "backward"):
        assert ours[direction]["bytes"] < 0.75 * theirs[direction]["bytes"]


@pytest.mark.parametrize("active_only", [False, True])
def test_channels_last_survives_the_compiler(active_only: bool) -> None:
    """In the lowered graphs every convolution and every operator reads maps whose channels come last, with one exception: the
    gradient from which the weights of the first convolution, which reads an image of one channel, are computed.
    """
    last, first = (
        [m for moves in count("on", channels_last, 3, active_only).values() for m in moves if m.channels_last]
        for channels_last in (True, False)
    )
    assert {m.kind for m in last} == {
        "convolution",
        "statistics",
        "join",
        "separate",
        "norm_gradient",
        "pool",
        "pool_gradient",
    }
    (exception,) = (m for m in last if not all(m.channels_last))
    assert exception.kind == "convolution"
    assert exception.bytes == pytest.approx(HALF * (CHANNELS[0] + 1) * prod(SIZES[0]), rel=0.05)
    assert len(last) == len(first)
    assert not any(any(moved.channels_last) for moved in first)


def test_the_sums_of_a_sparse_gradient_are_counted() -> None:
    """By hand: 2 blocks of 8 input maps each add to 32 maps in float32."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32, 8, 1, 3, 3))
            self.register_buffer("inputs", torch.zeros(2, 8, dtype=torch.int64))
            self.scale = nn.Parameter(torch.zeros(32, 1, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sparse_convolution([x * self.scale], 1, self.weight, None, self.inputs, (1, 1, 1))

    with override(kernels="on"):
        prepare_kernels(torch.device("cpu"))
        step = gpu_bytes.count_step(Sparse(), torch.empty(1, 32, 4, 8, 8, device="meta"))
    prepare_kernels(torch.device("cpu"))
    (found,) = (m.bytes for m in step["backward"] if m.launches == 3)
    voxels = 4 * 8 * 8
    zeros, blocks, cast = 4 * 32 * voxels, 2 * 8 * (4 + 4) * voxels, (4 + HALF) * 32 * voxels
    small = HALF * 32 * 8 * 9 + 8 * 2 * 8  # weights and numbers of maps
    assert found == HALF * 32 * voxels + small + zeros + blocks + cast


def test_tables_add_up_both_passes() -> None:
    passes = {
        "forward": {"bytes": 2**30, "convolution_bytes": 5 * 2**30},
        "backward": {"bytes": 2**31, "convolution_bytes": 0},
    }
    without, of_convolutions = gpu_bytes.tables({"AMOS": {"nnU-Net": passes, "E2ENet": passes}}, 2)
    assert without.values == {"nnU-Net": [3.0], "E2ENet": [3.0]}
    assert of_convolutions.values["E2ENet"] == [5.0]
    assert without.title.startswith("AMOS, batch 2, float16")
