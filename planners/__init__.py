"""The planners for ``nnUNetv2_plan_experiment -pl``.

``from nnunetv2_e2enet.planners import NAME`` imports any of them. nnU-Net is not imported before that.
"""

from nnunetv2_e2enet.registration import MODULES, PLANNER_MODULE, find_class


def __getattr__(name: str) -> type:
    found = find_class(name, MODULES[PLANNER_MODULE]) if name.startswith("nnUNetPlanner") else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
