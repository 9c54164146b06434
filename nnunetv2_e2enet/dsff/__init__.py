"""How the topology evolves: dynamic sparse feature fusion (paper, section 3.2). Needs torch and maskable layers."""

from nnunetv2_e2enet.dsff.criteria import GradientGrowth, Growth, Importance, InputScaledL1Norm, KernelL1Norm, RandomGrowth
from nnunetv2_e2enet.dsff.distribution import Distribution, ErdosRenyiKernel, Uniform
from nnunetv2_e2enet.dsff.history import HISTORY_FILE, History, Part, TopologyHistory, TopologyRecord, read_history
from nnunetv2_e2enet.dsff.schedule import CosineSchedule, Schedule, StaticSchedule
from nnunetv2_e2enet.dsff.updater import TopologyUpdate, TopologyUpdater, explored_share, random_topology, sparsity

__all__ = [
    "HISTORY_FILE",
    "CosineSchedule",
    "Distribution",
    "ErdosRenyiKernel",
    "GradientGrowth",
    "Growth",
    "History",
    "Importance",
    "InputScaledL1Norm",
    "KernelL1Norm",
    "Part",
    "RandomGrowth",
    "Schedule",
    "StaticSchedule",
    "TopologyHistory",
    "TopologyRecord",
    "TopologyUpdate",
    "TopologyUpdater",
    "Uniform",
    "explored_share",
    "random_topology",
    "read_history",
    "sparsity",
]
