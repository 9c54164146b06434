"""The paper's experiments and its open questions, one `-tr` each; docs/experiments.md says which row of a table is which.

nnU-Net finds them after `e2enet register --experiments`.
"""

from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_e2enet.dsff import ErdosRenyiKernel, GradientGrowth
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import SMOKE
from nnunetv2_e2enet.trainers.e2enet_trainers import nnUNetTrainerE2ENet, nnUNetTrainerE2ENet_S70
from nnunetv2_e2enet.training.stock import DepthShiftMixin, ScaledMixin, StockDSFFMixin
from nnunetv2_e2enet.training.variants import variant, variants


class nnUNetTrainerDSFF(StockDSFFMixin, nnUNetTrainer):
    """Stock nnU-Net with DSFF in its decoder, at sparsity 0.8."""


class nnUNetTrainerDepthShift(DepthShiftMixin, nnUNetTrainer):
    """Stock nnU-Net with the depth shift in the place of its kernels' depth."""


class nnUNetTrainer_narrow(ScaledMixin, nnUNetTrainer):
    """Stock nnU-Net with 0.65 times the channels."""

    width = 0.65  # the paper gives no factor; with this one there are as many parameters as it reports


# How the topology evolves; sparsities are in e2enet_trainers.
_TOPOLOGY: dict[str, dict[str, Any]] = {
    "dense": {"feature_sparsity": 0.0},  # without DSFF
    "static": {"topology_update_period": None},
    **{f"T{period}": {"topology_update_period": period} for period in (1, 2, 10, 20, 50)},
    "gradient": {"growth": GradientGrowth()},
    "ERK": {"distribution": ErdosRenyiKernel()},
    **{f"B{size}": {"block_size": size} for size in (8, 16, 32)},
    **{f"B{size}active": {"block_size": size, "compute_active_only": True} for size in (16, 32)},
}
# What a shift block computes. Another kernel stands in the place of the shift.
_BLOCKS: dict[str, dict[str, Any]] = {
    **{f"shift{size}": {"shift_size": size} for size in (1, 5, 7, 15)},
    "kernel313": {"kernel_size": [3, 1, 3], "shift_size": 1},
    "kernel331": {"kernel_size": [3, 3, 1], "shift_size": 1},
    "kernel333": {"kernel_size": [3, 3, 3], "shift_size": 1},
    "learnedShift": {"learned_shift": True},
}
_CAPACITY = {"wide": {"base_num_features": 58}}  # as for nnUNetTrainer_narrow
_LAYOUT = {"channelsLast": {"channels_last": True}}

_VARIANTS = {
    **variants(nnUNetTrainerE2ENet, {**_TOPOLOGY, **_BLOCKS, **_CAPACITY, **_LAYOUT}),
    **variants(nnUNetTrainerE2ENet_S70, _BLOCKS),
    "nnUNetTrainerDSFF_depthShift": variant(nnUNetTrainerDSFF, "depthShift", shift_size=3),
    "nnUNetTrainerDSFF_smoke": variant(nnUNetTrainerDSFF, "smoke", **SMOKE, topology_update_period=1),
}
globals().update(_VARIANTS)

__all__ = ["nnUNetTrainerDSFF", "nnUNetTrainerDepthShift", "nnUNetTrainer_narrow", *_VARIANTS]
