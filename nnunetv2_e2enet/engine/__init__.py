"""The CPU engine: prediction and training over active connections alone.

An E2ENet on the CPU uses the engine by itself: in eval mode with gradients off, and in training mode with gradients on. The
settings ``engine``, ``engine_kernels`` and ``engine_storage`` (``nnunetv2_e2enet.settings``) say more. See docs/engine.md.
"""

from nnunetv2_e2enet.engine.core import KERNELS, KERNELS_VARIABLE, STORAGE_VARIABLE, STORAGES, load_core
from nnunetv2_e2enet.engine.counts import executed_macs, product_macs
from nnunetv2_e2enet.engine.prediction import bytes_to_take, predict, why_not_predicted
from nnunetv2_e2enet.engine.sessions import disabled
from nnunetv2_e2enet.engine.status import Status, peak_flops, profile, release, status, why_pytorch
from nnunetv2_e2enet.engine.support import ENGINE_VARIABLE
from nnunetv2_e2enet.engine.training import train, why_not_trained

__all__ = [
    "ENGINE_VARIABLE",
    "KERNELS",
    "KERNELS_VARIABLE",
    "STORAGES",
    "STORAGE_VARIABLE",
    "Status",
    "bytes_to_take",
    "disabled",
    "executed_macs",
    "load_core",
    "peak_flops",
    "predict",
    "product_macs",
    "profile",
    "release",
    "status",
    "train",
    "why_not_predicted",
    "why_not_trained",
    "why_pytorch",
]
