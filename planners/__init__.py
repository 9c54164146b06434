"""What ``nnUNetv2_plan_experiment -pl`` finds.

``from nnunetv2_e2enet.planners import NAME`` finds each of the classes, and imports nnU-Net no sooner than that.
"""

from nnunetv2_e2enet.registration import MODULES, PLANNER_MODULE, find_class


def __getattr__(name: str) -> type:
    found = find_class(name, MODULES[PLANNER_MODULE]) if name.startswith("nnUNetPlanner") else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
