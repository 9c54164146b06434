"""How a training starts, and what becomes of the three flows: initial weights, importance and updates, on any data set.

Each variant trains E2ENet from several seeds with nnU-Net's own loop. The record holds the losses, nnU-Net's mean pseudo Dice
of the last epochs, and for each flow the amplitude at the input of the fusion nodes (standard deviation over a batch) and the
density of its connections, means over all nodes, at the start, at each quarter and at the end.

    e2enet phantom 990 --size 20 56 56
    nnUNetv2_plan_and_preprocess -d 990 -c 3d_fullres
    python benchmarks/starts.py 990 --epochs 20 --iterations 100 --seeds 0 1 2 --output starts.json

The program goes on where it stopped. ``--table --output starts.json`` prints its table. ``make results`` puts the tables
of the records in docs/results/starts into docs/results.md.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import contestants
import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_e2enet.dsff import InputScaledL1Norm, Schedule
from nnunetv2_e2enet.network import fusion_nodes, maskable_layers
from nnunetv2_e2enet.network.connections import he_normal_
from nnunetv2_e2enet.network.fusion import FusionNode
from nnunetv2_e2enet.training.trainer import E2ENetMixin

FLOWS = ("forward", "upward", "downward")
METHOD = "the method"
POINTS = 100  # of Dice


def strengthen_upward_flow(trainer: Any) -> None:
    """All flows start with about the same amplitude."""
    for node in fusion_nodes(trainer.unwrapped_network).values():
        if node.upsample is not None:
            with torch.no_grad():
                node.upsample.weight.mul_(2.7)


def give_weights_to_grown(trainer: Any) -> None:
    """Grown connections, whose weights are zero after an update, get those that connections of the start have."""
    for _, layer in maskable_layers(trainer.unwrapped_network):
        grown = layer.over_kernel(layer.mask & (layer.weight.flatten(2).abs().sum(2) == 0))
        with torch.no_grad():
            layer.weight.copy_(torch.where(grown, he_normal_(torch.empty_like(layer.weight)), layer.weight))


VARIANTS: dict[str, dict[str, Any]] = {
    METHOD: {},
    "gain 0.7": {"initial_gain": 0.7},
    "gain 0.5": {"initial_gain": 0.5},
    "gain 0.25": {"initial_gain": 0.25},
    "gain 1/sqrt(density)": {"initial_gain": 5**0.5},
    "input-scaled importance": {"importance": InputScaledL1Norm()},
    "static": {"topology_update_period": None},
    "grown connections with weights": {"after_update": give_weights_to_grown},
    "an update every 1,200 iterations": {"topology_update_iterations": 1200},
    "strong upward flow": {"after_start": strengthen_upward_flow},
}


class StartTrainer(E2ENetMixin, nnUNetTrainer):
    """Looks at the flows at the start, at each quarter and at the end."""

    after_start: Callable[[Any], None] | None = None
    after_update: Callable[[Any], None] | None = None
    topology_update_iterations: int | None = None  # between two updates, in the place of a number of epochs

    def __init__(self, plans, configuration, fold, dataset_json, device):  # type: ignore[no-untyped-def]  # nnU-Net's own
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.disable_checkpointing = True
        self.seen: list[dict[str, dict[str, float]]] = []

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.after_start is not None:
            self.after_start(self)
        self.seen.append(flows(self))

    def _schedule(self) -> Schedule:
        if self.topology_update_iterations is not None:
            self.topology_update_period = max(1, round(self.topology_update_iterations / self.num_iterations_per_epoch))
        return super()._schedule()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.after_update is not None and self.topology_updater.schedule.is_update(self.current_epoch):
            self.after_update(self)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        super().on_train_epoch_end(train_outputs)
        if (self.current_epoch + 1) % max(1, self.num_epochs // 4) == 0:
            self.seen.append(flows(self))


def flows(trainer: Any) -> dict[str, dict[str, float]]:
    """``amplitude`` and ``density`` of each flow, means over all fusion nodes."""
    found: dict[str, list[tuple[float, float]]] = {flow: [] for flow in FLOWS}

    def look(node: FusionNode, x: torch.Tensor) -> None:
        for flow, channels in node.flows.items():
            density = float(node.blocks[0].conv.mask[:, channels].float().mean())
            found[flow].append((float(x[:, channels].std()), density))

    nodes = fusion_nodes(trainer.unwrapped_network).values()
    hooks = [
        node.blocks[0].conv.register_forward_pre_hook(lambda _conv, inputs, node=node: look(node, inputs[0])) for node in nodes
    ]
    with torch.no_grad():
        trainer.unwrapped_network(next(trainer.dataloader_train)["data"].to(trainer.device))
    for hook in hooks:
        hook.remove()
    means = {flow: [statistics.fmean(values) for values in zip(*pairs, strict=True)] for flow, pairs in found.items() if pairs}
    return {flow: {"amplitude": amplitude, "density": density} for flow, (amplitude, density) in means.items()}


def train(variant: dict[str, Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    plans, dataset = contestants.load_plans(args.dataset, args.plans)
    if args.batch_size is not None:
        plans["configurations"][args.configuration]["batch_size"] = args.batch_size
    contestants.as_nnunet_trains(args.device)
    torch._dynamo.reset()  # or the networks of the class count together, and from the ninth on run eagerly
    for source in (torch.manual_seed, np.random.seed, random.seed):
        source(seed)
    trainer = StartTrainer({**plans, "continue_training": False}, args.configuration, 0, dataset, torch.device(args.device))
    settings = {
        "num_epochs": args.epochs,
        "num_iterations_per_epoch": args.iterations,
        "num_val_iterations_per_epoch": args.validation_iterations,
        "topology_update_period": args.period,
        "base_num_features": args.base,
        "max_num_features": args.maximum,
        "topology_seed": seed,
        **variant,
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer.run_training()
    log = trainer.logger.local_logger.my_fantastic_logging
    return {
        "commit": contestants.COMMIT,
        "losses": [float(loss) for loss in log["train_losses"]],
        "dice": statistics.fmean(float(dice) for dice in log["mean_fg_dice"][-3:]),
        "flows": trainer.seen,
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows in Markdown: means over seeds, with the range of the Dice and of its distance to the method's of the same seed."""
    columns = ["start", "seeds", "pseudo Dice", "points above the method"]
    columns += ["upward: amplitude at the start, density at the end", "forward", "downward"]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    variants: dict[str, dict[str, Mapping[str, Any]]] = {}
    for key, run in results.items():
        name, _, seed = key.partition(" | seed ")
        variants.setdefault(name, {})[seed] = run
    for name, runs in variants.items():
        method = {} if name == METHOD else variants.get(METHOD, {})
        above = [POINTS * (runs[seed]["dice"] - method[seed]["dice"]) for seed in runs if seed in method]
        cells = [str(len(runs)), with_range([run["dice"] for run in runs.values()], ".3f"), with_range(above, "+.1f")]
        for flow in ("upward", "forward", "downward"):
            amplitude = statistics.fmean(run["flows"][0][flow]["amplitude"] for run in runs.values())
            density = statistics.fmean(run["flows"][-1][flow]["density"] for run in runs.values())
            cells.append(f"{amplitude:.2f}, {density:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def with_range(values: Sequence[float], form: str) -> str:
    """Mean, least and most; nothing of no values."""
    if not values:
        return ""
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def section(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of docs/results.md: for each record, by name, with what its variants were trained, and the table."""
    lines = []
    for name, record in records.items():
        given = {key: value for key, value in record.items() if key not in ("machine", "results", "remark")}
        settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in given.items())
        machine, commits = record["machine"], sorted({run["commit"] for run in record["results"].values()})
        lines += [f"### {name}", "", *([record["remark"], ""] if "remark" in record else [])]
        lines.append(
            f"`python benchmarks/starts.py`: {settings}. {machine['device']}, torch {machine['torch']}; "
            f"commit {', '.join(commits)}. Means over seeds (least to most)."
        )
        lines += ["", *table(record["results"]), ""]
    return lines or ["No record yet.", ""]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", help="number or name of a preprocessed data set")
    parser.add_argument("--plans", default="nnUNetPlans")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, help="default: that of the plans")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=100, help="of an epoch")
    parser.add_argument("--validation-iterations", type=int, default=10, help="of an epoch")
    parser.add_argument("--period", type=int, default=2, help="epochs between two updates of the topology")
    parser.add_argument("--base", type=int, default=12, help="channels of the finest level")
    parser.add_argument("--maximum", type=int, default=80, help="most channels of a level")
    parser.add_argument("--output", type=Path, default=Path("starts.json"))
    parser.add_argument("--table", action="store_true", help="print the table of --output and train nothing")
    args = parser.parse_args(arguments)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "table", "variants", "seeds")}
    if args.table:
        print("\n".join(table(contestants.Record(args.output, {}).results)))
        return
    contestants.check_device(args.device)
    os.environ.setdefault("nnUNet_n_proc_DA", "0")
    record = contestants.Record(args.output, {**settings, "machine": contestants.machine(args.device)})
    for seed in args.seeds:
        for name in args.variants:
            if f"{name} | seed {seed}" not in record.results:
                with contestants.temporary_results():
                    record.add(f"{name} | seed {seed}", train(VARIANTS[name], seed, args))
    print("\n".join(table(record.results)))


if __name__ == "__main__":
    main()
