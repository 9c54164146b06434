"""Whether the kernels compute on a device what PyTorch does: asked once a process, before they are used.

Convolutions and max-pooling of PyTorch are computed on the CPU in float64. Convolutions of cuDNN round float32 to TF32, which
is less than the check wants to see, and max-pooling has no deterministic backward pass on CUDA.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_e2enet.kernels import operators, pooling, sparse
from nnunetv2_e2enet.network import _raw_map as raw_map
from nnunetv2_e2enet.network.depth_shift import join, separate
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2}
"""By the dtypes of maps in nnU-Net's trainings, of values of about 1."""


Results = dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]]
"""By name of a kernel: what it computes, and what PyTorch does."""


def wrong_kernel(device: torch.device) -> str | None:
    """The name of the first pass over maps that differs from PyTorch on small maps of a dtype and memory format.

    None if all agree. The maps are of several tiles of a program, in voxels and channels. Convolutions are not looked at.
    """
    return _first_wrong(device, _passes)


def wrong_convolution(device: torch.device) -> str | None:
    """As ``wrong_kernel``, of the convolutions of active connections, whose programs take a minute or two to compile."""
    return _first_wrong(device, _sparse_convolutions)


def _first_wrong(
    device: torch.device, results: Callable[[torch.device, torch.dtype, torch.memory_format], Results]
) -> str | None:
    # nnU-Net's predictor loads weights where there are no gradients; and a network may be made with another default device
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        for dtype, form in itertools.product(TOLERANCES, (torch.contiguous_format, CHANNELS_LAST[3])):
            for name, (found, expected) in results(device, dtype, form).items():
                if not all(_is_close(f, e, TOLERANCES[dtype]) for f, e in zip(found, expected, strict=True)):
                    return name
    return None


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    found, expected = _exact(found), _exact(expected)
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


def _exact(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _sparse_convolutions(device: torch.device, dtype: torch.dtype, form: torch.memory_format) -> Results:
    raw, plain = (
        _random(2, width, 3, 5, 5, seed=width).to(device, dtype).contiguous(memory_format=form) for width in (29, 21)
    )
    mean, rstd = raw_map.statistics(raw, 1e-5)
    scale, offset = (t.reshape(*raw.shape[:2], 1, 1, 1) for t in (rstd, -mean * rstd))
    maps: list[raw_map.FeatureMap] = [raw_map.RawMap(raw, scale, offset, 0.01), plain]
    return _convolutions_of(maps, transposed=False) | _convolutions_of([torch.cat([raw, plain], dim=1)], transposed=True)


def _convolutions_of(maps: Sequence[raw_map.FeatureMap], transposed: bool) -> Results:
    """Two blocks of 16 output maps over 40 of 50 input maps each, more than a product takes at once."""
    kernel, stride, shift_size = ([1, 2, 2], [1, 2, 2], 1) if transposed else ([1, 3, 3], [1, 1, 1], 3)
    values = [raw_map.values_of(m) for m in maps]
    weight = _random(32, 40, *kernel, seed=1).to(values[0])
    inputs = torch.stack([_random(50, seed=seed).argsort()[:40].sort().values for seed in (2, 3)])
    joined = _exact(join(maps, shift_size))
    gathered = torch.cat([joined[:, block] for block in inputs], dim=1).requires_grad_()
    dense = _exact(weight).requires_grad_()
    if transposed:
        by_input = dense.unflatten(0, (2, 16)).transpose(1, 2).flatten(0, 1)
        expected = F.conv_transpose3d(gathered, by_input, None, stride, groups=2)
    else:
        expected = F.conv3d(gathered, dense, padding=(0, 1, 1), groups=2)
    grad = expected.detach().to(values[0])
    of_gathered, of_weight = torch.autograd.grad(expected, (gathered, dense), _exact(grad))
    of_joined = torch.zeros_like(joined).index_add(1, inputs.flatten(), of_gathered)
    of_maps = separate(of_joined, [v.shape[1] for v in values], shift_size)
    (tensors, slopes), inputs, options = raw_map.flatten(maps), inputs.to(weight.device), (stride, transposed)
    kind = "transposed " if transposed else ""
    return {
        f"{kind}convolve": ([sparse.convolve(tensors, slopes, shift_size, weight, inputs, *options)], [expected]),
        f"{kind}input_gradient": (sparse.input_gradient(grad, weight, inputs, values, shift_size, *options), of_maps),
        f"{kind}weight_gradient": (
            [sparse.weight_gradient(grad, tensors, slopes, shift_size, inputs, kernel, *options)],
            [of_weight],
        ),
    }


def _passes(device: torch.device, dtype: torch.dtype, form: torch.memory_format) -> Results:
    # a tile has one channel of 1024 voxels, or where channels come last 64 of 64 voxels
    widths, size = ([3, 1], (3, 14, 25)) if form == torch.contiguous_format else ([70, 4], (3, 5, 6))
    x, other, grad = (
        _random(2, width, *size, seed=width).to(device, dtype).contiguous(memory_format=form)
        for width in (*widths, sum(widths))
    )
    mean, rstd = raw_map.statistics(x, 1e-5)
    scale, offset = (t.reshape(*x.shape[:2], 1, 1, 1) for t in (rstd, -mean * rstd))
    maps: list[raw_map.FeatureMap] = [raw_map.RawMap(x, scale, offset, 0.01), other]
    of_norm = (grad[:, : widths[0]], x, mean, rstd, scale, offset, 0.01)
    stride = [1, 2, 2]
    activation = _exact(x).requires_grad_()
    expected = F.max_pool3d(activation, stride)
    (unpooled,) = torch.autograd.grad(expected, activation, expected)
    found, index = pooling.pool([x], None, stride)
    raw, _ = pooling.pool([x, scale, offset], 0.01, stride)
    gradient = pooling.pool_gradient(found, index, list(x.shape[2:]), stride)
    return {
        "statistics": (operators.statistics(x, 1e-5), (mean, rstd)),
        "norm_gradient": (operators.norm_gradient(*of_norm), raw_map.norm_gradient(*of_norm)),
        "join": ([operators.join(*raw_map.flatten(maps), 3)], [join(maps, 3)]),
        "separate": (operators.separate(grad, widths, 3), separate(grad, widths, 3)),
        "pool": ((found, raw), (expected, F.max_pool3d(_exact(join(maps[:1], 1)), stride))),
        "pool_gradient": ([gradient], [unpooled]),
    }
