"""The plans of the workflow: those of nnU-Net, with a low resolution and a cascade, and small enough for two cores."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
"""In the order in which they are trained: the cascade needs what the low resolution predicts."""

LOWRES_FACTOR = 2
FEATURES = 8


def add_configurations(path: Path) -> None:
    """Complete a plans file that nnU-Net has written.

    nnU-Net plans ``3d_lowres`` and the cascade only for large images, so they are added by hand, as nnU-Net's own integration
    test does it. Batches and stock nnU-Net's channels are cut down.
    """
    plans = json.loads(path.read_text())
    configurations = plans["configurations"]
    for name in ("2d", "3d_fullres"):
        configurations[name]["batch_size"] = 2
        _narrow(configurations[name])
    configurations["3d_lowres"] = _lowres(configurations["3d_fullres"], plans["plans_name"])
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    path.write_text(json.dumps(plans, indent=2))


def _narrow(configuration: dict[str, Any]) -> None:
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [min(FEATURES * 2**level, 4 * FEATURES) for level in range(arguments["n_stages"])]


def _lowres(fullres: dict[str, Any], plans_name: str) -> dict[str, Any]:
    """Half the resolution, one level less."""
    architecture = deepcopy(fullres["architecture"])
    arguments = architecture["arch_kwargs"]
    for name in ("strides", "kernel_sizes", "features_per_stage", "n_conv_per_stage", "n_conv_per_stage_decoder"):
        arguments[name] = arguments[name][:-1]
    arguments["n_stages"] -= 1
    divisor = [1, 1, 1]
    for stride in arguments["strides"]:
        divisor = [d * s for d, s in zip(divisor, stride, strict=True)]
    patch = [max(1, round(n / LOWRES_FACTOR / d)) * d for n, d in zip(fullres["patch_size"], divisor, strict=True)]
    return {
        "inherits_from": "3d_fullres",
        "data_identifier": f"{plans_name}_3d_lowres",
        "patch_size": patch,
        "median_image_size_in_voxels": [n / LOWRES_FACTOR for n in fullres["median_image_size_in_voxels"]],
        "spacing": [LOWRES_FACTOR * mm for mm in fullres["spacing"]],
        "architecture": architecture,
        "next_stage": "3d_cascade_fullres",
    }
