"""``e2enet profile``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from nnunetv2_e2enet.cli.output import add_json_argument, check_folders, console_for, say_written, step_bar, write_json
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.choices import BESIDE

if TYPE_CHECKING:
    from nnunetv2_e2enet.evaluation.profile import Profile, ProfileSettings

HELP = "costs of networks: parameters, multiply-accumulates, memory, time; E2ENet beside stock nnU-Net"

EXAMPLES = """examples:
  e2enet profile Dataset004_Hippocampus                 # all that can be built
  e2enet profile 4 -c 2d --sparsity 0.8 --beside e2enet nnunet
  e2enet profile nnUNetPlans.json --no-memory --no-time # counts alone, seconds
  e2enet profile nnUNetTrainerE2ENet__nnUNetPlans__3d_fullres \\
    nnUNetTrainer__nnUNetPlans__3d_fullres --rounds 15
  e2enet profile MODEL_FOLDER --flows --json | jq '.profiles[0].shares'

Counts are of one patch. Time and memory are measured on this machine, with
random images; on a CPU, close what else computes.

exit code: 0 profiled, 1 the input cannot be used (standard error says why),
2 wrong usage, 130 Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument(
        "subjects", nargs="+", metavar="SUBJECT", help="model folder, plans file, or name or number of a data set"
    )
    parser.add_argument("-c", "--configuration", metavar="NAME", help="configuration of the plans (default: 3d_fullres)")
    parser.add_argument("--trainer", metavar="CLASS", help="profile the network that this trainer builds from plans")
    parser.add_argument("--dataset-json", type=Path, metavar="FILE", help="dataset.json of a plans file without one beside it")
    parser.add_argument(
        "--beside",
        nargs="+",
        choices=BESIDE,
        metavar="NETWORK",
        help=f"networks to build from the plans: {', '.join(BESIDE)} (default: all, none for model folders)",
    )
    parser.add_argument(
        "--sparsity",
        nargs="+",
        type=float,
        metavar="S",
        help="sparsities of E2ENet (default: 0, 0.7, 0.8, 0.9)",
    )
    parser.add_argument("--levels", action="store_true", help="costs of each level")
    parser.add_argument("--flows", action="store_true", help="costs of each level and flow")
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: cpu)")
    measure.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="dtype of timed passes (default: float32)",
    )
    measure.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch (default: its own choice)")
    measure.add_argument("--rounds", type=int, default=7, metavar="N", help="timed passes of each network (default: 7)")
    measure.add_argument("--batch-size", type=int, metavar="N", help="batch of the training step (default: that of the plans)")
    measure.add_argument("--no-memory", action="store_true", help="do not measure memory")
    measure.add_argument("--no-time", action="store_true", help="do not measure time")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    from nnunetv2_e2enet.deployment.packed import is_packed
    from nnunetv2_e2enet.evaluation.profile import profile, steps
    from nnunetv2_e2enet.evaluation.subjects import designs

    check_folders(args)
    for subject in args.subjects:
        if Path(subject).is_file() and is_packed(Path(subject)):
            raise E2ENetError(f"{subject} is a packed model: give the model folder that it was made of, or its plans.json")
    console = console_for(args)
    settings = _settings(args)
    with console.status("Looking at the plans …"):
        found = designs(args.subjects, args.configuration, args.trainer, args.dataset_json, args.beside, args.sparsity)
    with step_bar(console, steps(found, settings)) as tell:
        profiles = profile(found, settings, tell)
    _write(args, console, profiles, settings)
    return 0


def _settings(args: argparse.Namespace) -> ProfileSettings:
    import torch

    from nnunetv2_e2enet.evaluation.profile import ProfileSettings
    from nnunetv2_e2enet.machine import check_device

    for name, value in (("--threads", args.threads), ("--rounds", args.rounds), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise E2ENetError(f"{name} {value}: at least 1 is needed")
    check_device(args.device, "--device")
    threads = args.threads or torch.get_num_threads()
    with_parts = args.levels or args.flows
    return ProfileSettings(
        args.device, args.dtype, threads, args.rounds, args.batch_size, not args.no_memory, not args.no_time, with_parts
    )


def _write(args: argparse.Namespace, console: Console, profiles: list[Profile], settings: ProfileSettings) -> None:
    from dataclasses import asdict

    from nnunetv2_e2enet.engine.status import status
    from nnunetv2_e2enet.evaluation.profile_tables import print_exceptions, print_profiles
    from nnunetv2_e2enet.evaluation.provenance import command_line, provenance

    engine = status().reason if settings.device == "cpu" else "the CPU engine is not used on CUDA"
    if args.json != "-":
        print_profiles(console, profiles, settings, args.levels, args.flows)
        if settings.with_time or settings.with_memory:
            console.print(f"E2ENet: {engine}.")
        if settings.device == "cpu":
            print_exceptions(console, profiles)
    content = {
        "format": 1,
        "provenance": provenance(command_line("profile", args.subjects)),
        "settings": {**asdict(settings), "engine": engine},
        "profiles": [p.as_json() for p in profiles],
    }
    say_written(console, write_json(args, content))
