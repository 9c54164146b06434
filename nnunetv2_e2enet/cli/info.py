"""``e2enet info``."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nnunetv2_e2enet import __version__
from nnunetv2_e2enet.cli.output import plain_console
from nnunetv2_e2enet.registration import (
    EXPERIMENTS,
    REGISTER_EXPERIMENTS,
    TRAINER_MODULE,
    NnUNet,
    find_any_nnunet,
    find_in_nnunet,
    find_nnunet,
    has_experiments,
    is_ours,
    line_that_serves_the_trainers,
    load_classes,
    registered_files,
    registered_modules,
)

HELP = "show versions, device, registration, and what nnU-Net finds; or what a packed model holds"
# Shorter trainings, experiments, and what is no training for results. `--all` lists them.
_NOT_MAIN = re.compile(r"_\d+epochs?$|_demo$|_smoke$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="packed model to describe, not this environment")
    parser.add_argument("--all", action="store_true", help="list all trainers that nnU-Net finds, not the main ones alone")
    parser.add_argument(
        "--json", action="store_true", help="everything as JSON, for other programs and for reports of problems"
    )


def run(args: argparse.Namespace) -> int:
    console = plain_console(soft_wrap=True)
    if args.file is not None:
        find_nnunet()
        model = _model(args.file)
        print(json.dumps(model, indent=1)) if args.json else _print_facts(console, _model_facts(model))
        return 0
    report = _report(find_any_nnunet())
    if args.json:
        print(json.dumps(asdict(report), indent=1))
        return 0
    _print_facts(console, _facts(report))
    for kind, search in report.classes.items():
        _print_search(console, kind, search, args.all)
    if not report.experiments_registered:
        experiments = load_classes([EXPERIMENTS])
        count = len(experiments.found)
        _print_heading(console, f"{count} experiment trainers are not registered", f": {REGISTER_EXPERIMENTS}")
        _print_missing(console, experiments.missing)
    return 0


@dataclass(frozen=True)
class Search:
    """The classes of one kind that nnU-Net finds.

    Attributes:
        found: names.
        missing: why nnU-Net does not find a class, by its name, or by the name of its module.
        ended: the error with which nnU-Net's search ended, None without one.
    """

    found: list[str]
    missing: dict[str, str]
    ended: str | None = None


@dataclass(frozen=True)
class Report:
    """This environment.

    Attributes:
        versions: by package, and of Python.
        platform: the operating system and machine.
        nnunet: the folder of nnU-Net's package.
        nnunet_problem: why this package does not work with it, and what to do; empty if it does.
        device: on which networks are trained by default.
        engine: see ``nnunetv2_e2enet.engine.Status``.
        scans: in whose way whole scans are predicted around the network, in words.
        gpu_kernels: whether they are used, in words.
        registration: by file in nnU-Net's folders: "registered", "not registered" or "not written by e2enet".
        experiments_registered: whether nnU-Net finds the experiment trainers.
        classes: what nnU-Net finds, by kind: "trainer", "planner".
    """

    versions: dict[str, str]
    platform: str
    nnunet: str
    nnunet_problem: str
    device: str
    engine: dict[str, Any]
    scans: str
    gpu_kernels: str
    registration: dict[str, str]
    experiments_registered: bool
    classes: dict[str, Search]


def _report(nnunet: NnUNet) -> Report:
    from nnunetv2_e2enet import engine
    from nnunetv2_e2enet.network.acceleration import kernels_status
    from nnunetv2_e2enet.prediction import why_never

    reason = why_never()
    status = asdict(engine.status())
    modules = registered_modules(has_experiments(nnunet))
    kinds = {"trainer" if target == TRAINER_MODULE else "planner": names for target, names in modules.items()}
    return Report(
        versions={
            "nnunetv2-e2enet": __version__,
            "nnunetv2": nnunet.version,
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        platform=platform.platform(),
        nnunet=str(nnunet.folder),
        nnunet_problem=nnunet.problem,
        device=_device(),
        engine={**status, "library": None if status["library"] is None else str(status["library"])},
        scans="predicted by this package, with nnU-Net's result" if reason is None else f"in nnU-Net's own way: {reason}",
        gpu_kernels=kernels_status(),
        registration={str(path): _state(text) for path, text in registered_files(nnunet).items()},
        experiments_registered=has_experiments(nnunet),
        classes={kind: _search(kind, names) for kind, names in kinds.items()},
    )


def _state(text: str | None) -> str:
    return "registered" if is_ours(text) else "not registered" if text is None else "not written by e2enet"


def _search(kind: str, modules: tuple[str, ...]) -> Search:
    classes = load_classes(modules)
    try:
        found = [name for name in classes.found if FINDERS[kind](name)]
    except Exception as error:  # noqa: BLE001 (nnU-Net imports all its modules in search of a class; any of them may fail)
        return Search([], classes.missing, f"{type(error).__name__}: {error}")
    unseen = {name: "nnU-Net does not find it: e2enet register" for name in classes.found if name not in found}
    return Search(found, {**classes.missing, **unseen})


def _facts(report: Report) -> dict[str, str]:
    facts = {
        **report.versions,
        "nnunetv2": f"{report.versions['nnunetv2']} in {report.nnunet}",
        **({"problem": report.nnunet_problem} if report.nnunet_problem else {}),
        "device": report.device,
        "engine": report.engine["reason"],
        "scans on a CPU": report.scans,
        "GPU kernels": report.gpu_kernels,
    }
    for path, state in report.registration.items():
        facts[Path(path).name] = f"{state} in {Path(path).parent}"
    if set(report.registration.values()) != {"registered"}:
        facts["to register"] = "e2enet register"
        facts["or, for the trainers"] = line_that_serves_the_trainers()
    return facts


def _print_facts(console: Console, facts: dict[str, str]) -> None:
    for label, value in facts.items():
        console.print(Text.assemble((f"{label:<24}", "bold"), value))


def _print_heading(console: Console, heading: str, more: str = "") -> None:
    console.print(Text.assemble("\n", (heading, "bold"), more))


def _print_search(console: Console, kind: str, search: Search, everything: bool) -> None:
    if search.ended is not None:
        _print_heading(console, f"nnU-Net finds no {kind}s", f": its search ended with {search.ended}")
        return
    _print_heading(console, f"nnU-Net finds {len(search.found)} of {len(search.found) + len(search.missing)} {kind}s")
    shown = search.found if everything else _main(search.found)
    for name in shown:
        console.print(f"  {name}")
    if len(shown) < len(search.found):
        console.print(f"  and {len(search.found) - len(shown)} more: e2enet info --all")
    _print_missing(console, search.missing)


def _print_missing(console: Console, missing: dict[str, str]) -> None:
    for name, reason in missing.items():
        console.print(f"  not {name}: {reason}")


def _main(names: list[str]) -> list[str]:
    experiments = load_classes([EXPERIMENTS]).found
    return [name for name in names if name not in experiments and not _NOT_MAIN.search(name)]


def _model(path: Path) -> dict[str, Any]:
    """The content of a packed model without its weights."""
    from nnunetv2_e2enet.deployment import read_packed

    model = read_packed(path)
    description = model.description
    plans, settings = description.managers()
    network = description.network()
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "written_by": description.written_by,
        "trainer": description.trainer,
        "configuration": description.configuration,
        "plans": plans.plans_name,
        "dataset": plans.dataset_name,
        "folds": description.folds,
        "checkpoint": description.checkpoint,
        "network": type(network).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "active_parameters": model.active_weights,
        "feature_sparsity": network.feature_sparsity,
        "channels": description.channel_names,
        "labels": description.dataset["labels"],
        "patch_size": settings.patch_size,
        "spacing": settings.spacing,
        "mirroring_axes": description.mirroring_axes or [],
        "postprocessing": description.postprocessing,
    }


def _model_facts(model: dict[str, Any]) -> dict[str, str]:
    active, steps = f"{model['active_parameters']} active (S = {model['feature_sparsity']})", model["postprocessing"]
    return {
        "file": f"{model['file']}, {model['bytes'] / 1e6:.2f} MB, written by {model['written_by']}",
        "trained by": f"{model['trainer']}, {model['configuration']} of {model['plans']}, {model['dataset']}",
        "folds": f"{', '.join(model['folds'])} ({model['checkpoint']})",
        "network": f"{model['network']}, {model['parameters']} parameters, {active}",
        "channels": ", ".join(f"{number} {name}" for number, name in model["channels"].items()),
        "labels": ", ".join(f"{values} {name}" for name, values in model["labels"].items()),
        "patch, spacing": f"{model['patch_size']}, {[round(s, 4) for s in model['spacing']]} mm",
        "mirroring axes": str(model["mirroring_axes"] or "none"),
        "postprocessing": f"largest component of labels {steps}" if steps else "none",
    }


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (cuda)"
    return f"CPU, {torch.get_num_threads()} threads"


def _finds_trainer(name: str) -> bool:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with redirect_stdout(StringIO()):  # nnU-Net narrates its search in nnUNet_extTrainer
        return recursive_find_trainer_class_by_name(name) is not None


def _finds_planner(name: str) -> bool:
    return find_in_nnunet("experiment_planning", name) is not None


FINDERS: dict[str, Callable[[str], bool]] = {"trainer": _finds_trainer, "planner": _finds_planner}
