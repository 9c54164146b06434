"""Time and memory of one training iteration on the CPU: E2ENet on the engine, against stock nnU-Net in PyTorch.

    python benchmarks/cpu_training.py                                # all parts, many minutes
    python benchmarks/cpu_training.py --parts amos --rounds 2 --json result.json
    python benchmarks/cpu_training.py --parts hippocampus sparsity --patch 16 160 160

Parts:
    amos         the AMOS plan, 64 x 160 x 160, 16 classes, batch 1: S = 0.8 and 0.9 with maps in float32 and in float16,
                 stock nnU-Net in float32 and, with --bfloat16, under bfloat16 autocast
    hippocampus  the Hippocampus plan, 40 x 56 x 40, 3 classes, batches of 2 and 9
    pytorch      E2ENet in PyTorch beside the engine
    sparsity     the engine as S goes from 0 to 0.95, at a quarter of the slices: six networks have memory at once
    memory       the largest resident memory of a process that trains, by network, each in a process of its own
    kinds        where the time of the engine goes
    update       what an update of the topology costs, with the packing of the new connections, at both plans

An iteration is what nnU-Net's trainer does: forward pass, Dice and cross entropy with deep supervision, backward pass,
clipped gradients, SGD. What a part compares is timed in turn, round by round in one process: read the ratios, which are taken
round by round, rather than the seconds.
"""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import recording
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from plans import AMOS, HIPPOCAMPUS, Plan
from recording import Table
from torch import Tensor, nn

from nnunetv2_e2enet import engine, files
from nnunetv2_e2enet.dsff import CosineSchedule, TopologyUpdater
from nnunetv2_e2enet.evaluation.report import drawing
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.settings import override

Iteration = Callable[[], None]
STOCK, STOCK_BFLOAT16 = "nnU-Net, PyTorch", "nnU-Net, PyTorch, bfloat16"
PARTS = ("amos", "hippocampus", "pytorch", "sparsity", "memory", "kinds", "update")
SPARSITY_TITLE = "Share of connections that are off"
SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)


def e2enet(plan: Plan, sparsity: float) -> E2ENet:
    torch.manual_seed(0)
    return plan.e2enet(sparsity)


def loss_of(n_outputs: int, skips_coarsest: bool) -> nn.Module:
    """nnU-Net's, with the weights that it gives to the outputs of a network."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    weights = np.array([0.5**level for level in range(n_outputs)])
    if skips_coarsest and n_outputs > 1:
        weights[-1] = 0
    return DeepSupervisionWrapper(loss, weights / weights.sum())


def iteration(
    network: nn.Module, plan: Plan, batch: int, bfloat16: bool = False, on_engine: bool = False, storage: str = "float32"
) -> Iteration:
    """One that was run once, so that memory is there."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, *plan.patch, generator=generator)
    targets: list[Tensor] = []
    losses: list[nn.Module] = []

    def run() -> None:
        optimizer.zero_grad()
        context = torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext()
        with override(engine_storage=storage), context if on_engine or not isinstance(network, E2ENet) else engine.disabled():
            logits = network(x)
        if not targets:
            losses.append(loss_of(len(logits), not isinstance(network, E2ENet)))
            for level in logits:
                size = (batch, 1, *level.shape[2:])
                targets.append(torch.randint(plan.classes, size, generator=generator).float())
        losses[0]([level.float() for level in logits], targets).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()

    run()
    if on_engine and (reason := engine.why_pytorch(network)) is not None:
        raise SystemExit(f"the engine is not used: {reason}")
    return run


def stock(plan: Plan, batch: int, bfloat16: bool = False) -> Iteration:
    return iteration(plan.stock(), plan, batch, bfloat16)


def on_engine(plan: Plan, sparsity: float, batch: int, storage: str = "float32") -> Iteration:
    return iteration(e2enet(plan, sparsity), plan, batch, on_engine=True, storage=storage)


def in_turn(title: str, candidates: dict[str, Iteration], bases: Sequence[str], rounds: int) -> Table:
    return Table(title, recording.seconds_in_turn(candidates, rounds), [base for base in bases if base in candidates])


def beside_stock(title: str, plan: Plan, batch: int, rounds: int, bfloat16: bool) -> Table:
    candidates = {STOCK: stock(plan, batch)}
    if bfloat16:
        candidates[STOCK_BFLOAT16] = stock(plan, batch, bfloat16=True)
    for sparsity in (0.8, 0.9):
        candidates[f"E2ENet, S = {sparsity}, engine"] = on_engine(plan, sparsity, batch)
        candidates[f"E2ENet, S = {sparsity}, engine, float16"] = on_engine(plan, sparsity, batch, "float16")
    return in_turn(f"{title}, batch {batch}", candidates, list(candidates)[: 1 + bfloat16], rounds)


def beside_pytorch(plan: Plan, rounds: int) -> Table:
    name = "E2ENet, S = 0.8, PyTorch"
    candidates = {name: iteration(e2enet(plan, 0.8), plan, 1), "engine": on_engine(plan, 0.8, 1)}
    return in_turn("E2ENet in PyTorch and on the engine", candidates, [name], rounds)


def by_sparsity(plan: Plan, rounds: int) -> Table:
    candidates = {f"S = {sparsity}": on_engine(plan, sparsity, 1) for sparsity in SPARSITIES}
    return in_turn(SPARSITY_TITLE, candidates, ["S = 0.0"], rounds)


def sparsity_figure(seconds: dict[str, list[float]]) -> str:
    """An SVG: the iteration's time over the share of active connections, with the line of least squares."""
    shares = [1 - float(name.removeprefix("S = ")) for name in seconds]
    medians = [median(values) for values in seconds.values()]
    slope, offset = np.polyfit(shares, medians, 1)
    with drawing.style():
        figure, ((axes,),) = drawing.new_figure(2.8)
        axes.plot([0, 1], [offset, offset + slope], color=drawing.MUTED, linewidth=1)
        spans = [[m - min(v) for m, v in zip(medians, seconds.values(), strict=True)]]
        spans += [[max(v) - m for m, v in zip(medians, seconds.values(), strict=True)]]
        axes.errorbar(shares, medians, spans, fmt="o", color=drawing.COLOURS["blue"], markersize=4)
        axes.set(xlabel="share of connections that are active", ylabel="seconds an iteration", xlim=(0, 1.03), ylim=(0, None))
        axes.grid(visible=True, axis="y")
        return drawing.svg(figure)


def peak_memory(name: str, plan: Plan) -> float:
    """GiB of this process after two iterations, a patch of validation and another iteration."""
    sparsity, _, storage = name.partition(" ")
    storage = storage or "float32"
    stock = name == "stock"
    network = plan.stock() if stock else e2enet(plan, float(sparsity))
    run = iteration(network, plan, 1, on_engine=not stock, storage=storage)
    run()
    network.eval()
    with torch.no_grad(), override(engine_storage=storage):
        network(torch.zeros(1, 1, *plan.patch))
    network.train()
    run()
    (peak,) = re.findall(
        r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
    )  # getrusage's is also the parent's
    return int(peak) / 2**20


def memory(patch: list[int] | None) -> Table:
    found = {}
    for name in ("stock", "0.8", "0.9", "0.8 float16", "0.9 float16"):
        command = [sys.executable, __file__, "--peak-memory-of", name, "--threads", str(torch.get_num_threads())]
        command += ["--patch", *map(str, patch)] if patch else []
        measured = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        sparsity, _, storage = name.partition(" ")
        found[STOCK if name == "stock" else ", ".join(filter(None, (f"E2ENet, S = {sparsity}, engine", storage)))] = [measured]
    return Table("Largest resident memory of a training with a patch of validation", found, [STOCK], unit="GiB")


def kinds(plan: Plan, rounds: int) -> Table:
    network = e2enet(plan, 0.8)
    run = iteration(network, plan, 1, on_engine=True)
    before = engine.profile(network)  # with the first iteration, which touches all memory for the first time
    for _ in range(rounds):
        run()
    parts = {name: [(value - before[name]) / rounds] for name, value in engine.profile(network).items()}
    return Table("CPU seconds of the first thread in an iteration, S = 0.8", parts, [])


def with_update(title: str, plan: Plan, batch: int, rounds: int) -> Table:
    """Each second iteration of the rounds has an update before it, which replaces half of the connections at first."""
    network = e2enet(plan, 0.8)
    run, plain = iteration(network, plan, batch, on_engine=True), "an iteration"
    updater, optimizer = TopologyUpdater(network, CosineSchedule(1000, 1)), torch.optim.SGD(network.parameters(), 0.01)
    epochs = count(1)

    def updated() -> None:
        updater.update(next(epochs), optimizer)
        run()

    candidates = {plain: run, "an update of the topology and an iteration": updated}
    return in_turn(f"An update, {title}, S = 0.8, batch {batch}", candidates, [plain], rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--patch", nargs=3, type=int, help="instead of the plan's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="stock nnU-Net under bfloat16 autocast as well")
    parser.add_argument("--json", type=Path, help="where to write every round")
    parser.add_argument("--figure", type=Path, help="where to draw the part sparsity (SVG)")
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.figure and "sparsity" not in arguments.parts:
        parser.error("--figure draws the part sparsity: add it to --parts")
    torch.set_num_threads(arguments.threads)
    amos, hippocampus = (replace(p, patch=tuple(arguments.patch)) if arguments.patch else p for p in (AMOS, HIPPOCAMPUS))
    if arguments.peak_memory_of:
        print(peak_memory(arguments.peak_memory_of, amos))
        return
    rounds, bfloat16 = arguments.rounds, arguments.bfloat16
    parts: dict[str, list[Callable[[], Table]]] = {
        "amos": [lambda: beside_stock("AMOS plan", amos, 1, rounds, bfloat16)],
        "hippocampus": [
            lambda: beside_stock("Hippocampus plan", hippocampus, 2, rounds, bfloat16),
            lambda: beside_stock("Hippocampus plan", hippocampus, 9, rounds, bfloat16),
        ],
        "pytorch": [lambda: beside_pytorch(amos, rounds)],
        "sparsity": [lambda: by_sparsity(amos if arguments.patch else replace(amos, patch=(16, 160, 160)), rounds)],
        "memory": [lambda: memory(arguments.patch)],
        "kinds": [lambda: kinds(amos, rounds)],
        "update": [
            lambda: with_update("AMOS plan", amos, 1, rounds),
            lambda: with_update("Hippocampus plan", hippocampus, 9, rounds),
        ],
    }
    tables: list[Table] = []
    for part in arguments.parts:
        for measure in parts[part]:
            tables.append(measure())
            print("\n".join(tables[-1].lines()), flush=True)
            if arguments.json:
                recording.write(arguments.json, tables)
            gc.collect()
    if arguments.figure:
        (by_share,) = (table for table in tables if table.title == SPARSITY_TITLE)
        files.write_atomically(arguments.figure, sparsity_figure(by_share.values))


if __name__ == "__main__":
    main()
