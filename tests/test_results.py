"""Tables and figures of docs/results.md: from the records alone, with the numbers of the records."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import contestants
import gpu_results
import numpy as np
import pytest
import recording
import results
import starts
from recording import Table

from nnunetv2_e2enet.evaluation.statistics import mean_interval

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = "\n\n".join(
    ["Before.", *(f"{begin}\n\nwhat was there\n\n{end}" for begin, end in map(results.markers, results.PARTS)), "After.\n"]
)


def run(case_dice: dict[str, list[float]], parameters: int = 1_500_000) -> dict[str, Any]:
    return {
        "dice": float(np.mean(list(case_dice.values()))),
        "case_dice": case_dice,
        "costs": {"parameters_active": parameters, "macs_active": 2_340_000_000},
        "cases": len(case_dice),
        "epochs": 2,
        "median_epoch_seconds": 61.4,
        "pseudo_dice": [0.5, 0.6],
        "epoch_seconds": [60.0, 62.8],
        "machine": {"device": "CPU (some processor, 2 cores)", "torch": "2.13.0"},
        "commit": "0123456789",
    }


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    path = tmp_path / "results.md"
    path.write_text(PAGE)
    return path


def test_every_call_that_trained_a_fold_is_named(page: Path) -> None:
    first, second = (
        {"epoch": epoch, "machine": {"device": f"CPU {epoch}", "torch": "2"}, "commit": f"c{epoch}"} for epoch in (0, 6)
    )
    trained = {**run({"a": [0.8]}), "calls": [first, second, second]}
    del trained["machine"], trained["commit"]
    write(page, {"nnU-Net | fold 0": trained})
    results.main(["--page", str(page)])
    text = page.read_text()
    assert "| c0, c6 |" in text
    assert "CPU 0, torch 2; CPU 6, torch 2." in text


def write(page: Path, runs: dict[str, Any], **header: str) -> None:
    record = {"settings": {"epochs": 2, "iterations": 250, "width": None}, **header, "results": runs}
    (page.parent / "results" / "study.json").write_text(json.dumps(record))


def test_numbers_are_those_of_the_records(page: Path) -> None:
    stock = {"a": [0.80, 0.70], "b": [0.60, 0.50], "c": [0.90, 0.80]}
    ours = {"a": [0.81, 0.71], "b": [0.58, 0.48], "c": [0.93, 0.83]}
    other = {"d": [0.5, 0.5], "e": [0.7, 0.7]}
    better = {case: [value + 0.02 for value in values] for case, values in other.items()}
    write(
        page,
        {
            "E2ENet 0.8 | fold 1": run(better),
            "nnU-Net | fold 1": run(other),
            "E2ENet 0.8 | fold 0": run(ours, 456_000),
            "nnU-Net | fold 0": run(stock),
        },
        remark="On a shared machine.",
    )
    results.main(["--page", str(page)])
    text = page.read_text()
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert "what was there" not in text
    assert "On a shared machine." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[:2] for row in rows] == [
        ["0", "nnU-Net"],
        ["0", "E2ENet 0.8"],
        ["1", "nnU-Net"],
        ["1", "E2ENet 0.8"],
        ["mean of 2", "E2ENet 0.8"],
    ]
    expected = mean_interval(np.array([1.0, -2.0, 3.0]))
    assert rows[1][2:5] == ["0.7233", f"+0.67 ({expected.low:+.2f} to {expected.high:+.2f})", "0.46 M"]
    assert rows[3][3] == "+2.00 (+2.00 to +2.00)"
    assert rows[4][2:4] == [f"{(0.7233333 + 0.62) / 2:.4f}", "+1.33"]
    assert rows[0][5:] == ["2.34 G", "61", "0123456789"]
    drawing = (page.parent / "results" / "study.svg").read_text()
    assert "iterations" in drawing
    assert "E2ENet 0.8" in drawing
    results.main(["--page", str(page)])
    assert page.read_text() == text


def test_without_the_baseline_nothing_is_compared(page: Path) -> None:
    write(page, {"E2ENet 0.9 | fold 0": run({"a": [0.5]})})
    results.main(["--page", str(page)])
    assert "| 0 | E2ENet 0.9 | 0.5000 |  | 1.50 M |" in page.read_text()


def test_dice_of_each_structure(page: Path) -> None:
    """Also where a structure is in none of a case's two segmentations, and has no Dice there."""
    named = {"structures": ["liver", "spleen"]}
    stock = {**run({"a": [0.8, 0.5], "b": [0.6, float("nan")]}), **named}
    ours = {**run({"a": [0.7, 0.6], "b": [0.5, float("nan")]}), **named}
    write(page, {"nnU-Net | fold 0": stock, "E2ENet 0.8 | fold 0": ours, "E2ENet 0.9 | fold 0": run({"a": [0.5], "b": [0.5]})})
    results.main(["--page", str(page)])
    rows = page.read_text().splitlines()
    at = rows.index("| structure | nnU-Net, fold 0 | E2ENet 0.8, fold 0 |")
    assert rows[at + 2 : at + 4] == ["| liver | 0.700 | 0.600 |", "| spleen | 0.500 | 0.600 |"]
    assert "-5.00 (-10.00 to " in next(row for row in rows if row.startswith("| 0 | E2ENet 0.8 |"))


def test_structures_that_a_run_does_not_find_are_left_out_of_two_rows(page: Path) -> None:
    """A structure is found where its mean Dice is at least 0.1, by all runs of a record."""
    named = {"structures": ["liver", "node", "spleen"]}
    stock = {**run({"a": [0.8, 0.9, 0.5], "b": [0.6, 0.9, 0.7]}), **named}
    ours = {**run({"a": [0.9, 0.1, 0.6], "b": [0.7, 0.0, 0.6]}), **named}
    alone = {**run({"c": [0.5, 0.9, 0.7]}), **named}
    write(page, {"nnU-Net | fold 0": stock, "E2ENet 0.8 | fold 0": ours, "E2ENet 0.8 | fold 1": alone})
    results.main(["--page", str(page)])
    rows = page.read_text().splitlines()
    at = rows.index("| spleen | 0.600 | 0.600 | 0.700 |")
    expected = mean_interval(np.array([10.0, 0.0]))
    assert rows[at + 1 : at + 4] == [
        "| the 2 that all find | 0.650 | 0.700 | 0.600 |",
        f"| points above nnU-Net, 95 % |  | +5.00 ({expected.low:+.2f} to {expected.high:+.2f}) |  |",
        "",
    ]


def test_what_does_not_belong_together_is_refused(page: Path) -> None:
    write(page, {"nnU-Net | fold 0": run({"a": [0.5]}), "E2ENet 0.8 | fold 0": run({"b": [0.5]})})
    with pytest.raises(SystemExit, match="do not belong together"):
        results.main(["--page", str(page)])
    assert page.read_text() == PAGE
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the markers"):
        results.main(["--page", str(page)])


def words(drawing: Path) -> list[str]:
    """What a drawing says: labels and numbers of the axes, names in the legend. Its lines depend on matplotlib's version."""
    texts = ["".join(text.itertext()).strip() for text in ElementTree.parse(drawing).iter("{http://www.w3.org/2000/svg}text")]
    assert len(texts) > 10
    return texts


def test_the_page_is_what_the_records_give(tmp_path: Path) -> None:
    shutil.copy(DOCS / "results.md", tmp_path)
    records = DOCS / "results"
    (tmp_path / "results").mkdir()
    for record in records.rglob("*.json"):
        target = tmp_path / "results" / record.relative_to(records)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(record, target)
    results.main(["--page", str(tmp_path / "results.md")])
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text(), "run `make results`"
    drawn = sorted(path.name for path in (tmp_path / "results").glob("*.svg"))
    assert drawn == sorted(f"{record.stem}.svg" for record in records.glob("*.json"))
    for name in drawn:
        assert words(tmp_path / "results" / name) == words(records / name), "run `make results`"


def gpu_record(what: str, result: Any, warning: bool = False) -> dict[str, Any]:
    machine = {"device": "some GPU", "torch": "2.13.0", **({"warning": contestants.WITHOUT_GPU} if warning else {})}
    return {"what": what, "commit": "0123456789", "machine": machine, "result": result}


def test_tables_of_a_gpu(page: Path) -> None:
    records = [
        gpu_record("1 test_kernels.py", {"passed": True, "end": "....\n=== 60 passed in 9.0s ===\n"}),
        gpu_record("1 check of the kernels", {"fused kernels": 12.3, "others": 40.0}),
        gpu_record(
            "2 nnU-Net, compiled", {"milliseconds": [40.0, 43.0, 41.0], "peak_bytes": 3 * 2**30, "without_kernels": []}
        ),
        gpu_record("2 B16active, compiled", {"milliseconds": [4.0], "without_kernels": ["fused kernels", "convolutions"]}),
        gpu_record("3 patch", {"E2ENet 0.8": {"seconds": [0.02, 0.03, 0.04], "over_nnunet": 0.9}}),
        gpu_record("3 volume", {"E2ENet 0.8": {"seconds": [0.5], "without_kernels": ["fused kernels"]}}),
        gpu_record("4 48 maps", {"conv3d": {"wall": [2.0, 2.5, 1.5], "device": [1.0]}, "over slices": {"wall": [3.0]}}),
        gpu_record("5 nnU-Net", {"profile": [{"operation": "convolution", "calls": 3, "share": 0.5}]}),
        gpu_record("6 E2ENet 0.8", {"E2ENet 0.8 | fold 0": {"dice": 0.9, "epochs": 100, "median_epoch_seconds": 9.0}}),
    ]
    folder = page.parent / "results" / "gpu"
    folder.mkdir()
    for record in records:
        (folder / f"{record['what']}.json").write_text(json.dumps(record))
    results.main(["--page", str(page)])
    text = page.read_text()
    for row in (
        "| test_kernels.py | passed: 60 passed in 9.0s |",
        "| check of the kernels | fused kernels 12 s, others 40 s |",
        "| nnU-Net, compiled | 41.0 (40.0 to 43.0) ms, peak 3.00 GiB |",
        "| B16active, compiled | 4.0 (4.0 to 4.0) ms, without fused kernels and convolutions |",
        "| patch: E2ENet 0.8 | 30.0 (20.0 to 40.0) ms, 0.90 of nnU-Net's |",
        "| volume: E2ENet 0.8 | 500.0 (500.0 to 500.0) ms, without fused kernels |",
        "| 48 maps: conv3d | 1.00 (1.00 to 1.00) ms on the device, 2.00 (1.50 to 2.50) ms from the call to its end |",
        "| 48 maps: over slices | 3.00 (3.00 to 3.00) ms from the call to its end |",
        "| nnU-Net | convolution 50% |",
        "| E2ENet 0.8, fold 0 | Dice 0.9000 after 100 epochs of 9.0 s |",
    ):
        assert row in text
    assert text.count("some GPU, torch 2.13.0, 0123456789.") == len({record["what"][0] for record in records})
    results.main(["--page", str(page)])
    assert page.read_text() == text
    (folder / "dry.json").write_text(json.dumps(gpu_record("2 blocks", {"milliseconds": [1.0]}, warning=True)))
    with pytest.raises(SystemExit, match="'2 blocks' is of a dry run without a GPU"):
        results.main(["--page", str(page)])


def test_what_failed_on_a_gpu_is_listed(page: Path) -> None:
    """Until it has been measured; of a part of it that was, the numbers. All records of a session are in one file."""
    error = {"device": "cuda", "error": "exit status 1", "end": "Traceback\n  more\nRuntimeError: out of | memory\n"}
    records = [
        gpu_record("2 blocks, compiled", {"milliseconds": [1.0, 2.0, 3.0]}),
        {"what": "2 blocks, compiled", **error},
        {"what": "2 none, compiled", **error},
        {"what": "4 48 maps", **error, "partial": {"conv3d": {"device": [2.0, 2.5, 1.5]}}},
    ]
    folder = page.parent / "results" / "gpu"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"records": records}))
    results.main(["--page", str(page)])
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ") and line.strip("| -")]
    failed = "failed, exit status 1: RuntimeError: out of \\| memory"
    assert rows == [
        "| blocks, compiled | 2.0 (1.0 to 3.0) ms |",
        f"| none, compiled | {failed} |",
        "| 48 maps: conv3d | 2.00 (1.50 to 2.50) ms on the device |",
        f"| 48 maps | {failed} |",
    ]
    (folder / "results.json").write_text(json.dumps({"records": [{"what": "2 none, compiled", **error, "device": "cpu"}]}))
    with pytest.raises(SystemExit, match="'2 none, compiled' is of a dry run without a GPU"):
        results.main(["--page", str(page)])


def test_steps_that_compute_something_else_are_listed() -> None:
    """Of the same function an eager one is right; where there is none, the first."""

    def step(what: str, function: str, loss: float, norm: float, scale: float = 65536.0) -> dict[str, Any]:
        found = {"function": function, "first_loss": loss, "gradient_norm": norm, "loss_scale": scale}
        return gpu_record(f"2 {what}", {"milliseconds": [1.0], **found})

    records = [
        step("blocks, compiled", "E2ENet", 1.06, 2.0),
        step("none, compiled", "E2ENet", 0.96, 2.09, 32768.0),
        step("blocks, eager", "E2ENet", 1.0, 2.0),
        step("nnU-Net, compiled", "nnU-Net", 3.0, float("inf")),
        step("nnU-Net, compiled, channels last", "nnU-Net", 3.0, 2.0),
        gpu_record("2 of an older session", {"milliseconds": [1.0]}),
    ]
    lines = gpu_results.section(records)
    assert [line for line in lines if " of " in line and "older" not in line] == [
        "| blocks, compiled | loss of the first step 1.06, of blocks, eager 1 |",
        "| none, compiled | last loss scale 3.277e+04, of blocks, eager 6.554e+04 |",
        "| nnU-Net, compiled, channels last | norm of its gradient 2, of nnU-Net, compiled inf |",
    ]


@pytest.mark.parametrize(
    ("what", "partial", "expected"),
    [
        ("2 none", {"milliseconds": [1.0, 2.0], "first_step_seconds": 9.0}, ["| none | 1.5 (1.0 to 2.0) ms |"]),
        ("2 none", {"milliseconds": [], "first_step_seconds": 9.0}, []),
        ("2 none", {}, []),
        (
            "3 patch",
            {
                "nnU-Net": {"peak_bytes_above_weights": 5, "seconds": [0.5]},
                "E2ENet 0.8": {"peak_bytes_above_weights": 5},
                "a": {},
            },
            ["| patch: nnU-Net | 500.0 (500.0 to 500.0) ms |"],
        ),
        ("3 volume", {"nnU-Net": {"seconds": []}}, []),
        ("4 48 maps", {"conv3d": {"wall": [], "device": []}}, []),
    ],
)
def test_what_a_stopped_measurement_found_is_in_the_tables(what: str, partial: Any, expected: list[str]) -> None:
    """Also where it had not timed anything yet."""
    record = {"what": what, "device": "cuda", "error": "stopped after 9 s", "end": "", "partial": partial}
    rows = [line for line in gpu_results.section([record]) if line.startswith("| ") and line.strip("| -")]
    assert rows == [*expected, f"| {what[2:]} | failed, stopped after 9 s: no output |"]


def test_tables_of_a_cpu(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Table("A patch", {"nnU-Net": [2.0, 4.0, 3.0], "E2ENet": [1.0, 1.0, 2.0], "missing": []}, ["nnU-Net"], ["of noise"])
    other = Table("Memory", {"nnU-Net": [8.0], "E2ENet": [4.0]}, ["nnU-Net"], unit="GiB")
    file = page.parent / "results" / "cpu" / "some_cpu.json"
    file.parent.mkdir()
    monkeypatch.setattr("sys.argv", ["/somewhere/cpu_inference.py", "--json", str(file), "--parts", "targets"])
    recording.write(file, [one, other])
    results.main(["--page", str(page)])
    text = page.read_text()
    for line in (
        "### `python benchmarks/cpu_inference.py --parts targets`",
        "A patch: median (least to most).",
        "|  | seconds | over nnU-Net |",
        "| nnU-Net | 3.000 (2.000 to 4.000) | 1.00 (1.00 to 1.00) |",
        "| E2ENet | 1.000 (1.000 to 2.000) | 0.50 (0.25 to 0.67) |",
        "- of noise",
        "Memory.",
        "| E2ENet | 4.000 | 0.50 |",
    ):
        assert line in text.splitlines()
    assert "missing" not in text
    assert f"commit {contestants.COMMIT}." in text
    assert str(file) not in text
    printed = "\n".join(one.lines())
    assert "A patch: median (least to most)" in printed
    assert "0.50 (0.25 to 0.67)" in printed


def test_starts(page: Path) -> None:
    """Means over seeds; a variant is compared with the method's runs of the same seeds."""

    def run_of(dice: float, density: float) -> dict[str, Any]:
        flows = [{flow: {"amplitude": 0.5, "density": d} for flow in starts.FLOWS} for d in (0.2, density)]
        return {"commit": "0123456789", "losses": [0.0], "dice": dice, "flows": flows}

    runs = {
        f"{starts.METHOD} | seed 0": run_of(0.7, 0.1),
        "gain 0.5 | seed 0": run_of(0.75, 0.2),
        f"{starts.METHOD} | seed 1": run_of(0.8, 0.3),
        "gain 0.5 | seed 1": run_of(0.79, 0.2),
        "gain 0.7 | seed 2": run_of(0.5, 0.2),
    }
    record = {"dataset": "4", "batch_size": 2, "machine": {"device": "some CPU", "torch": "2.13.0"}, "results": runs}
    file = page.parent / "results" / "starts" / "hippocampus.json"
    file.parent.mkdir()
    file.write_text(json.dumps({**record, "remark": "A short one."}))
    results.main(["--page", str(page)])
    text = page.read_text()
    for line in (
        "### hippocampus",
        "A short one.",
        "`python benchmarks/starts.py`: dataset 4, batch size 2. some CPU, torch 2.13.0; commit 0123456789. "
        "Means over seeds (least to most).",
        "| the method | 2 | 0.750 (0.700 to 0.800) |  | 0.50, 0.20 | 0.50, 0.20 | 0.50, 0.20 |",
        "| gain 0.5 | 2 | 0.770 (0.750 to 0.790) | +2.0 (-1.0 to +5.0) | 0.50, 0.20 | 0.50, 0.20 | 0.50, 0.20 |",
        "| gain 0.7 | 1 | 0.500 (0.500 to 0.500) |  | 0.50, 0.20 | 0.50, 0.20 | 0.50, 0.20 |",
    ):
        assert line in text.splitlines()
