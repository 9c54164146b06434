"""E2ENet trainers: three sparsities, each in the lengths that nnU-Net users know."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_e2enet.training.trainer import E2ENetMixin
from nnunetv2_e2enet.training.variants import variant, variants


class nnUNetTrainerE2ENet(E2ENetMixin, nnUNetTrainer):
    """E2ENet as published: feature sparsity 0.8, a topology update every 5 epochs, shift size 3."""


nnUNetTrainerE2ENet_S70 = variant(nnUNetTrainerE2ENet, "S70", feature_sparsity=0.7)
nnUNetTrainerE2ENet_S90 = variant(nnUNetTrainerE2ENet, "S90", feature_sparsity=0.9)

_LENGTHS = {"1epoch": 1, **{f"{n}epochs": n for n in (5, 20, 50, 100, 250)}}
for _trainer in (nnUNetTrainerE2ENet, nnUNetTrainerE2ENet_S70, nnUNetTrainerE2ENet_S90):
    globals().update(variants(_trainer, {suffix: {"num_epochs": n} for suffix, n in _LENGTHS.items()}))

__all__ = [name for name in globals() if name.startswith("nnUNetTrainerE2ENet")]
