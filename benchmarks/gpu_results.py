"""The tables of docs/results.md that are made of the records of benchmarks/gpu_session.py, for ``benchmarks/results.py``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isclose
from typing import Any

import contestants
from contestants import spread, without

Record = Mapping[str, Any]
"""Of one measurement: "what", "commit", "machine", "result"; of one that failed: "what", "device", "error", "end".

"partial" of one that failed is what it had found: a result from which some is missing.
"""
SAME = {"first_loss": "loss of the first step", "gradient_norm": "norm of its gradient", "loss_scale": "last loss scale"}
"""By key of a step's result, what is the same, however a network is run."""
AGREEMENT = 0.05
"""Relative difference that rounding to float16 in another order can make, and no more."""
CLOCKS = {"device": "on the device", "wall": "from the call to its end"}


def of_tests(record: Record) -> Iterator[tuple[str, str]]:
    result = record["result"]
    if "passed" in result:
        yield record["what"][2:], f"passed: {last_line(result['end'])}"
    else:
        yield record["what"][2:], ", ".join(f"{what} {seconds:.0f} s" for what, seconds in result.items())


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip("= ").replace("|", "\\|") if lines else "no output"


def of_step(record: Record) -> Iterator[tuple[str, str]]:
    result = record["result"]
    peak = f", peak {result['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in result else ""
    if result.get("milliseconds"):
        yield record["what"][2:], f"{spread(result['milliseconds'])} ms{peak}{without(result)}"


def disagreements(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Steps of the same network whose numbers differ by more than AGREEMENT from an eager one's, or else the first one's."""
    by_function: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: "eager" not in record["what"]):
        if "function" in record["result"]:
            by_function.setdefault(record["result"]["function"], []).append(record)
    for base, *others in by_function.values():
        for record, (key, what) in itertools.product(others, SAME.items()):
            found, expected = (r["result"].get(key) for r in (record, base))
            if None not in (found, expected) and not isclose(found, expected, rel_tol=AGREEMENT):
                yield record["what"][2:], f"{what} {found:.4g}, of {base['what'][2:]} {expected:.4g}"


def of_prediction(record: Record) -> Iterator[tuple[str, str]]:
    for name, result in record["result"].items():
        milliseconds = [1e3 * s for s in result.get("seconds", ())]
        ratio = f", {result['over_nnunet']:.2f} of nnU-Net's" if "over_nnunet" in result else ""
        if milliseconds:
            yield f"{record['what'][2:]}: {name}", f"{spread(milliseconds)} ms{ratio}{without(result)}"


def of_convolutions(record: Record) -> Iterator[tuple[str, str]]:
    for way, times in record["result"].items():
        found = [f"{spread(times[clock], '.2f')} ms {words}" for clock, words in CLOCKS.items() if times.get(clock)]
        if found:
            yield f"{record['what'][2:]}: {way}", ", ".join(found)


def of_profile(record: Record) -> Iterator[tuple[str, str]]:
    result = record["result"]
    largest = ", ".join(f"{row['operation']} {row['share']:.0%}" for row in result["profile"][:5])
    yield record["what"][2:], f"{largest}{without(result)}"


def of_training(record: Record) -> Iterator[tuple[str, str]]:
    for run, result in record["result"].items():
        yield (
            run.replace(" | ", ", "),
            f"Dice {result['dice']:.4f} after {result['epochs']} epochs of {result['median_epoch_seconds']:.1f} s",
        )


STAGES: dict[int, tuple[str, Callable[[Record], Iterator[tuple[str, str]]]]] = {
    1: ("Tests of the kernels", of_tests),
    2: ("Training steps, AMOS plan, batch 2", of_step),
    3: ("Prediction, AMOS plan", of_prediction),
    4: ("Convolutions alone, forward and backward", of_convolutions),
    5: ("Where the time of a training step goes", of_profile),
    6: ("Trainings on Hippocampus, several at once", of_training),
}
"""Heading, and rows of a record."""


def section(records: Sequence[Record]) -> list[str]:
    """The lines of the page: a table a stage; medians, least and most; last what failed and has not been measured since.

    Raises:
        SystemExit: a record is of a dry run on a CPU, which says nothing about a GPU.
    """
    if not records:
        return ["No stage of `benchmarks/gpu_session.py` has been run on a GPU yet.", ""]
    dry = next((record["what"] for record in records if is_dry(record)), None)
    if dry is not None:
        raise SystemExit(f"the record {dry!r} is of a dry run without a GPU: take it away from docs/results/gpu")
    measured = [record for record in records if "result" in record]
    failed = [record for record in records if record["what"] not in {m["what"] for m in measured}]
    lines = []
    for number, (heading, rows) in STAGES.items():
        of_stage, failed_there = ([r for r in some if r["what"].startswith(f"{number} ")] for some in (measured, failed))
        if not (of_stage or failed_there):
            continue
        machines = sorted({f"{r['machine']['device']}, torch {r['machine']['torch']}, {r['commit']}" for r in of_stage})
        lines += [f"### {heading}", "", *(["; ".join(machines) + ".", ""] if machines else []), "| | |", "| --- | --- |"]
        lines += [f"| {what} | {found} |" for record in of_stage for what, found in rows(record)]
        lines += [f"| {what} | {found} |" for what, found in disagreements(of_stage)]
        for record in failed_there:
            if "partial" in record:
                lines += [f"| {what} | {found} |" for what, found in rows({**record, "result": record["partial"]})]
            lines.append(f"| {record['what'][2:]} | failed, {record['error']}: {last_line(record['end'])} |")
        lines.append("")
    return lines


def is_dry(record: Record) -> bool:
    return record.get("device") == "cpu" or record.get("machine", {}).get("warning") == contestants.WITHOUT_GPU
