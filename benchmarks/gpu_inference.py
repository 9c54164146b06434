"""Time and peak memory of a prediction on a GPU: E2ENet beside stock nnU-Net.

Networks predict one patch after the other as nnU-Net's predictor lets them: evaluation mode, mixed precision, no gradients;
weights are random. All contestants are timed in turn, round by round, so that a machine whose speed drifts drifts for all:
read the ratios, which are taken round by round.

    python benchmarks/gpu_inference.py -d 4 --amos
    python benchmarks/gpu_inference.py -d 4 --amos --compile     # as with nnUNet_compile=1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import contestants
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


def build(
    contestant: str, plans: dict[str, Any], dataset: dict[str, Any], configuration: str, device: str
) -> tuple[nn.Module, Tensor]:
    """The network as its trainer builds it, and a patch."""
    with contestants.temporary_results():
        trainer = contestants.trainer_class(contestant)(
            {**plans, "continue_training": False}, configuration, 0, dataset, torch.device(device)
        )
        trainer._do_i_compile = lambda: False
        trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    patch = torch.randn(1, trainer.num_input_channels, *trainer.configuration_manager.patch_size, device=device)
    return trainer.network.eval(), patch


def predict(network: nn.Module, patch: Tensor) -> float:
    """Seconds of one patch."""
    on_gpu = patch.device.type == "cuda"
    begin = time.perf_counter()
    with torch.inference_mode(), torch.autocast(patch.device.type, enabled=on_gpu):
        network(patch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", required=True, help="a preprocessed data set, by name or number")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--amos", action="store_true", help="network and patch of nnU-Net's plans for AMOS")
    parser.add_argument("--contestants", nargs="+", default=list(contestants.CONTESTANTS), choices=contestants.CONTESTANTS)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu_inference.json"))
    given = parser.parse_args(arguments)
    contestants.check_device(given.device)
    plans, dataset = contestants.load_plans(given.dataset, given.plans)
    if given.amos:
        plans, dataset = contestants.as_amos(plans, given.configuration), contestants.amos_labels(dataset)
    settings = {name: value for name, value in vars(given).items() if name not in ("output", "contestants")}
    header = {"settings": settings, "machine": {**contestants.machine(given.device), "compiled": given.compile}}
    record = contestants.Record(given.output, header)

    contestants.as_nnunet_trains(given.device)
    ready = {}
    for name in given.contestants:
        network, patch = build(name, plans, dataset, given.configuration, given.device)
        ready[name] = (torch.compile(network) if given.compile else network, patch)
        predict(*ready[name])
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        predict(*ready[name])
        peak = {"peak_bytes_above_weights": torch.cuda.max_memory_allocated() - before} if given.device == "cuda" else {}
        record.add(name, peak)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(given.rounds):
        for name, (network, patch) in ready.items():
            seconds[name].append(predict(network, patch))

    table = Table(title=f"Prediction of a patch, {header['machine']['device']}")
    for column in ("", "ms, median (least to most)", "over nnU-Net", "peak GiB above weights"):
        table.add_column(column, justify="right")
    for name, values in seconds.items():
        base = seconds.get(contestants.BASELINE, values)
        ratios = [value / b for value, b in zip(values, base, strict=True)]
        result = {**record.results[name], "seconds": values, "over_nnunet": median(ratios)}
        record.add(name, result)
        peak_bytes = result.get("peak_bytes_above_weights")
        table.add_row(
            name,
            f"{median(values) * 1e3:.1f} ({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})",
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            "not measured" if peak_bytes is None else f"{peak_bytes / 2**30:.2f}",
        )
    console = Console(highlight=False)
    console.print(table)
    if "warning" in header["machine"]:
        console.print(header["machine"]["warning"])


if __name__ == "__main__":
    main()
