"""``e2enet compare``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nnunetv2_e2enet.cli.output import add_json_argument, check_folders, console_for, say_written, step_bar, write_json
from nnunetv2_e2enet.errors import E2ENetError, check_extra

if TYPE_CHECKING:
    from nnunetv2_e2enet.evaluation.comparison import Comparison
    from nnunetv2_e2enet.evaluation.labels import Labels

NEEDED = ("monai", "scikit_posthocs", "statsmodels")
"""Modules of the extra ``evaluation``."""

HELP = "compare trained models: accuracy with its uncertainty, costs, failures; table, CSV, JSON, HTML report"

EXAMPLES = """examples:
  e2enet compare nnUNetTrainerE2ENet__nnUNetPlans__3d_fullres \\
    nnUNetTrainer__nnUNetPlans__3d_fullres --report out.html
  e2enet compare E2ENet=FOLDER_A nnU-Net=FOLDER_B --folds 0 1 \\
    --tolerance 2 --tolerance pancreas=5
  e2enet compare S70=PRED_A S80=PRED_B S90=PRED_C \\
    --reference labelsTs --csv cases.csv
  e2enet compare A B --json | jq '.means.dice'

FOLDER is an nnU-Net model folder, whose validation predictions are compared, or
a folder of predictions. References are looked up in nnUNet_preprocessed and
nnUNet_raw by the name of the data set, unless --reference names their folder.

exit code: 0 compared, 1 the input cannot be compared (standard error says why),
2 wrong usage, 130 Ctrl-C. What was measured before an interruption is kept, and
the next run goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("results", nargs="+", metavar="[NAME=]FOLDER", help="two or more results")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="reference segmentations")
    parser.add_argument("--folds", nargs="+", metavar="F", help="folds of model folders (default: all that are finished)")
    parser.add_argument("--common", action="store_true", help="compare the cases that all have, and leave out the others")
    parser.add_argument("--dataset-json", type=Path, metavar="FILE", help="file with the labels of folders of predictions")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="model folder of a folder of predictions, for its costs",
    )
    parser.add_argument(
        "--tolerance",
        action="append",
        default=[],
        metavar="[CLASS=]MM",
        help="tolerance of the surface Dice, for all classes or one (default: 1)",
    )
    parser.add_argument(
        "--weights",
        nargs=2,
        type=float,
        default=(1.0, 1.0),
        metavar=("A1", "A2"),
        help="weights of the trade-off score (default: 1 1)",
    )
    parser.add_argument(
        "--failure-dice",
        type=float,
        default=0.5,
        metavar="D",
        help="classes below it, or at 0, are failures (default: %(default)s)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="measure memory and time of the models too, as `e2enet profile` does"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--report", type=Path, metavar="FILE", help="write one HTML page that needs nothing else")
    output.add_argument("--images", type=Path, metavar="DIR", help="images for the report (default: imagesTr of the data set)")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each case, model and class")
    add_json_argument(output)
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: one for each core they may use, at most one for four cases)",
    )
    work.add_argument("--cache", type=Path, metavar="DIR", help="folder of measured cases (default: the user's cache)")
    work.add_argument("--no-cache", action="store_true", help="measure all cases, keep nothing")


def run(args: argparse.Namespace) -> int:
    check_extra("comparing", "evaluation", *NEEDED)
    _check(args)
    console = console_for(args)
    _write(args, _compare(args, console), console)
    return 0


def _check(args: argparse.Namespace) -> None:
    check_folders(args, "report", "csv")
    if args.workers is not None and args.workers < 1:
        raise E2ENetError(f"--workers {args.workers}: at least one is needed")
    if min(args.weights) < 0:
        raise E2ENetError(f"--weights {args.weights[0]:g} {args.weights[1]:g}: expected numbers from 0")
    if args.seed < 0:
        raise E2ENetError(f"--seed {args.seed}: expected a number from 0")
    if args.images is not None and not args.images.is_dir():
        raise E2ENetError(f"--images: {args.images} is not a folder: expected the images")
    if not 0 <= args.failure_dice <= 1:
        raise E2ENetError(f"--failure-dice {args.failure_dice:g}: expected a Dice, from 0 to 1")


def _compare(args: argparse.Namespace, console: Console) -> Comparison:
    from joblib import cpu_count

    from nnunetv2_e2enet.evaluation.cases import match_cases
    from nnunetv2_e2enet.evaluation.comparison import compare, model_facts
    from nnunetv2_e2enet.evaluation.measure import default_cache, measure
    from nnunetv2_e2enet.evaluation.sources import find_reference, read_sources

    with console.status("Looking at the folders …"):
        sources = read_sources(args.results, args.folds, args.dataset_json, args.model)
        labels = sources[0].labels
        tolerances = _tolerances(args.tolerance, labels)
        cases = match_cases(sources, find_reference(sources, args.reference), args.common)
    cache = None if args.no_cache else args.cache or default_cache()
    workers = args.workers or min(cpu_count(), max(1, len(cases) // 4))
    names = [source.name for source in sources]
    columns = (TextColumn("Measuring predictions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        results = measure(names, cases, labels, tolerances, cache, workers, tell)
    with console.status("Counting costs …"):
        facts = [model_facts(source) for source in sources]
    with console.status("Statistics …"):
        comparison = compare(facts, labels, tolerances, results, tuple(args.weights), args.failure_dice, args.seed)
    return _measured(comparison, console) if args.measure else comparison


def _measured(comparison: Comparison, console: Console) -> Comparison:
    """The comparison with memory and time of the models whose folders are known."""
    import torch

    from nnunetv2_e2enet.evaluation.networks import model_design
    from nnunetv2_e2enet.evaluation.profile import ProfileSettings, profile, steps

    settings = ProfileSettings("cuda" if torch.cuda.is_available() else "cpu", threads=torch.get_num_threads())
    sources = [facts.source for facts in comparison.models if facts.costs is not None]
    designs = [model_design(source.model, source.name) for source in sources if source.model is not None]
    with step_bar(console, steps(designs, settings)) as tell:
        return replace(comparison, profiles=profile(designs, settings, tell), settings=settings)


def _tolerances(given: list[str], labels: Labels) -> list[float]:
    """Millimetres for each class, from ``MM`` and ``CLASS=MM``; a class's own counts more than that for all."""
    default, own = 1.0, {}
    for text in given:
        name, sign, number = text.rpartition("=")
        try:
            mm = float(number)
        except ValueError:
            raise E2ENetError(f"--tolerance {text}: {number!r} is not a number of mm, as in 2 or pancreas=5") from None
        if not 0 <= mm < float("inf"):
            raise E2ENetError(f"--tolerance {text}: expected mm from 0")
        if sign and name not in labels.names:
            raise E2ENetError(f"--tolerance {text}: there is no class {name}, but {', '.join(labels.names)}")
        if sign:
            own[name] = mm
        else:
            default = mm
    return [own.get(name, default) for name in labels.names]


def _write(args: argparse.Namespace, comparison: Comparison, console: Console) -> None:
    from nnunetv2_e2enet.evaluation.comparison_tables import print_comparison
    from nnunetv2_e2enet.evaluation.export import as_csv, as_json
    from nnunetv2_e2enet.evaluation.provenance import command_line, provenance
    from nnunetv2_e2enet.files import write

    facts = provenance(command_line("compare", args.results))
    if args.json != "-":
        print_comparison(console, comparison)
    written: list[Path] = []
    if args.report is not None:
        with console.status("Drawing the report …"):
            write(args.report, _report(args, comparison, facts))
        written.append(args.report)
    if args.csv is not None:
        write(args.csv, as_csv(comparison))
        written.append(args.csv)
    written += write_json(args, as_json(comparison, facts))
    say_written(console, written)


def _report(args: argparse.Namespace, comparison: Comparison, facts: dict[str, Any]) -> str:
    from nnunetv2_e2enet.evaluation.report.page import report_html
    from nnunetv2_e2enet.evaluation.report.pictures import pictures
    from nnunetv2_e2enet.evaluation.sources import find_images

    images = find_images([model.source for model in comparison.models], args.images)
    return report_html(comparison, pictures(comparison, images), facts)
