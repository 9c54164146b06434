"""Profiles in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from nnunetv2_e2enet.evaluation.numbers import NOTHING, gib, giga, millions
from nnunetv2_e2enet.evaluation.profile import Profile, Settings

COLUMNS = (
    "Stored: in memory and checkpoints. Dense: all connections. Active: those that the sparse topology leaves, and the dense "
    "layers. Executed: what the program multiplies with weights in a prediction. PyTorch multiplies masked weights like any "
    "others, so executed is dense; the CPU engine leaves them out, and its Winograd convolutions need fewer still."
)


def print_profiles(console: Console, profiles: list[Profile], settings: Settings, levels: bool, flows: bool) -> None:
    console.print(_counts(profiles))
    console.print(COLUMNS)
    if len({p.patch_size for p in profiles}) > 1:
        console.print("The patches differ, so multiply-accumulates, memory and time are not of the same amount of image.")
    if settings.with_memory or settings.with_time:
        console.print()
        console.print(measured(profiles, settings))
        console.print(how_measured(settings))
    for p in profiles:
        if p.note:
            console.print(f"{p.name}: {p.note}")
        if levels or flows:
            console.print(_parts(p, flows))


def _counts(profiles: list[Profile]) -> Table:
    table = _table("Parameters, and multiply-accumulates (MAC) of one patch")
    table.add_column("network", overflow="fold")
    table.add_column("patch", no_wrap=True)
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


def measured(profiles: Sequence[Profile], settings: Settings) -> Table:
    table = _table(f"Measured on {settings.device}, {settings.threads} threads, {settings.dtype}")
    table.add_column("network", overflow="fold")
    for title in ("training\npeak", "prediction\npeak", "patch\nmedian", "quartiles", "Mvoxel/s"):
        table.add_column(title, justify="right")
    for p in profiles:
        peaks = [NOTHING if math.isnan(n) else gib(n) for n in (p.training_bytes, p.prediction_bytes)]
        low, median, high = p.latency
        times = [f"{median:.3f} s", f"{low:.3f} to {high:.3f}", f"{p.voxels_per_second / 1e6:.2f}"]
        table.add_row(p.name, *peaks, *([NOTHING] * 3 if math.isnan(median) else times))
    return table


def how_measured(settings: Settings) -> str:
    batch = "the plans' batch" if settings.batch_size is None else f"a batch of {settings.batch_size}"
    parts = []
    if settings.with_memory:
        what = "PyTorch's allocations" if settings.device == "cuda" else "the process's growth, in float32"
        parts.append(f"Peaks: {what}; training is one step of {batch} with nnU-Net's loss, prediction one patch.")
    if settings.with_time:
        parts.append(f"Time: {settings.rounds} forward passes of one patch each, the networks in turns.")
    return " ".join(parts)


def _parts(p: Profile, flows: bool) -> Table:
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
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
