"""A future nnU-Net whose interface has moved is named in one line, and its own trainers go on."""

import ast
import importlib
import inspect
import re
import sys
from typing import Any

import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from support import Project, make

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.planners.e2enet_planners import nnUNetPlannerE2ENet
from nnunetv2_e2enet.registration import MODULES, classes_for_nnunet, classes_of
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.training import planner, trainer
from nnunetv2_e2enet.training.interface import PLANNER_ATTRIBUTES, TRAINER_ATTRIBUTES, Overrides
from nnunetv2_e2enet.training.planner import E2ENetPlannerMixin
from nnunetv2_e2enet.training.trainer import E2ENetMixin

PAIRS = [(E2ENetMixin, nnUNetTrainer), (E2ENetPlannerMixin, ExperimentPlanner)]
TRAINER = nnUNetTrainerE2ENet_smoke.__name__


def future(original: type, without: str = "", **changed: Any) -> type:
    """A class of nnU-Net as it might become."""
    content = {name: value for name, value in vars(original).items() if name not in (without, "__dict__", "__weakref__")}
    return type(original.__name__, (), {**content, **changed})


def hooks(mixin: type) -> list[str]:
    content = {name: value for base in mixin.__mro__ for name, value in vars(base).items()}
    public = [name for name, value in content.items() if inspect.isroutine(value) and not name.startswith("_")]
    return sorted(set(public) - set(mixin.own_hooks))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("mixin", "original", "hook"), [(m, o, hook) for m, o in PAIRS for hook in hooks(m)])
def test_a_hook_that_is_gone_or_takes_something_else(mixin: Any, original: type, hook: str) -> None:
    type("Trainer", (mixin, future(original)), {})
    with pytest.raises(E2ENetError, match=rf"has no {original.__name__}\.{hook}: .* 2\.8\.0 and 2\.8\.1"):
        type("Trainer", (mixin, future(original, without=hook)), {})
    with pytest.raises(E2ENetError, match=rf"{original.__name__}\.{hook} .* takes \(self, other\), but \(.*\) was expected"):
        type("Trainer", (mixin, future(original, **{hook: lambda self, other: (self, other)})), {})


def test_variants_that_differ_from_nnunets_own_trainer_can_be_combined() -> None:
    class Old(nnUNetTrainer):
        @staticmethod
        def build_network_architecture(architecture_class_name: str, arch_init_kwargs: dict[str, Any]) -> None: ...  # type: ignore[override]

    Old.__module__ = "nnunetv2.training.nnUNetTrainer.variants.old"
    assert issubclass(type("Trainer", (E2ENetMixin, Old), {}), Overrides)


def test_trainer_attributes_that_are_gone(in_process: Project) -> None:
    instance = make(nnUNetTrainerE2ENet_smoke, in_process)
    del instance.was_initialized, instance.logger.local_logger
    missing = "was_initialized, logger.local_logger.verbose"
    with pytest.raises(SystemExit, match=f"E2ENet: {TRAINER} of the installed nnU-Net has no {missing}: ") as stop:
        instance.initialize()
    assert "\n" not in str(stop.value)


def test_a_method_that_is_gone(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which nothing is overridden; the topology is set before it is called."""
    instance = make(nnUNetTrainerE2ENet_smoke, in_process)
    monkeypatch.delattr(nnUNetTrainer, "configure_optimizers")
    with pytest.raises(SystemExit, match=f"E2ENet: {TRAINER} of the installed nnU-Net has no configure_optimizers: "):
        instance.initialize()


def test_planner_attributes_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExperimentPlanner, "__init__", lambda *_arguments: None)
    missing = ", ".join(PLANNER_ATTRIBUTES)
    with pytest.raises(SystemExit, match=f"E2ENet: nnUNetPlannerE2ENet of the installed nnU-Net has no {missing}: "):
        nnUNetPlannerE2ENet(1)


@pytest.mark.parametrize(
    ("module", "mixin", "names"),
    [(trainer, E2ENetMixin, TRAINER_ATTRIBUTES), (planner, E2ENetPlannerMixin, PLANNER_ATTRIBUTES)],
)
def test_everything_that_is_used_is_checked(module: Any, mixin: type, names: tuple[str, ...]) -> None:
    """Attributes of ``self`` that none of our methods sets are nnU-Net's."""
    of_self = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]
    defined = {name for base in mixin.__mro__ for name in vars(base)}
    ours = {node.attr for node in of_self if isinstance(node.ctx, ast.Store)} | defined
    theirs = {node.attr for node in of_self} - ours
    assert theirs
    assert theirs <= {name.split(".")[0] for name in names}


VARIANTS = "nnunetv2.training.nnUNetTrainer.variants"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (f"{VARIANTS}.data_augmentation.nnUNetTrainerNoMirroring", "nnUNetTrainerNoMirroring"),
        (f"{VARIANTS}.optimizer.nnUNetTrainerAdam", "nnUNetTrainerAdam3en4"),
    ],
)
def test_a_variant_that_has_moved(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The registered module has nothing to offer then, says so, and does not end nnU-Net's search."""
    importlib.import_module(module)
    monkeypatch.delitem(sys.modules, "nnunetv2_e2enet.trainers.e2enet_combined_trainers", raising=False)
    monkeypatch.delattr(f"{module}.{name}")
    assert classes_for_nnunet(*next(iter(MODULES.values()))) == {}
    message = capsys.readouterr().err
    assert re.fullmatch(rf"E2ENet is not available: cannot import name '{name}' .* update nnunetv2-e2enet\n", message)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(E2ENetError, match=re.escape(module)):
        classes_of("trainers.e2enet_combined_trainers")
