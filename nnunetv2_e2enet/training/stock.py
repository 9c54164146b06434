"""Trainers of stock networks: with DSFF, with the depth shift, with other widths; mixins to be put before an nnU-Net trainer.

Each takes any plans and changes one thing.
"""

from __future__ import annotations

from typing import Any

from nnunetv2_e2enet.training.architecture import converted_architecture, scaled_architecture
from nnunetv2_e2enet.training.dsff import DSFFMixin
from nnunetv2_e2enet.training.network import NetworkMixin


class StockDSFFMixin(DSFFMixin):
    """DSFF in the decoder of the network that the plans name: its convolutions and its upsampling."""

    shift_size = 1  # channel groups of a depth shift in the place of the kernels' depth; 1 = kernels as planned

    def network_architecture(self, architecture: dict[str, Any]) -> dict[str, Any]:
        """The entry of the plans, with maskable layers in the decoder."""
        return converted_architecture(architecture, feature_sparsity=self.feature_sparsity, shift_size=self.shift_size)


class DepthShiftMixin(NetworkMixin):
    """The depth shift and convolutions without depth in the place of those with depth."""

    shift_size = 3  # channel groups of the depth shift, odd

    def network_architecture(self, architecture: dict[str, Any]) -> dict[str, Any]:
        """The entry of the plans, with the depth shift before each convolution."""
        return converted_architecture(architecture, shift_size=self.shift_size)


class ScaledMixin(NetworkMixin):
    """The network that the plans name, with more or fewer channels."""

    width = 1.0  # times the plans' channels

    def network_architecture(self, architecture: dict[str, Any]) -> dict[str, Any]:
        """The entry of the plans, with other numbers of channels."""
        return scaled_architecture(architecture, self.width)
