"""A pruning criterion: a connection is as important as the largest weight of its kernel."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunetv2_e2enet.network import MaskableLayer
from nnunetv2_e2enet.training.trainer import E2ENetMixin


class LargestWeight:
    label = "largest weight of the kernel"  # names the score in `e2enet topology`

    def score(self, layer: MaskableLayer) -> Tensor:
        """One number a connection, shaped like ``layer.mask``; the active ones with the lowest are pruned."""
        return layer.spread(layer.weight.detach()).flatten(2).abs().amax(dim=2)


class nnUNetTrainerE2ENet_largestWeight(E2ENetMixin, nnUNetTrainer):
    importance = LargestWeight()
