"""Bytes that autograd keeps for the backward pass: E2ENet beside stock nnU-Net, patch by patch.

Nothing is computed: the networks run on the meta device. Batch 1, float32, deep supervision, five classes.

    python benchmarks/training_memory.py
"""

from __future__ import annotations

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from rich.console import Console
from rich.table import Table
from torch import nn

from nnunetv2_e2enet.network import E2ENet, accounts, e2enet_features

CLASSES = 5
PLANS = {
    "AMOS": ([[1, 1, 1], [1, 2, 2]] + [[2, 2, 2]] * 4, (64, 160, 160)),
    "isotropic": ([[1, 1, 1]] + [[2, 2, 2]] * 5, (128, 128, 128)),
    "Hippocampus": ([[1, 1, 1]] + [[2, 2, 2]] * 3, (40, 56, 40)),
    "anisotropic": ([[1, 1, 1], [1, 2, 2], [1, 2, 2]] + [[2, 2, 2]] * 3, (16, 256, 256)),
    "2D": ([[1, 1]] + [[2, 2]] * 7, (512, 512)),
}


def stock_network(strides: list[list[int]]) -> PlainConvUNet:
    dimension = len(strides[0])
    conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if dimension == 3 else (nn.Conv2d, nn.InstanceNorm2d)
    features = [min(32 * 2**i, 320 if dimension == 3 else 512) for i in range(len(strides))]
    return PlainConvUNet(
        *(1, len(strides), features, conv, 3, strides, 2, CLASSES, 2, True, norm, {"eps": 1e-5, "affine": True}),
        *(None, None, nn.LeakyReLU, {"inplace": True}),
        deep_supervision=True,
    )


def e2enet(strides: list[list[int]]) -> E2ENet:
    conv = nn.Conv3d if len(strides[0]) == 3 else nn.Conv2d
    return E2ENet(1, CLASSES, len(strides), e2enet_features(len(strides)), conv, strides, deep_supervision=True)


def main() -> None:
    table = Table(title="Kept for backward, batch 1, float32")
    for name in ("plan", "patch", "nnU-Net GiB", "bytes/element*", "E2ENet GiB", "E2ENet / nnU-Net"):
        table.add_column(name, justify="left" if name in ("plan", "patch") else "right")
    for name, (strides, patch) in PLANS.items():
        with torch.device("meta"):
            stock, ours = stock_network(strides), e2enet(strides)
        stock_bytes = accounts.saved_bytes(stock, (1, 1, *patch))
        our_bytes = ours.saved_bytes(patch)
        per_element = stock_bytes / stock.compute_conv_feature_map_size(patch)
        row = [
            f"{stock_bytes / 2**30:.2f}",
            f"{per_element:.2f}",
            f"{our_bytes / 2**30:.2f}",
            f"{our_bytes / stock_bytes:.2f}",
        ]
        table.add_row(name, " x ".join(map(str, patch)), *row)
    console = Console(highlight=False)
    console.print(table)
    console.print("* of nnU-Net's own memory estimate, compute_conv_feature_map_size")


if __name__ == "__main__":
    main()
