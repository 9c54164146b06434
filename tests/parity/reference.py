"""E2ENet in plain NumPy and float64: the second opinion on ``nnunetv2_e2enet.network``, of which nothing is used here.

One sample at a time: maps are ``(channels, *space)``. Weights have the names of ``nnunetv2_e2enet.network.reference``.
``python -m parity.reference`` (in ``tests/``) writes the cases anew.

Source: Wu et al., "E2ENet", NeurIPS 2024, sections 3.1 (feature fusion) and 3.3 (restricted depth shift).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FOLDER = Path(__file__).parent
EPSILON, SLOPE = 1e-5, 0.01


@dataclass(frozen=True)
class Case:
    """A network and the size of its input.

    Attributes:
        features: channels of each level, finest first.
        strides: into each level, for each axis of space.
        density: share of connections that are active in fusion and upsampling.
    """

    input_channels: int
    classes: int
    features: list[int]
    strides: list[list[int]]
    shift_size: int
    patch_size: list[int]
    density: float

    @property
    def levels(self) -> int:
        return len(self.features)

    @property
    def heads(self) -> int:
        return max(1, self.levels - 2)


CASES = {
    # two channels are fewer than the three groups of the shift: the image does not move
    "volume": Case(2, 3, [4, 6, 8, 7], [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]], 3, [4, 16, 16], 0.5),
    "volume_of_two_levels": Case(5, 2, [6, 7], [[1, 1, 1], [2, 2, 2]], 5, [6, 8, 10], 0.5),
    "slice": Case(1, 4, [4, 5, 6], [[1, 1], [2, 2], [2, 2]], 3, [16, 24], 0.3),
}


# --- what is computed ---------------------------------------------------------------------------------------------------


def depth_shift(x: Array, size: int) -> Array:
    """Near-equal consecutive groups of channels, moved by -size/2 ... size/2 slices; zeros move in, nothing wraps."""
    if len(x) < size:
        return x
    moved = np.zeros_like(x)
    larger = len(x) % size  # so many groups have one channel more, the first ones
    begin = 0
    for group in range(size):
        end = begin + len(x) // size + (group < larger)
        offset = group - size // 2
        for target in range(x.shape[1]):
            if 0 <= target - offset < x.shape[1]:
                moved[begin:end, target] = x[begin:end, target - offset]
        begin = end
    return moved


def convolution(x: Array, weight: Array, bias: Array | None, stride: Sequence[int]) -> Array:
    """Cross-correlation with zeros around, as many as keep the size at stride 1. ``weight`` is (out, in, *kernel)."""
    kernel = weight.shape[2:]
    padded = np.pad(x, [(0, 0), *((k // 2, k // 2) for k in kernel)])
    size = [-(-n // s) for n, s in zip(x.shape[1:], stride, strict=True)]
    result = np.zeros((len(weight), *size))
    for place in product(*map(range, kernel)):
        seen = tuple(slice(p, p + (n - 1) * s + 1, s) for p, n, s in zip(place, size, stride, strict=True))
        result += np.tensordot(weight[(slice(None), slice(None), *place)], padded[(slice(None), *seen)], axes=1)
    return result if bias is None else result + _of_channels(bias, result)


def transposed_convolution(x: Array, weight: Array) -> Array:
    """Kernel = stride, so every voxel of ``x`` becomes a block of voxels. ``weight`` is (in, out, *kernel)."""
    kernel = weight.shape[2:]
    result = np.zeros((weight.shape[1], *(n * k for n, k in zip(x.shape[1:], kernel, strict=True))))
    for place in product(*map(range, kernel)):
        filled = tuple(slice(p, None, k) for p, k in zip(place, kernel, strict=True))
        result[(slice(None), *filled)] = np.tensordot(weight[(slice(None), slice(None), *place)].T, x, axes=1)
    return result


def max_pool(x: Array, stride: Sequence[int]) -> Array:
    """Kernel = stride."""
    parts = [
        x[(slice(None), *(slice(p, None, s) for p, s in zip(place, stride, strict=True)))]
        for place in product(*map(range, stride))
    ]
    return np.max(parts, axis=0)


def instance_norm(x: Array, scale: Array, offset: Array) -> Array:
    space = tuple(range(1, x.ndim))
    mean, variance = x.mean(space, keepdims=True), x.var(space, keepdims=True)
    return (x - mean) / np.sqrt(variance + EPSILON) * _of_channels(scale, x) + _of_channels(offset, x)


def _of_channels(values: Array, x: Array) -> Array:
    return values.reshape(-1, *[1] * (x.ndim - 1))


def shift_block(x: Array, weights: Mapping[str, Array], name: str, shift_size: int, stride: Sequence[int]) -> Array:
    moved = depth_shift(x, shift_size) if x.ndim == 4 else x
    y = convolution(moved, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"], stride)
    y = instance_norm(y, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
    return np.where(y > 0, y, SLOPE * y)


def e2enet(x: Array, weights: Mapping[str, Array], case: Case) -> list[Array]:
    """Logits of all heads, finest first."""
    one = [1] * (x.ndim - 1)
    maps = []
    for level in range(case.levels):
        x = shift_block(x, weights, f"encoder.level{level}.conv0", case.shift_size, case.strides[level])
        x = shift_block(x, weights, f"encoder.level{level}.conv1", case.shift_size, one)
        maps.append(x)
    last = {}
    for stage in range(1, case.levels):
        before, maps = maps, []
        for level in range(case.levels - stage):
            flows = [before[level]]
            flows.append(transposed_convolution(before[level + 1], weights[f"upsample.stage{stage}.level{level}.weight"]))
            if level > 0:
                flows.append(max_pool(before[level - 1], case.strides[level]))
            node = f"fusion.stage{stage}.level{level}"
            y = shift_block(np.concatenate(flows), weights, f"{node}.conv0", case.shift_size, one)
            if stage + level == case.levels - 1:
                y = shift_block(y, weights, f"{node}.conv1", case.shift_size, one)
                last[level] = y
            maps.append(y)
    return [convolution(last[level], weights[f"head.level{level}.weight"], None, one) for level in range(case.heads)]


# --- the cases ----------------------------------------------------------------------------------------------------------


def random_weights(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    """Weights, biases, scales of either sign and offsets, in 64ths, so that they take little space."""
    dimension = len(case.patch_size)
    kernel = (3, 3) if dimension == 2 else (1, 3, 3)
    weights: dict[str, Array] = {}

    def draw(name: str, *shape: int, spread: float, sparse: bool = False) -> None:
        values = np.round(64 * rng.normal(0, spread, shape)) / 64
        if sparse:
            values *= (rng.random(shape[:2]) < case.density).reshape(*shape[:2], *[1] * dimension)
        weights[name] = values

    def block(name: str, inputs: int, outputs: int, sparse: bool) -> None:
        draw(f"{name}.conv.weight", outputs, inputs, *kernel, spread=0.5, sparse=sparse)
        draw(f"{name}.conv.bias", outputs, spread=0.5)
        draw(f"{name}.norm.weight", outputs, spread=1.0)
        draw(f"{name}.norm.bias", outputs, spread=0.5)

    for level, channels in enumerate(case.features):
        block(f"encoder.level{level}.conv0", case.features[level - 1] if level else case.input_channels, channels, False)
        block(f"encoder.level{level}.conv1", channels, channels, False)
    for stage in range(1, case.levels):
        for level in range(case.levels - stage):
            here, coarser = case.features[level], case.features[level + 1]
            name = f"fusion.stage{stage}.level{level}"
            draw(
                f"upsample.stage{stage}.level{level}.weight", coarser, here, *case.strides[level + 1], spread=0.5, sparse=True
            )
            block(f"{name}.conv0", 2 * here + (case.features[level - 1] if level else 0), here, True)
            if stage + level == case.levels - 1:
                block(f"{name}.conv1", here, here, True)
    for level in range(case.heads):
        draw(f"head.level{level}.weight", case.classes, case.features[level], *[1] * dimension, spread=0.5)
    return weights


def arrays_of(name: str) -> dict[str, NDArray[np.generic]]:
    """A case: weights and input ``x`` in float16, which holds them exactly, logits in float32, the configuration as JSON."""
    case = CASES[name]
    rng = np.random.default_rng(sorted(CASES).index(name))
    weights = random_weights(case, rng)
    x = np.round(16 * rng.normal(0, 1, (case.input_channels, *case.patch_size))) / 16
    logits = {f"logits.level{level}": value for level, value in enumerate(e2enet(x, weights, case))}
    given = {key: value.astype(np.float16) for key, value in {**weights, "x": x}.items()}
    computed = {key: value.astype(np.float32) for key, value in logits.items()}
    return {**given, **computed, "configuration": np.array(json.dumps(asdict(case)))}


if __name__ == "__main__":
    for case_name in CASES:
        np.savez_compressed(FOLDER / f"{case_name}.npz", **arrays_of(case_name))  # type: ignore[arg-type]
