"""Settings of a training whose effect benchmarks/hippocampus.py measures: trainers that stand in the table of contestants."""

from nnunetv2_e2enet.trainers.e2enet_trainers import nnUNetTrainerE2ENet_S90
from nnunetv2_e2enet.training.variants import variant

nnUNetTrainerE2ENet_S90_T1 = variant(nnUNetTrainerE2ENet_S90, "T1", topology_update_period=1)
nnUNetTrainerE2ENet_S90_gain05 = variant(nnUNetTrainerE2ENet_S90, "gain05", initial_gain=0.5)
