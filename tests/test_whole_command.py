"""The benchmark of whole commands: what it prints of its rounds, and what it counts as memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from whole_command import CT_VARIANTS, STOCK, VARIANTS, Measured, memory_of_tree, tables

from nnunetv2_e2enet.settings import CHOICES


def test_ratios_are_of_each_round() -> None:
    ours = VARIANTS[1].name
    results = {
        STOCK.name: Measured([100.0, 200.0, 120.0], [3.0, 3.0, 3.0], [4.0, 4.0, 5.0]),
        ours: Measured([30.0, 50.0], [1.0, 1.0], [2.0, 1.0]),  # the third round goes on
        "not measured yet": Measured(),
    }
    seconds, memory, largest = (table.rows() for table in tables(results))
    assert seconds == [
        ["", "seconds", f"over {STOCK.name}"],
        [STOCK.name, "120.0 (100.0 to 200.0)", "1.00 (1.00 to 1.00)"],
        [ours, "40.00 (30.00 to 50.00)", "0.28 (0.25 to 0.30)"],
    ]
    assert memory[0] == ["", "GiB", f"over {STOCK.name}"]
    assert memory[2] == [ours, "1.500 (1.000 to 2.000)", "0.38 (0.25 to 0.50)"]
    assert largest[1][1] == "3.000 (3.000 to 3.000)"
    assert tables({ours: results[ours]})[0].rows()[0] == ["", "seconds"]  # without stock nnU-Net


def test_a_ct_is_measured_with_stock_nnunet_and_both_kinds_of_maps() -> None:
    chosen = [VARIANTS[n] for n in CT_VARIANTS]
    assert chosen[0] == STOCK
    assert [variant.storage for variant in chosen[1:]] == list(CHOICES["engine_storage"][:2])
    assert all(variant.engine == variant.predictor == "on" for variant in chosen)


def test_memory_counts_processes_below() -> None:
    before = memory_of_tree(os.getpid())
    code = "import sys; held = b'x' * (256 << 20); print(len(held), flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == 256 << 20
        assert memory_of_tree(os.getpid()) - before > 240 << 20
        process.communicate()
    np.testing.assert_allclose(memory_of_tree(os.getpid()), before, rtol=0.2)
