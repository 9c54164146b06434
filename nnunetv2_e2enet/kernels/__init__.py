"""Fused passes over feature maps for the GPU, written in Triton.

Each is a PyTorch operator of its own (``torch.ops.e2enet``), so the same kernels run eagerly and inside compiled networks, and
each computes what a few lines of PyTorch in ``nnunetv2_e2enet.network`` compute as well; the tests compare the two.
"""

from nnunetv2_e2enet.kernels.check import wrong_convolution, wrong_kernel
from nnunetv2_e2enet.kernels.operators import DEVICES, join, norm_gradient, separate, statistics
from nnunetv2_e2enet.kernels.pooling import pool, pool_gradient
from nnunetv2_e2enet.kernels.sparse import convolve, input_gradient, weight_gradient

__all__ = [
    "DEVICES",
    "convolve",
    "input_gradient",
    "join",
    "norm_gradient",
    "pool",
    "pool_gradient",
    "separate",
    "statistics",
    "weight_gradient",
    "wrong_convolution",
    "wrong_kernel",
]
