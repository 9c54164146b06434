"""E2ENet for nnU-Net v2: dynamic sparse feature fusion with restricted depth shift."""

from importlib.metadata import version

from nnunetv2_e2enet import registry

__version__ = version("nnunetv2-e2enet")

registry.register("engine", "nnunetv2_e2enet.engine")  # ``accelerate(network, x)``: logits on the CPU, or None
registry.register("kernels", "nnunetv2_e2enet.kernels")  # fused passes over feature maps on a GPU
