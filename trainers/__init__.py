"""The trainers for ``nnUNetv2_train -tr``.

``from nnunetv2_e2enet.trainers import NAME`` imports any of them. nnU-Net is not imported before that.
"""

from nnunetv2_e2enet.registration import EXPERIMENTS, MODULES, TRAINER_MODULE, find_class


def __getattr__(name: str) -> type:
    found = find_class(name, (*MODULES[TRAINER_MODULE], EXPERIMENTS)) if name.startswith("nnUNetTrainer") else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
