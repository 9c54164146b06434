"""Whether the kernels compute on this device what PyTorch does: asked once a process, before they are used."""

from __future__ import annotations

import torch

from nnunetv2_e2enet.kernels import operators
from nnunetv2_e2enet.network import _raw_map as raw_map
from nnunetv2_e2enet.network.depth_shift import join, separate
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST

TOLERANCE = 1e-4  # float32, values of about 1


def wrong_kernel(device: torch.device) -> str | None:
    """The name of the first kernel that differs from PyTorch on a small example in either format; None if all agree."""
    formats = (torch.contiguous_format, CHANNELS_LAST[3])
    return next((name for memory_format in formats if (name := _wrong_kernel(device, memory_format))), None)


def _wrong_kernel(device: torch.device, memory_format: torch.memory_format) -> str | None:
    generator = torch.Generator().manual_seed(0)
    maps_and_gradient = (torch.randn(2, c, 5, 6, 7, generator=generator) for c in (5, 4, 9))
    x, other, grad = (t.to(device, memory_format=memory_format) for t in maps_and_gradient)
    mean, rstd = raw_map.statistics(x, 1e-5)
    scale, offset = (t.reshape(2, 5, 1, 1, 1) for t in (rstd, -mean * rstd))
    maps: list[raw_map.FeatureMap] = [raw_map.RawMap(x, scale, offset, 0.01), other]
    of_norm = (grad[:, :5], x, mean, rstd, scale, offset, 0.01)
    results = {
        "statistics": (operators.statistics(x, 1e-5), (mean, rstd)),
        "norm_gradient": (operators.norm_gradient(*of_norm), raw_map.norm_gradient(*of_norm)),
        "join": ([operators.join(*raw_map.flatten(maps), 3)], [join(maps, 3)]),
        "separate": (operators.separate(grad, [5, 4], 3), separate(grad, [5, 4], 3)),
    }
    for name, (found, expected) in results.items():
        for f, e in zip(found, expected, strict=True):
            if not torch.allclose(f, e, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, float(e.abs().max()))):
                return name
    return None
