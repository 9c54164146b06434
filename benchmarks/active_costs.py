"""What DSFF leaves: parameters and multiply-accumulates of active connections, by sparsity, beside stock nnU-Net.

Both are counted for a patch of the AMOS plan with 16 classes, with the heads of all levels, as in training; nothing is
computed, and no device is needed. ``--json`` writes the record from which ``make results`` makes tables of docs/results.md.

    python benchmarks/active_costs.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import recording
from contestants import BASELINE
from plans import AMOS
from torch import nn

from nnunetv2_e2enet.network import accounts

SPARSITIES = (0.0, 0.7, 0.8, 0.862, 0.9)
TITLE = f"AMOS, {' x '.join(map(str, AMOS.patch))}, {AMOS.classes} classes"


def count(sparsities: Sequence[float] = SPARSITIES) -> list[recording.Table]:
    """Of all active connections; then of the fusion, which can be switched off, and of encoder and heads, which cannot."""
    shape = (1, 1, *AMOS.patch)
    parameters: dict[str, list[float]] = {}
    forward: dict[str, list[float]] = {}
    fusion: dict[str, list[float]] = {}
    dense: dict[str, list[float]] = {}
    networks: list[tuple[str, nn.Module]] = [(BASELINE, AMOS.stock())]
    networks += [(f"E2ENet, S = {sparsity:g}", AMOS.e2enet(sparsity)) for sparsity in sparsities]
    for name, network in networks:
        macs = accounts.multiply_accumulates(network, shape)
        parameters[name] = [accounts.parameter_counts(network).active / 1e6]
        forward[name] = [macs.active / 1e9]
        if name != BASELINE:
            dense[name] = [(macs.total - macs.maskable) / 1e9]
            fusion[name] = [forward[name][0] - dense[name][0]]
    return [
        recording.Table(f"{TITLE}: active parameters", parameters, [BASELINE], unit="million"),
        recording.Table(f"{TITLE}: multiply-accumulates of a forward pass", forward, [BASELINE], unit="G"),
        recording.Table(f"{TITLE}: of these in the fusion", fusion, [], unit="G"),
        recording.Table(f"{TITLE}: of these in encoder and heads", dense, [], unit="G"),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the counts")
    given = parser.parse_args(arguments)
    tables = count()
    for table in tables:
        print("\n".join(table.lines()))
    if given.json:
        recording.write(given.json, tables, counted=True)


if __name__ == "__main__":
    main()
