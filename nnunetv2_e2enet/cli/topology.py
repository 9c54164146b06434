"""``e2enet topology``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nnunetv2_e2enet.errors import E2ENetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnunetv2_e2enet.evaluation.topology.sources import Fold

HELP = "see what the fusion learned: where connections come from, how they changed, whether folds agree"

EXAMPLES = """\
examples:
  e2enet topology nnUNetTrainerE2ENet__nnUNetPlans__3d_fullres --report topology.html
  e2enet topology nnUNetTrainerE2ENet__nnUNetPlans__3d_fullres/fold_0 --figures figures
  e2enet topology checkpoint_final.pth --report topology.html
  e2enet topology FOLDER --json | jq '.folds[0].nodes'

FOLDER is an nnU-Net model folder, one of its fold folders, or a checkpoint file. Nothing in a checkpoint is executed. A
checkpoint alone holds the topology and nnU-Net's log; how the topology came about is in topology_history.jsonl beside it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="model folder, fold folder, or checkpoint file")
    parser.add_argument("--folds", nargs="+", default=[], metavar="F", help="of a model folder (default: all)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write one HTML page that needs nothing else")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write each figure as PNG and SVG")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write everything as JSON; without FILE, print it and nothing else",
    )


def run(args: argparse.Namespace) -> int:
    from nnunetv2_e2enet.evaluation.topology.export import print_topology
    from nnunetv2_e2enet.evaluation.topology.sources import read_topologies

    for file in (args.report, None if args.json in (None, "-") else Path(args.json)):
        if file is not None and not file.resolve().parent.is_dir():
            raise E2ENetError(f"cannot write {file}: the folder {file.parent} is missing; make it, or choose another place")
    console = Console(highlight=False, stderr=args.json == "-")
    with console.status("Reading checkpoints …"):
        folds = read_topologies(args.folder, args.folds)
    if args.json != "-":
        print_topology(console, folds)
    for file in _write(args, folds, console):
        console.print(f"Wrote {file}", soft_wrap=True)
    return 0


def _write(args: argparse.Namespace, folds: Sequence[Fold], console: Console) -> list[Path]:
    from nnunetv2_e2enet.evaluation.export import plain
    from nnunetv2_e2enet.evaluation.provenance import command_line, provenance
    from nnunetv2_e2enet.evaluation.topology.export import as_json
    from nnunetv2_e2enet.files import write_text

    facts = provenance(command_line("topology", [str(args.folder)]))
    written: list[Path] = []
    if args.report is not None or args.figures is not None:
        with console.status("Drawing …"):
            written += _draw(args, folds, facts)
    if args.json is not None:
        text = json.dumps(plain(as_json(folds, facts)), indent=1, allow_nan=False)
        if args.json == "-":
            print(text)
        else:
            write_text(Path(args.json), text + "\n")
            written.append(Path(args.json))
    return written


def _draw(args: argparse.Namespace, folds: Sequence[Fold], facts: dict[str, Any]) -> list[Path]:
    from nnunetv2_e2enet.evaluation.report.drawing import png, svg
    from nnunetv2_e2enet.evaluation.topology.figures import views
    from nnunetv2_e2enet.evaluation.topology.page import topology_html
    from nnunetv2_e2enet.files import write_bytes, write_text

    drawn = views(folds)
    written = []
    if args.figures is not None:
        try:
            args.figures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise E2ENetError(f"cannot make the folder {args.figures} ({error.strerror}): choose another place") from error
        for view in drawn:
            if view.figure is not None:
                written += [args.figures / f"{view.key}.png", args.figures / f"{view.key}.svg"]
                write_bytes(written[-2], png(view.figure))
                write_text(written[-1], svg(view.figure))
    if args.report is not None:
        write_text(args.report, topology_html(folds, drawn, facts))
        written.append(args.report)
    return written
