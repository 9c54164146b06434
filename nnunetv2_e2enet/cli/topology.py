"""``e2enet topology``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nnunetv2_e2enet.cli.output import add_json_argument, check_folders, console_for, say_written, write_json
from nnunetv2_e2enet.errors import E2ENetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnunetv2_e2enet.evaluation.topology.sources import Fold

HELP = "connections that the training chose: their flows, changes, agreement of folds"

EXAMPLES = """\
examples:
  e2enet topology nnUNetTrainerE2ENet__nnUNetPlans__3d_fullres \\
    --report topology.html
  e2enet topology nnUNetTrainerE2ENet__nnUNetPlans__3d_fullres/fold_0 \\
    --figures figures
  e2enet topology checkpoint_final.pth --report topology.html
  e2enet topology FOLDER --json | jq '.folds[0].nodes'

FOLDER is an nnU-Net model folder, one of its fold folders, or a checkpoint
file. Nothing in a checkpoint is executed. A checkpoint alone holds the topology
and nnU-Net's log; how the topology came about is in topology_history.jsonl
beside it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="model folder, fold folder, or checkpoint file")
    parser.add_argument("--folds", nargs="+", default=[], metavar="F", help="folds of a model folder (default: all)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write one HTML page that needs nothing else")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write each figure as PNG and SVG")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    from nnunetv2_e2enet.evaluation.topology.export import print_topology
    from nnunetv2_e2enet.evaluation.topology.sources import read_topologies
    from nnunetv2_e2enet.training.checkpoints import newest_checkpoint

    if args.folds and (args.folder.is_file() or newest_checkpoint(args.folder) is not None):
        raise E2ENetError(f"--folds chooses folds of a model folder, but {args.folder} is one training: leave --folds out")
    check_folders(args, "report")
    console = console_for(args)
    with console.status("Reading checkpoints …"):
        folds = read_topologies(args.folder, args.folds)
    if args.json != "-":
        print_topology(console, folds)
    say_written(console, _write(args, folds, console))
    return 0


def _write(args: argparse.Namespace, folds: Sequence[Fold], console: Console) -> list[Path]:
    from nnunetv2_e2enet.evaluation.provenance import command_line, provenance
    from nnunetv2_e2enet.evaluation.topology.export import as_json

    facts = provenance(command_line("topology", [str(args.folder)]))
    written: list[Path] = []
    if args.report is not None or args.figures is not None:
        with console.status("Drawing …"):
            written += _draw(args, folds, facts)
    return written + write_json(args, as_json(folds, facts))


def _draw(args: argparse.Namespace, folds: Sequence[Fold], facts: dict[str, Any]) -> list[Path]:
    from nnunetv2_e2enet.evaluation.report.drawing import png, svg
    from nnunetv2_e2enet.evaluation.topology.figures import views
    from nnunetv2_e2enet.evaluation.topology.page import topology_html
    from nnunetv2_e2enet.files import make_writable, write

    drawn = views(folds)
    written = []
    if args.figures is not None:
        make_writable(args.figures)
        for view in drawn:
            if view.figure is not None:
                written += [args.figures / f"{view.key}.png", args.figures / f"{view.key}.svg"]
                write(written[-2], png(view.figure))
                write(written[-1], svg(view.figure))
    if args.report is not None:
        write(args.report, topology_html(folds, drawn, facts))
        written.append(args.report)
    return written
