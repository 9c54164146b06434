"""Plans that networks are measured at without a data set, and the networks for them."""

from __future__ import annotations

from dataclasses import dataclass

from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunetv2_e2enet.network import E2ENet, e2enet_features


@dataclass(frozen=True)
class Plan:
    """A part of what nnU-Net plans, for images of one channel.

    Attributes:
        strides: into each level, for each axis.
        patch: voxels of each axis.
        classes: with the background.
    """

    strides: list[list[int]]
    patch: tuple[int, ...]
    classes: int

    def stock(self, deep_supervision: bool = True) -> PlainConvUNet:
        """nnU-Net's network."""
        dimension = len(self.patch)
        conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if dimension == 3 else (nn.Conv2d, nn.InstanceNorm2d)
        features = [min(32 * 2**i, 320 if dimension == 3 else 512) for i in range(len(self.strides))]
        kernels = [[1 if s == 1 else 3 for s in following] for following in self.strides[1:]]  # flat until an axis is divided
        kernels.append([3] * dimension)
        return PlainConvUNet(
            *(1, len(self.strides), features, conv, kernels, self.strides, 2, self.classes, 2),
            *(True, norm, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}),
            deep_supervision=deep_supervision,
        )

    def e2enet(self, sparsity: float = 0.8, deep_supervision: bool = True) -> E2ENet:
        """E2ENet of full widths."""
        levels, conv = len(self.strides), nn.Conv3d if len(self.patch) == 3 else nn.Conv2d
        return E2ENet(
            *(1, self.classes, levels, e2enet_features(levels), conv, self.strides),
            deep_supervision=deep_supervision,
            feature_sparsity=sparsity,
        )


AMOS = Plan([[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4], (64, 160, 160), 16)
HIPPOCAMPUS = Plan([[1, 1, 1], *[[2, 2, 2]] * 3], (40, 56, 40), 3)
PLANS = {
    "AMOS": AMOS,
    "isotropic": Plan([[1, 1, 1], *[[2, 2, 2]] * 5], (128, 128, 128), 16),
    "Hippocampus": HIPPOCAMPUS,
    "anisotropic": Plan([[1, 1, 1], [1, 2, 2], [1, 2, 2], *[[2, 2, 2]] * 3], (16, 256, 256), 16),
    "2D": Plan([[1, 1], *[[2, 2]] * 7], (512, 512), 16),
}
TINY = {"tiny": Plan([[1, 1, 1], [2, 2, 2]], (16, 16, 16), 16)}
"""With which programs are tried."""
