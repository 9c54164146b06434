"""The benchmark of whole commands: what it prints of its rounds, and what it counts as memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from whole_command import CT_VARIANTS, STOCK, VARIANTS, Measured, memory_of_tree, table

from nnunetv2_e2enet.settings import CHOICES


def test_ratios_are_of_each_round() -> None:
    ours = VARIANTS[1].name
    results = {
        STOCK.name: Measured([100.0, 200.0, 120.0], [3.0, 3.0, 3.0], [4.0, 4.0, 5.0]),
        ours: Measured([30.0, 50.0, 60.0], [1.0, 1.0, 1.0], [2.0, 1.0, 2.0]),
        "not measured yet": Measured(),
    }
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(results).splitlines()]
    assert rows[0][1:] == ["seconds", "ratio", "GiB, all processes", "ratio", "GiB, largest process"]
    assert rows[2] == [
        STOCK.name,
        "120.0 (100.0 to 200.0)",
        "1.00 (1.00 to 1.00)",
        "4.00 (4.00 to 5.00)",
        "1.00 (1.00 to 1.00)",
        "3.00 (3.00 to 3.00)",
    ]
    assert rows[3][2] == "0.30 (0.25 to 0.50)"
    assert rows[3][4] == "0.40 (0.25 to 0.50)"
    assert len(rows) == 4
    assert table({ours: results[ours]}).splitlines()[2].split("|")[3].strip() == "-"  # without stock nnU-Net


def test_a_ct_is_measured_with_stock_nnunet_and_both_kinds_of_maps() -> None:
    chosen = [VARIANTS[n] for n in CT_VARIANTS]
    assert chosen[0] == STOCK
    assert [variant.storage for variant in chosen[1:]] == list(CHOICES["engine_storage"][:2])
    assert all(variant.engine == variant.predictor == "on" for variant in chosen)


def test_memory_counts_processes_below() -> None:
    before = memory_of_tree(os.getpid())
    code = "import sys; held = b'x' * (64 << 20); print(len(held), flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == 64 << 20
        assert memory_of_tree(os.getpid()) - before > 60 << 20
        process.communicate()
    np.testing.assert_allclose(memory_of_tree(os.getpid()), before, rtol=0.2)
