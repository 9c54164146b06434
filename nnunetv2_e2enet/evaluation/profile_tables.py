"""Profiles in tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd
from rich.console import Console

from nnunetv2_e2enet.evaluation.costs import SHARED
from nnunetv2_e2enet.evaluation.numbers import NOTHING, gib, giga, millions, sizes
from nnunetv2_e2enet.evaluation.profile import Profile, ProfileSettings
from nnunetv2_e2enet.evaluation.tables import Table
from nnunetv2_e2enet.network import E2ENet

COLUMNS = (
    "Stored: in memory and checkpoints. Dense: all connections. Active: those that the sparse topology leaves, and the dense "
    "layers. Executed: what the program multiplies with weights in a prediction. PyTorch multiplies masked weights like any "
    "others, so executed is dense; the CPU engine leaves them out, and its Winograd convolutions need fewer still."
)


def print_profiles(console: Console, profiles: list[Profile], settings: ProfileSettings, levels: bool, flows: bool) -> None:
    """Counts, measurements, and the costs of levels or flows where they are asked for."""
    _counts(profiles).print(console)
    console.print(COLUMNS)
    if len({p.patch_size for p in profiles}) > 1:
        console.print("The patches differ, so multiply-accumulates, memory and time are not of the same amount of image.")
    if settings.with_memory or settings.with_time:
        console.print()
        measurements(profiles, settings).print(console)
        console.print(how_measured(settings))
    for note in missing_measurements(profiles):
        console.print(note)
    if levels or flows:
        for p in profiles:
            _parts(p, flows).print(console)


def print_exceptions(console: Console, profiles: list[Profile]) -> None:
    """A line for each E2ENet whose prediction or training is left to PyTorch, with the reason."""
    for p in profiles:
        reasons = {"prediction": p.why_pytorch_predicts, "training": p.why_pytorch_trains}
        by_reason = {reason: [what for what in reasons if reasons[what] == reason] for reason in reasons.values() if reason}
        for reason, what in by_reason.items():
            if p.architecture == E2ENet.__name__:
                console.print(f"{p.name}: {' and '.join(what)} in PyTorch: {reason}.")


def cost_columns(costs: pd.DataFrame) -> pd.DataFrame:
    """Columns of ``Costs`` as people read them."""
    written = {"parameters": ("param.", millions), "macs": ("MAC", giga)}
    text = {}
    for name, values in costs.items():
        what, _, kind = name.partition("_")
        head, write = written[what]
        text[f"{head}\n{kind}"] = [NOTHING if math.isnan(number) else write(number) for number in values]
    return pd.DataFrame(text, costs.index)


def _counts(profiles: list[Profile]) -> Table:
    text = cost_columns(pd.DataFrame([asdict(p.costs) for p in profiles]))
    text.insert(0, "network", [p.name for p in profiles])
    text.insert(1, "patch", [sizes(p.patch_size) for p in profiles])
    return Table("Parameters, and multiply-accumulates (MAC) of one patch", text, words=2)


def measurements(profiles: Sequence[Profile], settings: ProfileSettings, with_patch: bool = False) -> Table:
    """Peaks of memory, and time."""
    head = ["network", "training\npeak", "prediction\npeak", "patch\nmedian", "quartiles", "Mvoxel/s", "batch", "patch"]
    rows = []
    for p in profiles:
        peaks = [NOTHING if math.isnan(n) else gib(n) for n in (p.training_bytes, p.prediction_bytes)]
        low, median, high = p.latency
        times = [f"{median:.3f} s", f"{low:.3f} to {high:.3f}", f"{p.voxels_per_second / 1e6:.2f}"]
        times = [NOTHING] * 3 if math.isnan(median) else times
        rows.append([p.name, *peaks, *times, str(p.batch_size), sizes(p.patch_size)])
    title = f"Measured on {settings.device}, {settings.threads} threads, {settings.dtype}"
    table = Table.of(title, head, rows)
    return table if with_patch else Table(title, table.frame.drop(columns=["batch", "patch"]))


def missing_measurements(profiles: Sequence[Profile]) -> list[str]:
    """Why measurements are missing, a line for each network that lacks any."""
    return [f"{p.name}: {p.note}" for p in profiles if p.note]


def how_measured(settings: ProfileSettings) -> str:
    """The measurements in words."""
    batch = "the plans' batch" if settings.batch_size is None else f"a batch of {settings.batch_size}"
    parts = []
    if settings.with_memory:
        on_gpu = settings.device == "cuda"
        what = "PyTorch's allocations, under autocast" if on_gpu else "the process's growth, in float32"
        parts.append(f"Peaks: {what}; training is one step of {batch} with nnU-Net's loss, prediction one patch.")
    if settings.with_time:
        parts.append(f"Time: {settings.rounds} forward passes of one patch each, the networks in turns.")
    return " ".join(parts)


def _parts(p: Profile, flows: bool) -> Table:
    keys = ["level", "flow"] if flows else ["level"]
    sums = p.shares.groupby(keys, observed=True)[SHARED].sum()
    text = cost_columns(sums).reset_index()
    title = f"{p.name}: costs by level (0 is the finest)" + (" and flow" if flows else "")
    return Table(title, text.astype(str), words=len(keys))
