"""Whether the kernels compute on a device what PyTorch does: asked once a process, before they are used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_e2enet.kernels import operators, pooling, sparse
from nnunetv2_e2enet.network import _raw_map as raw_map
from nnunetv2_e2enet.network.depth_shift import join, separate
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2}
"""By the dtypes of maps in nnU-Net's trainings, of values of about 1."""


def wrong_kernel(device: torch.device) -> str | None:
    """The name of the first kernel that differs from PyTorch on a small example of a dtype and format; None if all agree."""
    cases = itertools.product(TOLERANCES, (torch.contiguous_format, CHANNELS_LAST[3]))
    return next((name for dtype, form in cases if (name := _wrong_kernel(device, dtype, form))), None)


def _sparse_convolutions(x: Tensor, transposed: bool) -> dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Two blocks of 16 output maps over 3 of 5 input maps each, after a depth shift."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 3, 1, 3, 3, generator=generator).to(x)
    inputs = torch.tensor([[0, 2, 3], [1, 2, 4]], device=x.device)
    shifted = join([x], 3)
    gathered = torch.cat([shifted[:, block] for block in inputs], dim=1).requires_grad_()
    dense = weight.detach().requires_grad_()
    if transposed:
        stride, by_input = [1, 3, 3], dense.unflatten(0, (2, 16)).transpose(1, 2).flatten(0, 1)
        expected = F.conv_transpose3d(gathered, by_input, None, stride, groups=2)
    else:
        stride = [1, 1, 1]
        expected = F.conv3d(gathered, dense, padding=(0, 1, 1), groups=2)
    of_gathered, of_weight = torch.autograd.grad(expected, (gathered, dense), expected)
    of_shifted = torch.zeros_like(shifted).index_add(1, inputs.flatten(), of_gathered)
    (of_x,) = separate(of_shifted, [5], 3)
    grad, options = expected.detach(), (stride, 3, transposed)
    kind = "transposed " if transposed else ""
    return {
        f"{kind}convolve": ([sparse.convolve(x, weight, inputs, *options)], [grad]),
        f"{kind}input_gradient": ([sparse.input_gradient(grad, weight, inputs, x, *options)], [of_x]),
        f"{kind}weight_gradient": ([sparse.weight_gradient(grad, x, inputs, [1, 3, 3], *options)], [of_weight]),
    }


def _wrong_kernel(device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> str | None:
    generator = torch.Generator().manual_seed(0)
    maps_and_gradient = (torch.randn(2, c, 6, 4, 6, generator=generator) for c in (5, 4, 9))
    x, other, grad = (t.to(device, dtype).contiguous(memory_format=memory_format) for t in maps_and_gradient)
    mean, rstd = raw_map.statistics(x, 1e-5)
    scale, offset = (t.reshape(2, 5, 1, 1, 1) for t in (rstd, -mean * rstd))
    maps: list[raw_map.FeatureMap] = [raw_map.RawMap(x, scale, offset, 0.01), other]
    of_norm = (grad[:, :5], x, mean, rstd, scale, offset, 0.01)
    stride = [1, 2, 2]
    activation = x.detach().requires_grad_()
    expected = F.max_pool3d(activation, stride)
    (unpooled,) = torch.autograd.grad(expected, activation, expected)
    found, index = pooling.pool([x], None, stride)
    raw, _ = pooling.pool([x, scale, offset], 0.01, stride)
    gradient = pooling.pool_gradient(found, index, list(x.shape[2:]), stride)
    results: dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]] = {
        "statistics": (operators.statistics(x, 1e-5), (mean, rstd)),
        "norm_gradient": (operators.norm_gradient(*of_norm), raw_map.norm_gradient(*of_norm)),
        "join": ([operators.join(*raw_map.flatten(maps), 3)], [join(maps, 3)]),
        "separate": (operators.separate(grad, [5, 4], 3), separate(grad, [5, 4], 3)),
        "pool": ((found, raw), (expected.detach(), F.max_pool3d(join(maps[:1], 1), stride))),
        "pool_gradient": ([gradient], [unpooled]),
    }
    results |= _sparse_convolutions(x, transposed=False) | _sparse_convolutions(x, transposed=True)
    tolerance = TOLERANCES[dtype]
    for name, (results_found, results_expected) in results.items():
        for f, e in zip(results_found, results_expected, strict=True):
            f, e = f.float(), e.float()
            if not torch.allclose(f, e, rtol=tolerance, atol=tolerance * max(1.0, float(e.abs().max()))):
                return name
    return None
