"""How the topology evolves: dynamic sparse feature fusion (paper, section 3.2). Pure torch; knows layers, not the network."""

from nnunetv2_e2enet.dsff.criteria import GradientGrowth, Growth, Importance, KernelL1Norm, RandomGrowth
from nnunetv2_e2enet.dsff.distribution import Distribution, ErdosRenyiKernel, Uniform
from nnunetv2_e2enet.dsff.schedule import CosineSchedule, Schedule, StaticSchedule
from nnunetv2_e2enet.dsff.updater import TopologyUpdate, TopologyUpdater, explored_share, random_topology, sparsity

__all__ = [
    "CosineSchedule",
    "Distribution",
    "ErdosRenyiKernel",
    "GradientGrowth",
    "Growth",
    "Importance",
    "KernelL1Norm",
    "RandomGrowth",
    "Schedule",
    "StaticSchedule",
    "TopologyUpdate",
    "TopologyUpdater",
    "Uniform",
    "explored_share",
    "random_topology",
    "sparsity",
]
