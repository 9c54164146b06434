"""``e2enet info``."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from nnunetv2_e2enet import __version__
from nnunetv2_e2enet.registration import (
    MODULES,
    PLANNER_FOLDER,
    TRAINER_FOLDER,
    NnUNet,
    class_names,
    find_nnunet,
    is_ours,
    registered_files,
    trainers_folder,
)

HELP = "show versions, device, registration, and what nnU-Net finds; or what a packed model holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="of e2enet export: show what it holds instead")


def run(args: argparse.Namespace) -> int:
    nnunet = find_nnunet()
    console = Console(soft_wrap=True, highlight=False)
    if args.file is not None:
        _print_facts(console, _model_facts(args.file))
        return 0
    _print_facts(console, _facts(nnunet))
    for kind, names in our_classes().items():
        _print_found(console, kind, names)
    return 0


def _print_facts(console: Console, facts: dict[str, str]) -> None:
    for label, value in facts.items():
        console.print(f"[bold]{label:<24}[/]{escape(value)}")


def _model_facts(path: Path) -> dict[str, str]:
    from nnunetv2_e2enet.deployment import read_packed

    model = read_packed(path)
    description = model.description
    plans, settings = description.managers()
    network = description.network()
    parameters = sum(p.numel() for p in network.parameters())
    channels = description.dataset.get("channel_names") or description.dataset["modality"]
    steps = description.postprocessing
    return {
        "file": f"{path}, {path.stat().st_size / 1e6:.2f} MB, written by {description.written_by}",
        "trained by": f"{description.trainer}, {description.configuration} of {plans.plans_name}, {plans.dataset_name}",
        "folds": f"{', '.join(description.folds)} ({description.checkpoint})",
        "network": f"E2ENet, {parameters} parameters, {model.active_weights} active (S = {network.feature_sparsity})",
        "channels": ", ".join(f"{number} {name}" for number, name in channels.items()),
        "labels": ", ".join(f"{values} {name}" for name, values in description.dataset["labels"].items()),
        "patch, spacing": f"{settings.patch_size}, {[round(s, 4) for s in settings.spacing]} mm",
        "mirroring axes": str(description.mirroring_axes or "none"),
        "postprocessing": f"largest component of labels {steps}" if steps else "none",
    }


def _facts(nnunet: NnUNet) -> dict[str, str]:
    from nnunetv2_e2enet import engine
    from nnunetv2_e2enet.network.acceleration import kernels_status

    facts = {
        "nnunetv2-e2enet": __version__,
        "nnunetv2": f"{nnunet.version} in {nnunet.folder}",
        "torch": version("torch"),
        "python": platform.python_version(),
        "device": _device(),
        "engine": engine.status().reason,
        "GPU kernels": kernels_status(),
    }
    files = registered_files(nnunet)
    for path, text in files.items():
        state = "registered" if is_ours(text) else "not registered" if text is None else "not written by e2enet"
        facts[path.name] = f"{state} in {path.parent}"
    if not all(is_ours(text) for text in files.values()):
        facts["to register"] = "e2enet register"
        facts["or, for the trainers"] = f"export nnUNet_extTrainer={trainers_folder()}"
    return facts


def _print_found(console: Console, kind: str, names: list[str]) -> None:
    try:
        found = [name for name in names if FINDERS[kind](name)]
    except Exception as error:  # noqa: BLE001 (nnU-Net imports all its modules in search of a class; any of them may fail)
        console.print(f"\n[bold]nnU-Net finds no {kind}s[/]: its search ended with {type(error).__name__}: {error}")
        return
    console.print(f"\n[bold]nnU-Net finds {len(found)} of {len(names)} {kind}s[/]")
    for name in found:
        console.print(f"  {name}")


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (cuda)"
    return f"CPU, {torch.get_num_threads()} threads"


def our_classes() -> dict[str, list[str]]:
    """Names of our trainers and planners, by kind."""
    classes: dict[str, list[str]] = {kind: [] for kind in FINDERS}
    for target, modules in MODULES.items():
        kind = "trainer" if target.parent == TRAINER_FOLDER else "planner"
        for module in modules:
            classes[kind] += class_names(module)
    return {kind: sorted(names) for kind, names in classes.items()}


def _finds_trainer(name: str) -> bool:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with redirect_stdout(StringIO()):  # nnU-Net narrates its search in nnUNet_extTrainer
        return recursive_find_trainer_class_by_name(name) is not None


def _finds_planner(name: str) -> bool:
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = str(Path(nnunetv2.__path__[0]) / PLANNER_FOLDER)
    return recursive_find_python_class(folder, name, "nnunetv2.experiment_planning") is not None


FINDERS: dict[str, Callable[[str], bool]] = {"trainer": _finds_trainer, "planner": _finds_planner}
