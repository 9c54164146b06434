"""Time and peak memory of a prediction on a GPU: E2ENet beside stock nnU-Net.

Networks predict one patch after the other as nnU-Net's predictor lets them: evaluation mode, mixed precision, no gradients;
weights are random. With ``--volume`` the predictor itself predicts a volume of noise, patch by patch, without mirroring. All
contestants are timed in turn, round by round, so that a machine whose speed drifts drifts for all: read the ratios, which are
taken round by round.

    python benchmarks/gpu_inference.py -d 4 --plan amos
    python benchmarks/gpu_inference.py -d 4 --plan amos --volume 128 320 320
    python benchmarks/gpu_inference.py -d 4 --plan amos --compile     # as with nnUNet_compile=1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import contestants
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


def build(
    contestant: str, plans: dict[str, Any], dataset: dict[str, Any], configuration: str, device: str
) -> tuple[Any, nn.Module, Tensor]:
    """A trainer, the network as it builds it, and a patch."""
    with contestants.temporary_results():
        trainer = contestants.trainer_class(contestant)(
            {**plans, "continue_training": False}, configuration, 0, dataset, torch.device(device)
        )
        trainer._do_i_compile = lambda: False
        trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    patch = torch.randn(1, trainer.num_input_channels, *trainer.configuration_manager.patch_size, device=device)
    return trainer, trainer.network.eval(), patch


def predict(network: nn.Module, patch: Tensor) -> float:
    """Seconds of one patch."""
    on_gpu = patch.device.type == "cuda"
    begin = time.perf_counter()
    with torch.inference_mode(), torch.autocast(patch.device.type, enabled=on_gpu):
        network(patch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def predictor_of(trainer: Any, network: nn.Module) -> nnUNetPredictor:
    predictor = nnUNetPredictor(use_mirroring=False, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        *(network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json),
        *(type(trainer).__name__, None),
    )
    return predictor


def predict_volume(predictor: nnUNetPredictor, volume: Tensor) -> float:
    """Seconds of a volume, ``(channels, *space)``, up to its logits."""
    begin = time.perf_counter()
    predictor.predict_sliding_window_return_logits(volume)
    if predictor.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def report(record: contestants.Record, seconds: dict[str, list[float]], what: str) -> None:
    """Add the times of all rounds to the record, and print it."""
    machine = record.content["machine"]
    table = Table(title=f"Prediction of {what}, {machine['device']}")
    for column in ("", "ms, median (least to most)", "over nnU-Net", "peak GiB above weights"):
        table.add_column(column, justify="right")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds.get(contestants.BASELINE, []), strict=False)]
        result = {**record.results[name], "seconds": values, **({"over_nnunet": median(ratios)} if ratios else {})}
        record.add(name, result)
        peak = result.get("peak_bytes_above_weights")
        milliseconds = [1e3 * value for value in values]
        gib = "not measured" if peak is None else f"{peak / 2**30:.2f}"
        what = name + contestants.without(result)
        table.add_row(what, contestants.spread(milliseconds), contestants.spread(ratios, ".2f") if ratios else "-", gib)
    console = Console(highlight=False)
    console.print(table)
    if "warning" in machine:
        console.print(machine["warning"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", required=True, help="a preprocessed data set, by name or number")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--plan", choices=contestants.PLANS, default="own", help="amos: network and patch of nnU-Net's")
    parser.add_argument("--volume", type=int, nargs="+", help="voxels an axis: predict a whole volume in the place of a patch")
    parser.add_argument("--contestants", nargs="+", default=contestants.timed(), choices=contestants.CONTESTANTS)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu_inference.json"))
    given = parser.parse_args(arguments)
    contestants.check_device(given.device)
    plans, dataset = contestants.load(given.dataset, given.plans, given.configuration, given.plan)
    settings = {name: value for name, value in vars(given).items() if name not in ("output", "contestants")}
    what = "a patch" if given.volume is None else f"a volume of {' x '.join(map(str, given.volume))}"
    header = {"settings": settings, "machine": {**contestants.machine(given.device), "compiled": given.compile}}
    record = contestants.Record(given.output, header)

    contestants.as_nnunet_trains(given.device)
    torch._dynamo.config.cache_size_limit = 8 * len(given.contestants)  # of networks of one class: others would run eagerly
    ready: dict[str, Callable[[], float]] = {}
    for name in given.contestants:
        trainer, network, patch = build(name, plans, dataset, given.configuration, given.device)
        network = cast(nn.Module, torch.compile(network)) if given.compile else network
        if given.volume is None:
            ready[name] = partial(predict, network, patch)
        else:
            volume = torch.randn(patch.shape[1], *given.volume)
            ready[name] = partial(predict_volume, predictor_of(trainer, network), volume)
        ready[name]()
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        ready[name]()
        peak = {"peak_bytes_above_weights": torch.cuda.max_memory_allocated() - before} if given.device == "cuda" else {}
        record.add(name, {"without_kernels": contestants.without_kernels(network), **peak})
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(given.rounds):
        for name, once in ready.items():
            seconds[name].append(once())
            record.add(name, {**record.results[name], "seconds": seconds[name]})
    report(record, seconds, what)


if __name__ == "__main__":
    main()
