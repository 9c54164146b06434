"""Whether the kernels compute on a device what PyTorch does: asked once a process, before they are used.

Convolutions of PyTorch are computed on the CPU in float64: those of cuDNN round float32 to TF32, which is less than the check
wants to see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

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
    """The name of the first pass over maps that differs from PyTorch on a small example of a dtype and memory format.

    None if all agree. Convolutions are not looked at.
    """
    return _first_wrong(device, _passes)


def wrong_convolution(device: torch.device) -> str | None:
    """As ``wrong_kernel``, of the convolutions of active connections, whose programs take a minute or two to compile."""
    return _first_wrong(device, _sparse_convolutions)


def _first_wrong(
    device: torch.device, results: Callable[[torch.device, torch.dtype, torch.memory_format], Results]
) -> str | None:
    with torch.inference_mode(False), torch.enable_grad():  # nnU-Net's predictor loads weights where there are no gradients
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


def _maps(device: torch.device, dtype: torch.dtype, form: torch.memory_format) -> Iterator[Tensor]:
    """Two maps, of 5 and 4 channels, and the gradient of their concatenation."""
    generator = torch.Generator().manual_seed(0)
    maps_and_gradient = (torch.randn(2, c, 6, 4, 6, generator=generator) for c in (5, 4, 9))
    return (t.to(device, dtype).contiguous(memory_format=form) for t in maps_and_gradient)


def _sparse_convolutions(device: torch.device, dtype: torch.dtype, form: torch.memory_format) -> Results:
    x, *_ = _maps(device, dtype, form)
    return _convolutions_of(x, transposed=False) | _convolutions_of(x, transposed=True)


def _convolutions_of(x: Tensor, transposed: bool) -> Results:
    """Two blocks of 16 output maps over 3 of 5 input maps each, after a depth shift."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 3, 1, 3, 3, generator=generator).to(x)
    inputs = torch.tensor([[0, 2, 3], [1, 2, 4]])
    shifted = join([_exact(x)], 3)
    gathered = torch.cat([shifted[:, block] for block in inputs], dim=1).requires_grad_()
    dense = _exact(weight).requires_grad_()
    if transposed:
        stride, by_input = [1, 3, 3], dense.unflatten(0, (2, 16)).transpose(1, 2).flatten(0, 1)
        expected = F.conv_transpose3d(gathered, by_input, None, stride, groups=2)
    else:
        stride = [1, 1, 1]
        expected = F.conv3d(gathered, dense, padding=(0, 1, 1), groups=2)
    grad = expected.detach().to(x)
    of_gathered, of_weight = torch.autograd.grad(expected, (gathered, dense), _exact(grad))
    of_shifted = torch.zeros_like(shifted).index_add(1, inputs.flatten(), of_gathered)
    (of_x,) = separate(of_shifted, [5], 3)
    inputs, options = inputs.to(x.device), (stride, 3, transposed)
    kind = "transposed " if transposed else ""
    return {
        f"{kind}convolve": ([sparse.convolve(x, weight, inputs, *options)], [expected]),
        f"{kind}input_gradient": ([sparse.input_gradient(grad, weight, inputs, x, *options)], [of_x]),
        f"{kind}weight_gradient": ([sparse.weight_gradient(grad, x, inputs, [1, 3, 3], *options)], [of_weight]),
    }


def _passes(device: torch.device, dtype: torch.dtype, form: torch.memory_format) -> Results:
    x, other, grad = _maps(device, dtype, form)
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
    return {
        "statistics": (operators.statistics(x, 1e-5), (mean, rstd)),
        "norm_gradient": (operators.norm_gradient(*of_norm), raw_map.norm_gradient(*of_norm)),
        "join": ([operators.join(*raw_map.flatten(maps), 3)], [join(maps, 3)]),
        "separate": (operators.separate(grad, [5, 4], 3), separate(grad, [5, 4], 3)),
        "pool": ((found, raw), (expected, F.max_pool3d(join(maps[:1], 1), stride))),
        "pool_gradient": ([gradient], [unpooled]),
    }
