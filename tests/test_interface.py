"""A future nnU-Net whose interface has moved is named in one line, and its own trainers go on."""

import ast
import functools
import importlib
import inspect
import re
import sys
from typing import Any

import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from support import Project, make, train_epochs

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.planners.e2enet_planners import nnUNetPlannerE2ENet
from nnunetv2_e2enet.registration import MODULES, TRAINER_MODULE, classes_for_nnunet, find_class
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.training import dsff, network, planner, trainer
from nnunetv2_e2enet.training.interface import Overrides
from nnunetv2_e2enet.training.planner import E2ENetPlannerMixin
from nnunetv2_e2enet.training.timed import TimedMixin
from nnunetv2_e2enet.training.trainer import E2ENetMixin
from nnunetv2_e2enet.training.variants import variant

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


EVERY_HOOK = pytest.mark.parametrize(("mixin", "original", "hook"), [(m, o, hook) for m, o in PAIRS for hook in hooks(m)])


@EVERY_HOOK
def test_a_hook_that_is_gone_or_takes_something_else(mixin: Any, original: type, hook: str) -> None:
    type("Trainer", (mixin, future(original)), {})
    with pytest.raises(E2ENetError, match=rf"has no {original.__name__}\.{hook}: .* 2\.8\.0 and 2\.8\.1"):
        type("Trainer", (mixin, future(original, without=hook)), {})
    with pytest.raises(E2ENetError, match=rf"{original.__name__}\.{hook} .* takes \(self, other\), but \(.*\) was expected"):
        type("Trainer", (mixin, future(original, **{hook: lambda self, other: (self, other)})), {})


def with_parameter(method: Any, added: inspect.Parameter, place: int | None = None) -> Any:
    """A method of nnU-Net as it might become: with one parameter more, at the end unless a place is named."""
    function = getattr(method, "__func__", method)
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    parameters.insert(len(parameters) if place is None else place, added)

    @functools.wraps(function)
    def changed(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    changed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return staticmethod(changed) if isinstance(method, staticmethod) else changed


@EVERY_HOOK
def test_a_hook_with_a_parameter_more(mixin: Any, original: type, hook: str) -> None:
    """An optional one behind the others is nobody's business; one that has to be passed, or shifts the others, is."""
    method = vars(original)[hook]
    optional = inspect.Parameter("added", inspect.Parameter.KEYWORD_ONLY, default=None)
    required = inspect.Parameter("added", inspect.Parameter.KEYWORD_ONLY)
    shifting = inspect.Parameter("added", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    type("Trainer", (mixin, future(original, **{hook: with_parameter(method, optional)})), {})
    for added, place in ((required, None), (shifting, 0)):
        with pytest.raises(E2ENetError, match=rf"{original.__name__}\.{hook} .* takes \(.*added.*\), but \(.*\) was expected"):
            type("Trainer", (mixin, future(original, **{hook: with_parameter(method, added, place)})), {})


def test_a_trainer_whose_constructor_takes_an_option_more(in_process: Project) -> None:
    """It is made, initialized and trained as before."""

    class Newer(nnUNetTrainer):
        def __init__(
            self, plans: Any, configuration: str, fold: int, dataset_json: Any, device: Any, added: Any = None
        ) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.added = added

    Newer.__module__ = "nnunetv2.training.nnUNetTrainer.newer"
    instance = make(
        variant(type("Trainer", (E2ENetMixin, Newer), {}), "small", base_num_features=4, max_num_features=8), in_process
    )
    instance.initialize()
    train_epochs(instance, 1)
    assert instance.current_epoch == 1


def test_variants_that_differ_from_nnunets_own_trainer_can_be_combined() -> None:
    class Old(nnUNetTrainer):
        def save_checkpoint(self, filename: str, everything: bool) -> None: ...  # type: ignore[override]

    Old.__module__ = "nnunetv2.training.nnUNetTrainer.variants.old"
    assert issubclass(type("Trainer", (E2ENetMixin, Old), {}), Overrides)


def used_of_nnunet(mixin: type, *modules: Any) -> list[str]:
    """Attributes of ``self`` that the mixins of some modules read, and that none of their methods sets."""
    of_self = [
        node
        for module in modules
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]
    ours = {node.attr for node in of_self if isinstance(node.ctx, ast.Store)} | {
        n for base in mixin.__mro__ for n in vars(base)
    }
    return sorted({node.attr for node in of_self} - ours)


def remove(instance: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nnU-Net had no such attribute, be it the instance's or a class's."""
    if name in vars(instance):
        delattr(instance, name)
    for cls in type(instance).__mro__:
        if name in vars(cls):
            monkeypatch.delattr(cls, name)


@pytest.mark.parametrize("name", [*used_of_nnunet(E2ENetMixin, network, dsff, trainer), "configure_optimizers"])
def test_trainer_attributes_that_are_gone(in_process: Project, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = make(nnUNetTrainerE2ENet_smoke, in_process)
    remove(instance, name, monkeypatch)
    with pytest.raises(SystemExit, match=rf"^E2ENet: {TRAINER} of the installed nnU-Net has no {name}\b.*: ") as stop:
        instance.initialize()
    assert "\n" not in str(stop.value)


def test_several_trainer_attributes_that_are_gone(in_process: Project) -> None:
    """All of them are named, also one of nnU-Net's logger."""
    instance = make(nnUNetTrainerE2ENet_smoke, in_process)
    del instance.was_initialized, instance.logger.local_logger
    missing = "was_initialized, logger.local_logger.verbose"
    with pytest.raises(SystemExit, match=f"E2ENet: {TRAINER} of the installed nnU-Net has no {missing}: "):
        instance.initialize()


@pytest.mark.parametrize("name", used_of_nnunet(E2ENetPlannerMixin, planner))
def test_planner_attributes_that_are_gone(in_process: Project, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    initialize = ExperimentPlanner.__init__

    def initialize_without(self: ExperimentPlanner, *arguments: Any) -> None:
        initialize(self, *arguments)
        remove(self, name, monkeypatch)

    monkeypatch.setattr(ExperimentPlanner, "__init__", initialize_without)
    with pytest.raises(SystemExit, match=f"E2ENet: nnUNetPlannerE2ENet of the installed nnU-Net has no {name}: ") as stop:
        nnUNetPlannerE2ENet(in_process.dataset)
    assert "\n" not in str(stop.value)


VARIANTS = "nnunetv2.training.nnUNetTrainer.variants"
COMBINED = "nnunetv2_e2enet.trainers.e2enet_combined_trainers"
REGISTERED = MODULES[TRAINER_MODULE]


@pytest.fixture
def newly_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: no combination has been built yet."""
    monkeypatch.delitem(sys.modules, COMBINED, raising=False)


@pytest.mark.usefixtures("newly_combined")
@pytest.mark.parametrize(
    ("variant_module", "variant_name", "ours"),
    [
        ("data_augmentation.nnUNetTrainerNoMirroring", "nnUNetTrainerNoMirroring", "nnUNetTrainerE2ENet_NoMirroring"),
        ("optimizer.nnUNetTrainerAdam", "nnUNetTrainerAdam3en4", "nnUNetTrainerE2ENet_Adam3en4"),
    ],
)
def test_a_variant_that_has_moved(
    variant_module: str, variant_name: str, ours: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It costs its own combination alone, and is said once."""
    usual = classes_for_nnunet(*REGISTERED)
    monkeypatch.delitem(sys.modules, COMBINED)
    importlib.import_module(f"{VARIANTS}.{variant_module}")
    monkeypatch.delattr(f"{VARIANTS}.{variant_module}.{variant_name}")
    assert usual.keys() - classes_for_nnunet(*REGISTERED).keys() == {ours}
    message = capsys.readouterr().err
    assert re.fullmatch(rf"E2ENet goes on without {ours}: .*'{variant_name}'.* update nnunetv2-e2enet\n", message)


@pytest.mark.usefixtures("newly_combined")
def test_a_module_of_variants_that_has_moved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds the bases of two combinations, which are named together."""
    module = f"{VARIANTS}.data_augmentation.nnUNetTrainerNoMirroring"
    monkeypatch.setitem(sys.modules, module, None)
    classes = classes_for_nnunet(*REGISTERED)
    lost = {"nnUNetTrainerE2ENet_NoMirroring", "nnUNetTrainerE2ENet_onlyMirror01"}
    assert not lost & classes.keys()
    assert {"nnUNetTrainerE2ENet_S90_50epochs", "nnUNetTrainerE2ENet_DA5", "nnUNetTrainer_smoke"} < classes.keys()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(name in message for name in (*lost, module))
    with pytest.raises(E2ENetError, match=re.escape(module)):
        find_class("nnUNetTrainerE2ENet_onlyMirror01", REGISTERED)


def test_a_module_of_ours_that_nnunet_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It costs what it holds; the other modules stay."""
    module = "nnunetv2_e2enet.trainers.e2enet_demo_trainers"
    gone = ModuleNotFoundError("No module named 'nnunetv2.moved'", name="nnunetv2.moved")
    importer = importlib.import_module

    def without_demo(name: str) -> Any:
        if name == module:
            raise gone
        return importer(name)

    monkeypatch.setattr(importlib, "import_module", without_demo)
    classes = classes_for_nnunet(*REGISTERED)
    assert "nnUNetTrainerE2ENet" in classes
    assert "nnUNetTrainerE2ENet_smoke" not in classes
    assert capsys.readouterr().err.startswith(
        "E2ENet goes on without trainers.e2enet_demo_trainers: No module named 'nnunetv2.moved'"
    )


def test_a_mixin_behind_nnunets_trainer_is_refused() -> None:
    """Its methods would not be called: the training would be nnU-Net's, under E2ENet's name."""
    with pytest.raises(
        E2ENetError,
        match=r"Late has nnUNetTrainer before E2ENetMixin, .* name E2ENetMixin first among the bases of Late",
    ):

        class Late(nnUNetTrainerDA5, E2ENetMixin):
            pass

    class Right(E2ENetMixin, nnUNetTrainerDA5):
        pass

    class Between(nnUNetTrainerDA5, nnUNetTrainerE2ENet_smoke):  # whose mixin comes before nnU-Net's trainer all the same
        pass

    class InNnunetsFolder(E2ENetMixin, nnUNetTrainer):
        __module__ = "nnunetv2.training.nnUNetTrainer.mine"

    class OwnMixin(TimedMixin):
        pass

    with pytest.raises(E2ENetError, match="Further has nnUNetTrainer before OwnMixin"):

        class Further(nnUNetTrainerDA5, OwnMixin):
            pass


def test_methods_of_the_users_own_are_nobodys_business() -> None:
    class Mixin(E2ENetMixin):
        def helper(self) -> int:
            return 1

    class Trainer(Mixin, nnUNetTrainer):
        pass

    assert issubclass(Trainer, Mixin)


def test_a_trainer_with_a_network_of_its_own_is_refused() -> None:
    with pytest.raises(E2ENetError, match="Joined joins E2ENet with nnUNetTrainerBN, which builds a network of its own"):

        class Joined(E2ENetMixin, nnUNetTrainerBN):
            pass
