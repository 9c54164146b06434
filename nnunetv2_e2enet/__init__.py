"""E2ENet for nnU-Net v2: dynamic sparse feature fusion with restricted depth shift."""

from importlib.metadata import version

__version__ = version("nnunetv2-e2enet")
