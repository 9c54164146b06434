"""Epoch time and peak memory of a training on a GPU: E2ENet beside stock nnU-Net.

Measured as nnU-Net's own benchmark trainers do: five epochs of a normal training, of which the fastest counts, with data
loading and without (one random batch that stays on the GPU), each in a process of its own. Compilation, mixed precision and
deep supervision are as in a training; the first update of the topology would be after these epochs.

    export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/gpu_training.py -d 4                       # a preprocessed data set, its own plans
    python benchmarks/gpu_training.py -d 4 --plan amos                # network, patch and batch of nnU-Net's plans for AMOS
    python benchmarks/gpu_training.py -d 4 --plan amos --profile      # and where the time of a step goes

Results are in ``--output``, written after each measurement; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import contestants
import torch
from rich.console import Console
from rich.table import Table

from nnunetv2_e2enet.training.variants import variant


@dataclass(frozen=True)
class Settings:
    """How much is measured, and of what."""

    dataset: str
    configuration: str
    plans: str
    plan: str
    epochs: int
    iterations: int
    validation_iterations: int
    device: str


def timed(base: Any, settings: Settings, loading: bool) -> Any:
    """A trainer that trains as ``base`` does, for a while, and keeps no checkpoints."""
    length = {
        "num_epochs": settings.epochs,
        "num_iterations_per_epoch": settings.iterations,
        "num_val_iterations_per_epoch": settings.validation_iterations,
    }

    class Timed(variant(base, "timed", **length, disable_checkpointing=True)):  # type: ignore[misc]
        def save_checkpoint(self, filename: str) -> None:
            pass

        def on_epoch_end(self) -> None:
            if self.current_epoch == 0 and self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # of compiling, and of trying convolution algorithms
            super().on_epoch_end()

        def get_dataloaders(self) -> Any:
            if loading:
                return super().get_dataloaders()
            batch = self.random_batch()
            return itertools.repeat(batch), itertools.repeat(batch)

        def random_batch(self) -> dict[str, Any]:
            patch = self.configuration_manager.patch_size
            shape = (self.batch_size, self.num_input_channels)
            labels = max(self.label_manager.all_labels)
            scales = self._get_deep_supervision_scales() or [[1] * len(patch)]
            sizes = [[int(p * s) for p, s in zip(patch, scale, strict=True)] for scale in scales]
            targets = [torch.randint(labels + 1, (shape[0], 1, *size), device=self.device).float() for size in sizes]
            return {
                "data": torch.rand((*shape, *patch), device=self.device),
                "target": targets if self.enable_deep_supervision else targets[0],
            }

    return Timed


def measure(contestant: str, settings: Settings, loading: bool, profile: bool) -> dict[str, Any]:
    """Train one contestant; seconds of the fastest epoch and bytes at the peak."""
    plans, dataset = contestants.load(settings.dataset, settings.plans, settings.configuration, settings.plan)
    plans["continue_training"] = False
    torch.manual_seed(0)
    cls = timed(contestants.trainer_class(contestant), settings, loading)
    with contestants.temporary_results():
        trainer = cls(plans, settings.configuration, 0, dataset, torch.device(settings.device))
        contestants.as_nnunet_trains(settings.device)
        trainer.run_training()
        starts, ends = (trainer.logger.get_value(f"epoch_{edge}_timestamps", step=None) for edge in ("start", "end"))
        epochs = [end - start for start, end in zip(starts, ends, strict=True)]
        result: dict[str, Any] = {"fastest_epoch_seconds": min(epochs), "epoch_seconds": epochs}
        result["without_kernels"] = contestants.without_kernels(trainer.network)
        if settings.device == "cuda":
            result["peak_bytes_allocated"] = torch.cuda.max_memory_allocated()
        if profile:
            result["profile"] = profile_step(trainer)
    return result


def profile_step(trainer: Any) -> list[dict[str, Any]]:
    """Where the device time (on the CPU, the time) of three training steps goes: the 20 largest operations."""
    steps = 3
    batch = trainer.random_batch()
    trainer.network.train()  # which validation has left in evaluation mode
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.train_step(batch)
    on_gpu = trainer.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            trainer.train_step(batch)
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = [event for event in profiler.key_averages() if not on_gpu or _is_kernel(event)]
    averages.sort(key=lambda event: -getattr(event, attribute))
    whole = sum(getattr(event, attribute) for event in averages)
    return [
        {"operation": event.key, "calls": event.count // steps, "share": round(getattr(event, attribute) / whole, 4)}
        for event in averages[:20]
    ]


def _is_kernel(event: Any) -> bool:
    """Operations of the CPU, and ranges with a name, have the time of their kernels once more."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation


def in_own_process(*arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def print_results(record: contestants.Record, console: Console) -> None:
    table = Table(title=f"Training, {record.content['machine']['device']}")
    for name in ("", "data loading", "fastest epoch, s", "over nnU-Net", "peak GiB", "over nnU-Net"):
        table.add_column(name, justify="right")
    for key, result in record.results.items():
        contestant, loading = key.split(" | ")
        base = record.results.get(f"{contestants.BASELINE} | {loading}")

        def cells(name: str, form: str, unit: float, result: Any = result, base: Any = base) -> list[str]:
            if name not in result:
                return ["not measured", ""]
            return [f"{result[name] / unit:{form}}", f"{result[name] / base[name]:.2f}" if base else ""]

        times, peaks = cells("fastest_epoch_seconds", ".2f", 1), cells("peak_bytes_allocated", ".2f", 2**30)
        table.add_row(contestant + contestants.without(result), loading, *times, *peaks)
    console.print(table)
    if "warning" in record.content["machine"]:
        console.print(record.content["machine"]["warning"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", required=True, help="a preprocessed data set, by name or number")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--plan", choices=contestants.PLANS, default="own", help="amos: network, patch and batch of nnU-Net's")
    parser.add_argument("--contestants", nargs="+", default=contestants.timed(), choices=contestants.CONTESTANTS)
    parser.add_argument("--loading", nargs="+", default=["without", "with"], choices=["without", "with"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("--validation-iterations", type=int, default=50)
    parser.add_argument("--profile", action="store_true", help="also say where the time of a step goes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu_training.json"))
    given = parser.parse_args(arguments)
    contestants.check_device(given.device)
    settings = Settings(
        *(given.dataset, given.configuration, given.plans, given.plan),
        *(given.epochs, given.iterations, given.validation_iterations, given.device),
    )
    record = contestants.Record(given.output, {"settings": asdict(settings), "machine": contestants.machine(given.device)})
    run = in_own_process if given.device == "cuda" else measure
    for loading, contestant in itertools.product(given.loading, given.contestants):
        key = f"{contestant} | {loading}"
        if key not in record.results:
            record.add(key, run(contestant, settings, loading == "with", given.profile))
    print_results(record, Console(highlight=False))


if __name__ == "__main__":
    main()
