"""Stock nnU-Net with channels-last maps, beside which E2ENet's stand in the benchmarks."""

from __future__ import annotations

from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST


class StockChannelsLast(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager: Any, configuration_manager: Any, *others: Any, **options: Any) -> nn.Module:
        network = nnUNetTrainer.build_network_architecture(plans_manager, configuration_manager, *others, **options)
        return network.to(memory_format=CHANNELS_LAST[len(configuration_manager.patch_size)])
