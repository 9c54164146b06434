"""The E2ENet planner; its plans are called nnUNetE2ENetPlans."""

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunetv2_e2enet.training.planner import E2ENetPlannerMixin

__all__ = ["nnUNetPlannerE2ENet"]


class nnUNetPlannerE2ENet(E2ENetPlannerMixin, ExperimentPlanner):
    """Plans whose networks are E2ENet, for the GPU memory that E2ENet needs."""
