"""Settings of a training whose effect on Dice benchmarks/hippocampus.py measures: trainers for the table of contestants."""

from nnunetv2_e2enet.trainers.e2enet_trainers import nnUNetTrainerE2ENet_S90


class S90UpdateEachEpoch(nnUNetTrainerE2ENet_S90):
    """Five times as many updates of the topology."""

    topology_update_period = 1


class S90HalfGain(nnUNetTrainerE2ENet_S90):
    """Initial weights of maskable layers are half as large, which acts like a larger learning rate."""

    initial_gain = 0.5
