"""``e2enet profile``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nnunetv2_e2enet.errors import E2ENetError

if TYPE_CHECKING:
    from nnunetv2_e2enet.evaluation.profile import Profile, Settings

HELP = "what networks cost: parameters, arithmetic, memory, time; E2ENet beside stock nnU-Net"

EXAMPLES = """examples:
  e2enet profile Dataset004_Hippocampus                      E2ENet at four sparsities, nnU-Net, ResEnc M and L
  e2enet profile 4 -c 2d --sparsity 0.8 --beside e2enet nnunet
  e2enet profile nnUNetPlans.json -c 3d_fullres --no-memory --no-time     counts alone, in seconds
  e2enet profile nnUNetTrainerE2ENet__nnUNetPlans__3d_fullres nnUNetTrainer__nnUNetPlans__3d_fullres --rounds 15
  e2enet profile MODEL_FOLDER --flows --json | jq '.profiles[0].shares'

Counts are of one patch. Time and memory are measured on this machine, with random images; on a CPU, close what else computes.

exit code: 0 profiled, 1 the input cannot be used (standard error says why), 2 wrong usage, 130 Ctrl-C.
"""

COLUMNS = (
    "Stored: in memory and checkpoints. Dense: all connections. Active: those that the sparse topology leaves, and the dense "
    "layers. Executed: what the program multiplies in a prediction. PyTorch has no fast sparse convolution, so masked weights "
    "are multiplied like any others and executed is dense; active says what an engine that leaves them out has to do."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nnunetv2_e2enet.evaluation.subjects import BESIDE, SPARSITIES

    parser.epilog = EXAMPLES
    parser.add_argument(
        "subjects", nargs="+", metavar="SUBJECT", help="model folder, plans file, or name or number of a data set"
    )
    parser.add_argument("-c", "--configuration", metavar="NAME", help="of plans (default: 3d_fullres)")
    parser.add_argument("--trainer", metavar="CLASS", help="profile the network that this trainer builds from plans")
    parser.add_argument("--dataset-json", type=Path, metavar="FILE", help="of a plans file that has none beside it")
    parser.add_argument(
        "--beside", nargs="*", choices=BESIDE, help="networks to build from the plans (default: all, none for model folders)"
    )
    parser.add_argument(
        "--sparsity", nargs="+", type=float, default=list(SPARSITIES), metavar="S", help="of E2ENet (default: %(default)s)"
    )
    parser.add_argument("--levels", action="store_true", help="costs of each level")
    parser.add_argument("--flows", action="store_true", help="costs of each level and flow")
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    measure.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of timed passes (default: float32)"
    )
    measure.add_argument("--threads", type=int, metavar="N", help="of PyTorch (default: its own choice)")
    measure.add_argument("--rounds", type=int, default=7, metavar="N", help="how often each network is timed (default: 7)")
    measure.add_argument("--batch-size", type=int, metavar="N", help="of the training step (default: that of the plans)")
    measure.add_argument("--no-memory", action="store_true", help="do not measure memory")
    measure.add_argument("--no-time", action="store_true", help="do not measure time")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write everything as JSON; without FILE, print it and nothing else",
    )


def run(args: argparse.Namespace) -> int:
    from nnunetv2_e2enet.evaluation.profile import profile, steps
    from nnunetv2_e2enet.evaluation.subjects import Request, designs

    console = Console(highlight=False, stderr=args.json == "-")
    settings = _settings(args)
    request = Request(args.subjects, args.configuration, args.trainer, args.dataset_json, args.beside, args.sparsity)
    with console.status("Looking at the plans …"):
        found = designs(request)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps(found, settings))

        def tell(description: str) -> None:
            progress.update(task, description=description)
            progress.advance(task)

        profiles = profile(found, settings, tell)
    _write(args, console, profiles, settings)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    import torch

    from nnunetv2_e2enet.evaluation.profile import Settings

    for name, value in (("--threads", args.threads), ("--rounds", args.rounds), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise E2ENetError(f"{name} {value}: at least 1 is needed")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise E2ENetError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    threads = args.threads or torch.get_num_threads()
    with_parts = args.levels or args.flows
    return Settings(
        args.device, args.dtype, threads, args.rounds, args.batch_size, not args.no_memory, not args.no_time, with_parts
    )


def _write(args: argparse.Namespace, console: Console, profiles: list[Profile], settings: Settings) -> None:
    from dataclasses import asdict

    from nnunetv2_e2enet.evaluation.export import plain
    from nnunetv2_e2enet.evaluation.files import write_text
    from nnunetv2_e2enet.evaluation.provenance import command_line, provenance

    if args.json != "-":
        _print(console, profiles, settings, args.levels, args.flows)
    if args.json is None:
        return
    content = {
        "format": 1,
        "provenance": provenance(command_line("profile", args.subjects)),
        "settings": asdict(settings),
        "profiles": [p.as_json() for p in profiles],
    }
    text = json.dumps(plain(content), indent=1, allow_nan=False)
    if args.json == "-":
        print(text)
        return
    write_text(Path(args.json), text + "\n")
    console.print(f"Wrote {args.json}", soft_wrap=True)


def _print(console: Console, profiles: list[Profile], settings: Settings, levels: bool, flows: bool) -> None:
    console.print(_counts(profiles))
    console.print(COLUMNS)
    if len({p.patch_size for p in profiles}) > 1:
        console.print("The patches differ, so multiply-accumulates, memory and time are not of the same amount of image.")
    if settings.with_memory or settings.with_time:
        console.print()
        console.print(_measured(profiles, settings))
        console.print(_how(settings))
    for p in profiles:
        if p.note:
            console.print(f"{p.name}: {p.note}")
        if levels or flows:
            console.print(_parts(p, flows))


def _counts(profiles: list[Profile]) -> Table:
    from nnunetv2_e2enet.evaluation.numbers import giga, millions

    table = _table("Parameters, and multiply-accumulates (MAC) of one patch")
    for title in ("network", "patch"):
        table.add_column(title)
    for title in ("stored\nparam.", "active\nparam.", "dense\nMAC", "active\nMAC", "executed\nMAC"):
        table.add_column(title, justify="right")
    for p in profiles:
        c = p.costs
        table.add_row(
            p.name,
            "x".join(map(str, p.patch_size)),
            *(millions(n) for n in (c.parameters_stored, c.parameters_active)),
            *(giga(n) for n in (c.macs_dense, c.macs_active, c.macs_executed)),
        )
    return table


def _measured(profiles: list[Profile], settings: Settings) -> Table:
    from nnunetv2_e2enet.evaluation.numbers import NOTHING, gib

    table = _table(f"Measured on {settings.device}, {settings.threads} threads, {settings.dtype}")
    table.add_column("network")
    for title in ("training\npeak", "prediction\npeak", "patch\nmedian", "quartiles", "Mvoxel/s"):
        table.add_column(title, justify="right")
    for p in profiles:
        peaks = [NOTHING if math.isnan(n) else gib(n) for n in (p.training_bytes, p.prediction_bytes)]
        low, median, high = p.latency
        times = [f"{median:.3f} s", f"{low:.3f} to {high:.3f}", f"{p.voxels_per_second / 1e6:.2f}"]
        table.add_row(p.name, *peaks, *([NOTHING] * 3 if math.isnan(median) else times))
    return table


def _how(settings: Settings) -> str:
    batch = "the plans' batch" if settings.batch_size is None else f"a batch of {settings.batch_size}"
    parts = []
    if settings.with_memory:
        what = "PyTorch's allocations" if settings.device == "cuda" else "the process's growth, in float32"
        parts.append(f"Peaks: {what}; training is one step of {batch} with nnU-Net's loss, prediction one patch.")
    if settings.with_time:
        parts.append(f"Time: {settings.rounds} forward passes of one patch each, the networks in turns.")
    return " ".join(parts)


def _parts(p: Profile, flows: bool) -> Table:
    from nnunetv2_e2enet.evaluation.numbers import giga, millions

    table = _table(f"{p.name}: costs by level (0 is the finest)" + (" and flow" if flows else ""))
    table.add_column("level")
    if flows:
        table.add_column("flow")
    for title in ("stored\nparam.", "active\nparam.", "dense\nMAC", "active\nMAC"):
        table.add_column(title, justify="right")
    rows: dict[tuple[str, ...], list[int]] = {}
    for share in p.shares:
        key: tuple[str, ...] = (str(share.level), share.flow) if flows else (str(share.level),)
        numbers = (share.parameters_stored, share.parameters_active, share.macs_dense, share.macs_active)
        rows[key] = [a + b for a, b in zip(rows.get(key, [0] * 4), numbers, strict=True)]
    for place, (stored, active, dense, left) in rows.items():
        table.add_row(*place, millions(stored), millions(active), giga(dense), giga(left))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
