"""The trainings of `make demo`: minutes on two CPU cores."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_e2enet.trainers.e2enet_trainers import nnUNetTrainerE2ENet

from nnunetv2_e2enet.training.variants import variant

SHORT = {"num_epochs": 10, "num_iterations_per_epoch": 20, "num_val_iterations_per_epoch": 4}

nnUNetTrainer_demo = variant(nnUNetTrainer, "demo", **SHORT)
nnUNetTrainerE2ENet_demo = variant(
    nnUNetTrainerE2ENet, "demo", **SHORT, topology_update_period=2, base_num_features=16, max_num_features=128
)

__all__ = ["nnUNetTrainerE2ENet_demo", "nnUNetTrainer_demo"]
