"""A growth rule: output maps with few active connections get new ones first; among equals, chance decides."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunetv2_e2enet.network import MaskableLayer
from nnunetv2_e2enet.training.trainer import E2ENetMixin


class BalancedGrowth:
    def score(self, layer: MaskableLayer, generator: torch.Generator) -> Tensor:
        """One number a connection, shaped like ``layer.mask``; the inactive ones with the highest are grown."""
        mask, inputs = layer.mask.cpu(), layer.input_axis
        chance = torch.rand(mask.shape, generator=generator)  # the only source of randomness: trainings resume exactly
        place = chance.masked_fill(mask, 2).argsort(inputs).argsort(inputs)  # of each inactive connection among its map's
        return chance - (mask.sum(inputs, keepdim=True) + place)


class nnUNetTrainerE2ENet_balanced(E2ENetMixin, nnUNetTrainer):
    growth = BalancedGrowth()
