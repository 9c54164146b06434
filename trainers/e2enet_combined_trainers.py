"""E2ENet with nnU-Net's own variants. Another combination is one more line of this kind."""

from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainer_onlyMirror01,
    nnUNetTrainerNoMirroring,
)
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerCELoss import nnUNetTrainerCELoss
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerDiceLoss import nnUNetTrainerDiceLoss
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam3en4

from nnunetv2_e2enet.training.trainer import E2ENetMixin


class nnUNetTrainerE2ENet_NoMirroring(E2ENetMixin, nnUNetTrainerNoMirroring):
    """E2ENet without mirroring, in training and prediction."""


class nnUNetTrainerE2ENet_onlyMirror01(E2ENetMixin, nnUNetTrainer_onlyMirror01):
    """E2ENet with mirroring along the first two axes only."""


class nnUNetTrainerE2ENet_DA5(E2ENetMixin, nnUNetTrainerDA5):
    """E2ENet with nnU-Net's strong data augmentation."""


class nnUNetTrainerE2ENet_CELoss(E2ENetMixin, nnUNetTrainerCELoss):
    """E2ENet with cross-entropy alone."""


class nnUNetTrainerE2ENet_DiceLoss(E2ENetMixin, nnUNetTrainerDiceLoss):
    """E2ENet with the Dice loss alone."""


class nnUNetTrainerE2ENet_Adam3en4(E2ENetMixin, nnUNetTrainerAdam3en4):
    """E2ENet with AdamW, learning rate 3e-4."""


__all__ = [name for name in globals() if name.startswith("nnUNetTrainerE2ENet")]
