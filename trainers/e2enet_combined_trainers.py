"""E2ENet with nnU-Net's own variants. Another combination is one more line of this kind.

Each is built when it is asked for, so a variant that has moved in a newer nnU-Net costs its combination alone.
"""

from nnunetv2_e2enet.training.trainer import E2ENetMixin
from nnunetv2_e2enet.training.variants import combination

_VARIANTS = "nnunetv2.training.nnUNetTrainer.variants"
_BASES = {
    "nnUNetTrainerE2ENet_NoMirroring": f"{_VARIANTS}.data_augmentation.nnUNetTrainerNoMirroring.nnUNetTrainerNoMirroring",
    "nnUNetTrainerE2ENet_onlyMirror01": f"{_VARIANTS}.data_augmentation.nnUNetTrainerNoMirroring.nnUNetTrainer_onlyMirror01",
    "nnUNetTrainerE2ENet_DA5": f"{_VARIANTS}.data_augmentation.nnUNetTrainerDA5.nnUNetTrainerDA5",
    "nnUNetTrainerE2ENet_CELoss": f"{_VARIANTS}.loss.nnUNetTrainerCELoss.nnUNetTrainerCELoss",
    "nnUNetTrainerE2ENet_DiceLoss": f"{_VARIANTS}.loss.nnUNetTrainerDiceLoss.nnUNetTrainerDiceLoss",
    "nnUNetTrainerE2ENet_Adam3en4": f"{_VARIANTS}.optimizer.nnUNetTrainerAdam.nnUNetTrainerAdam3en4",
}

__all__ = list(_BASES)


def __getattr__(name: str) -> type:
    if name not in _BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: type = globals().setdefault(name, combination(name, E2ENetMixin, _BASES[name]))
    return found
