"""The Triton programs as PyTorch operators: shapes, dtypes, launches."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op
from triton.runtime.interpreter import InterpretedFunction

from nnunetv2_e2enet.kernels import programs
from nnunetv2_e2enet.network.raw_map import FeatureMap, RawMap, flatten

DEVICES = ("cuda", "cpu") if isinstance(programs.move_rows, InterpretedFunction) else ("cuda",)
"""Where the programs run: Triton's interpreter (TRITON_INTERPRET=1) computes with tensors on the CPU too."""
BLOCK = 1024  # voxels of a row that a program handles at once
CHUNK = 32 * BLOCK  # voxels over which one program sums


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(variance + eps)`` over space, ``(batch, channels)``, at least float32; x is read once."""
    mean, rstd = _statistics(x, eps)
    return mean, rstd


def norm_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, offset: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of norm and leaky ReLU: the gradient of x, and a channel's sums for those of the norm's weight and bias."""
    grad_x, products, sums = _norm_gradient(grad, x, mean, rstd, scale, offset, slope)
    return grad_x, products, sums


def join(maps: Sequence[FeatureMap], shift_size: int) -> Tensor:
    """Norm, activation, shift and concatenation: each map is read once, each voxel of the result written once."""
    tensors, slopes = flatten(maps)
    out: Tensor = _join(tensors, [nan if slope is None else slope for slope in slopes], shift_size)
    return out


def separate(grad: Tensor, widths: Sequence[int], shift_size: int) -> list[Tensor]:
    """The adjoint of shift and concatenation: one gradient a map, of so many channels each."""
    parts: list[Tensor] = _separate(grad, list(widths), shift_size)
    return parts


@custom_op("e2enet::statistics", mutates_args=(), schema="(Tensor x, float eps) -> (Tensor, Tensor)")
def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, elements = prod(x.shape[:2]), prod(x.shape[2:])
    wide, parts = _wide(x.dtype), triton.cdiv(elements, CHUNK)
    sums, squares = (x.new_empty((rows, parts), dtype=wide) for _ in range(2))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        programs.sums_around_first[(rows, parts)](x, sums, squares, elements, CHUNK, BLOCK=BLOCK, WIDE=_triton_dtype(wide))
    distance, square = (t.double().sum(1) / elements for t in (sums, squares))
    mean = x.reshape(rows, -1)[:, 0].double() + distance
    rstd = ((square - distance.square()).clamp(min=0) + eps).rsqrt()
    return mean.to(wide).reshape(x.shape[:2]), rstd.to(wide).reshape(x.shape[:2])


@_statistics.register_fake
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    shape, wide = x.shape[:2], _wide(x.dtype)
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


@custom_op(
    "e2enet::norm_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor scale, Tensor offset, float slope)"
    " -> (Tensor, Tensor, Tensor)",
)
def _norm_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, offset: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    rows, elements = prod(x.shape[:2]), prod(x.shape[2:])
    parts = triton.cdiv(elements, CHUNK)
    sums, products = (x.new_empty((rows, parts), dtype=mean.dtype) for _ in range(2))
    given = (grad, x, *(t.contiguous() for t in (mean, rstd, scale, offset)))
    constants = {"SLOPE": slope, "BLOCK": BLOCK, "WIDE": _triton_dtype(mean.dtype)}
    with torch.cuda.device_of(x):
        programs.gradient_sums[(rows, parts)](*given, sums, products, elements, CHUNK, **constants)
        sums, products = sums.sum(1), products.sum(1)
        grid = (rows, triton.cdiv(elements, BLOCK))
        programs.gradient_of_norm[grid](*given, sums, products, out, elements, **constants)
    return out, products.reshape(x.shape[:2]), sums.reshape(x.shape[:2])


@_norm_gradient.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,  # noqa: ARG001
    scale: Tensor,  # noqa: ARG001
    offset: Tensor,  # noqa: ARG001
    slope: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(mean), torch.empty_like(mean)


@custom_op("e2enet::join", mutates_args=(), schema="(Tensor[] tensors, float[] slopes, int shift_size) -> Tensor")
def _join(tensors: Sequence[Tensor], slopes: Sequence[float], shift_size: int) -> Tensor:
    maps = _regroup(tensors, slopes)
    out = _joined(tensors, slopes)
    first = 0
    for feature_map in maps:
        if isinstance(feature_map, RawMap):
            raw, scale, offset, slope = feature_map
            _launch(raw.contiguous(), out, first, shift_size, (scale.contiguous(), offset.contiguous(), slope))
        else:
            raw = feature_map
            _launch(raw.contiguous(), out, first, shift_size)
        first += raw.shape[1]
    return out


@_join.register_fake
def _(tensors: Sequence[Tensor], slopes: Sequence[float], shift_size: int) -> Tensor:  # noqa: ARG001
    return _joined(tensors, slopes)


@custom_op("e2enet::separate", mutates_args=(), schema="(Tensor grad, int[] widths, int shift_size) -> Tensor[]")
def _separate(grad: Tensor, widths: Sequence[int], shift_size: int) -> list[Tensor]:
    grad = grad.contiguous()
    parts = _parts(grad, widths)
    first = 0
    for part in parts:
        _launch(part, grad, first, shift_size, back=True)
        first += part.shape[1]
    return parts


@_separate.register_fake
def _(grad: Tensor, widths: Sequence[int], shift_size: int) -> list[Tensor]:  # noqa: ARG001
    return _parts(grad, widths)


def _launch(
    single: Tensor,
    joined: Tensor,
    first: int,
    shift_size: int,
    norm: tuple[Tensor, Tensor, float] | None = None,
    back: bool = False,
) -> None:
    batch, channels, *space = single.shape
    moves = joined.shape[1] >= shift_size > 1
    group_size, larger = divmod(joined.shape[1], shift_size)
    elements = prod(space)
    wide = _wide(single.dtype)
    scale, offset, slope = norm or (single, single, 1.0)  # without a norm nothing is read there
    with torch.cuda.device_of(single):
        programs.move_rows[(batch * channels, triton.cdiv(elements, BLOCK))](
            *(single, joined, scale, offset, channels, first, joined.shape[1], elements // space[0], elements),
            *(group_size, larger, shift_size // 2),
            SLOPE=slope,
            BACK=back,
            NORM=norm is not None,
            MOVE=moves,
            BLOCK=BLOCK,
            WIDE=_triton_dtype(wide),
        )


def _regroup(tensors: Sequence[Tensor], slopes: Sequence[float]) -> list[FeatureMap]:
    rest = iter(tensors)
    return [next(rest) if isnan(slope) else RawMap(next(rest), next(rest), next(rest), slope) for slope in slopes]


def _joined(tensors: Sequence[Tensor], slopes: Sequence[float]) -> Tensor:
    values = [m.raw if isinstance(m, RawMap) else m for m in _regroup(tensors, slopes)]
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    batch, _, *space = values[0].shape
    return values[0].new_empty((batch, sum(v.shape[1] for v in values), *space), dtype=dtype)


def _parts(grad: Tensor, widths: Sequence[int]) -> list[Tensor]:
    return [grad.new_empty((grad.shape[0], width, *grad.shape[2:])) for width in widths]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of this dtype are summed and normalised."""
    return torch.promote_types(dtype, torch.float32)


def _triton_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32
