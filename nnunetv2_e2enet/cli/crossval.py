"""``e2enet crossval``: all folds of one or more trainers as one command that can be repeated until all is done."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from nnunetv2_e2enet.cli.nnunet import FOLDERS, PREPROCESSED, model_folder, nnunet_folder
from nnunetv2_e2enet.cli.output import plain_console
from nnunetv2_e2enet.errors import E2ENetError, check_extra
from nnunetv2_e2enet.files import make_writable, read_json
from nnunetv2_e2enet.registration import find_nnunet, find_trainer
from nnunetv2_e2enet.training import crossval
from nnunetv2_e2enet.training.crossval import Fold, FoldState

FOLDS_OF_NNUNET = 5  # where there is no splits_final.json

HELP = "train, validate and accumulate all folds; finished folds are skipped, unfinished ones resumed"

EPILOG = """\
examples:
  e2enet crossval 4 3d_fullres -tr nnUNetTrainerE2ENet -tr nnUNetTrainer
  e2enet crossval 4 3d_fullres -tr nnUNetTrainerE2ENet --folds 0 1 --gpus 0 1
  e2enet crossval 4 3d_fullres -tr nnUNetTrainerE2ENet \\
    --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=2880

Each fold is nnU-Net's own nnUNetv2_train; its output is in crossval_fold_X.log
in the model folder. --slurm submits one job a fold through submitit (in the
clone of the repository: pip install '.[cluster]'); its values are submitit's
parameters. After the jobs, the same command without --slurm accumulates.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("dataset", metavar="DATASET", help="name or id of the data set")
    parser.add_argument("configuration", metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    parser.add_argument("fold", nargs="?", help=argparse.SUPPRESS)  # of nnUNetv2_train, named in a message
    parser.add_argument("-tr", action="append", metavar="TRAINER", help="trainer, repeatable (default: nnUNetTrainerE2ENet)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="name of the plans (default: %(default)s)")
    parser.add_argument(
        "--folds", type=int, nargs="+", metavar="FOLD", help="folds (default: all of splits_final.json, or 0 1 2 3 4)"
    )
    parser.add_argument("--npz", action="store_true", help="keep validation probabilities, for ensembles")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="device (default: %(default)s)")
    parser.add_argument(
        "--gpus", type=int, nargs="+", metavar="GPU", help="visible GPUs; each trains one fold at a time (default: all)"
    )
    parser.add_argument("--slurm", nargs="*", metavar="KEY=VALUE", help="submit to SLURM instead of running here")
    parser.add_argument("--status", action="store_true", help="show how far each fold is, and train nothing")


def run(args: argparse.Namespace) -> int:
    find_nnunet()
    folds = _folds(args)
    console = plain_console()
    if args.status:
        console.print(_table(folds))
        return 0
    open_folds = [fold for fold in folds if fold.state() is not FoldState.DONE]
    if args.slurm is not None:
        return _submit(console, open_folds, _parameters(args.slurm))
    gpus = _gpus(args, folds, open_folds) if open_folds else []
    _make_folders(open_folds, at_once=len(gpus) > 1)
    with Live(_table(folds), console=console, refresh_per_second=1) as live:
        codes = crossval.run_locally(open_folds, gpus, lambda: live.update(_table(folds, running=open_folds)))
        live.update(_table(folds))
    failed = [fold for fold in open_folds if codes[fold] or fold.state() is not FoldState.DONE]
    if failed:
        raise E2ENetError(
            f"{len(failed)} of {len(folds)} folds did not finish, first fold {failed[0].number} of {failed[0].trainer}: see "
            f"{failed[0].log}, then repeat the command to go on"
        )
    return _accumulate(console, args, folds)


def _folds(args: argparse.Namespace) -> list[Fold]:
    if args.fold is not None:
        raise E2ENetError(f"{args.fold} is a fold as in nnUNetv2_train: choose folds with --folds, such as --folds 0 1")
    for variable in FOLDERS:
        nnunet_folder(variable)
    if "__" in args.p:
        raise E2ENetError(f"-p {args.p}: `__` divides trainer, plans and configuration in nnU-Net's folders; rename the plans")
    if args.folds is not None and (len(set(args.folds)) < len(args.folds) or min(args.folds) < 0):
        raise E2ENetError(f"folds {args.folds}: expected different numbers from 0")
    elsewhere = f"-device {args.device}" if args.device != "cuda" else "--slurm" if args.slurm is not None else None
    if args.gpus is not None and elsewhere is not None:
        raise E2ENetError(f"--gpus {' '.join(map(str, args.gpus))} with {elsewhere}: leave one of them out")
    options = ("-device", args.device, *(["--npz"] if args.npz else []))
    folds = []
    for trainer in dict.fromkeys(args.tr or ["nnUNetTrainerE2ENet"]):
        model = model_folder(args.dataset, trainer, args.p, args.configuration)
        preprocessed = nnunet_folder(PREPROCESSED) / model.parent.name
        if not (model / "plans.json").is_file():  # never trained
            _check_plans(preprocessed / f"{args.p}.json", args.configuration)
            find_trainer(trainer)
        splits = preprocessed / "splits_final.json"
        present = _splits(splits)
        of_model = [Fold(model, args.dataset, number, options) for number in args.folds or range(present)]
        lacking = [fold.number for fold in of_model if fold.number >= present and fold.state() is not FoldState.DONE]
        if lacking:
            maker = f"{splits} has" if splits.is_file() else "nnU-Net makes"
            raise E2ENetError(f"fold {lacking[0]} has no split: {maker} {present} folds; choose from 0 to {present - 1}")
        folds += of_model
    return folds


def _check_plans(file: Path, configuration: str) -> None:
    """Raises E2ENetError unless plans are there and have a configuration."""
    if not file.is_file():
        raise E2ENetError(f"{file} is missing: run nnUNetv2_plan_and_preprocess for the data set, or name its plans with -p")
    present = read_json(file).get("configurations", {})
    if configuration not in present:
        raise E2ENetError(f"{file} has no configuration {configuration}: choose one of {', '.join(present)}")


def _splits(file: Path) -> int:
    """Folds that have a split; for others nnU-Net would draw one at random.

    Raises:
        E2ENetError: the file cannot be read.
    """
    try:
        return len(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else FOLDS_OF_NNUNET
    except (OSError, ValueError, TypeError) as error:
        raise E2ENetError(f"cannot read {file} as JSON ({error}): write it again, or remove it for nnU-Net's folds") from error


def _make_folders(folds: Sequence[Fold], at_once: bool) -> None:
    """The folders of models, and splits that folds which start at once must not all write."""
    for model in {fold.model for fold in folds}:
        make_writable(model)
        if at_once:
            crossval.make_splits(model, nnunet_folder(PREPROCESSED) / model.parent.name)


def _gpus(args: argparse.Namespace, folds: Sequence[Fold], open_folds: Sequence[Fold]) -> list[int]:
    import torch

    if args.device != "cuda":
        from nnunetv2_e2enet.machine import check_device

        check_device(args.device, "-device")
        return []
    present = torch.cuda.device_count()
    gpus = list(range(present)) if args.gpus is None else args.gpus
    if not present:
        first = open_folds[0]
        log = f" (see {first.log})" if first.log.is_file() else ""
        raise E2ENetError(
            f"{len(open_folds)} of {len(folds)} folds are not done, first fold {first.number} of {first.trainer}{log}, and "
            "PyTorch finds no CUDA device here: use -device cpu, --slurm, or a machine with a GPU"
        )
    if len(set(gpus)) < len(gpus) or not set(gpus) <= set(range(present)):
        given = " ".join(map(str, gpus))
        raise E2ENetError(f"--gpus {given}: expected different numbers from 0 to {present - 1}, of the GPUs here")
    return gpus


def _table(folds: Sequence[Fold], running: Sequence[Fold] = ()) -> Table:
    table = Table("trainer", "fold", "state", "epoch")
    for fold in folds:
        epoch = fold.epoch()
        state = fold.state()
        waiting = fold in running and state is not FoldState.DONE
        shown = "-" if epoch is None else str(epoch)
        table.add_row(fold.trainer, str(fold.number), f"{state.value}{' …' if waiting else ''}", shown)
    return table


def _accumulate(console: Console, args: argparse.Namespace, folds: Sequence[Fold]) -> int:
    table = Table("trainer", "folds", "mean foreground Dice")
    for model in dict.fromkeys(fold.model for fold in folds):
        of_model = [fold for fold in folds if fold.model == model]
        numbers = [fold.number for fold in of_model]
        if crossval.accumulate(model, args.dataset, numbers):
            raise E2ENetError(f"nnU-Net's accumulation failed: see {model / 'crossval_accumulate.log'}")
        dice = read_json(crossval.summary(model, numbers))["foreground_mean"]["Dice"]
        table.add_row(of_model[0].trainer, " ".join(map(str, numbers)), f"{dice:.4f}")
    console.print(table)
    return 0


def _parameters(pairs: Sequence[str]) -> dict[str, Any]:
    malformed = [pair for pair in pairs if "=" not in pair]
    if malformed:
        raise E2ENetError(f"--slurm {malformed[0]}: expected KEY=VALUE, such as slurm_partition=gpu")
    parameters = dict(pair.split("=", 1) for pair in pairs)
    return {key: int(value) if value.isdigit() and value == str(int(value)) else value for key, value in parameters.items()}


def _submit(console: Console, open_folds: Sequence[Fold], parameters: Mapping[str, Any]) -> int:
    """One job a fold that is not done, so that the command may be repeated."""
    check_extra("--slurm", "cluster", "submitit")
    import submitit

    _make_folders(open_folds, at_once=True)
    cluster = parameters.get("cluster", "slurm")
    settings = {key: value for key, value in parameters.items() if key != "cluster"}
    for fold in open_folds:
        try:
            executor = submitit.AutoExecutor(folder=fold.model / "submitit", cluster=cluster)
            executor.update_parameters(**{"name": f"{fold.trainer}_{fold.number}", **settings})
            job = executor.submit(fold.finish)
        except (RuntimeError, ValueError, NameError, AssertionError) as error:  # no cluster, or parameters that it has not
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise E2ENetError(
                f"--slurm: submitit cannot submit ({reason}): run the command on a SLURM cluster, with submitit's parameters"
            ) from error
        console.print(f"{fold.trainer} fold {fold.number}: job {job.job_id}, submitted {time.strftime('%Y-%m-%d %H:%M')}")
    if not open_folds:
        console.print("all folds are done: repeat the command without --slurm to accumulate them")
    return 0
