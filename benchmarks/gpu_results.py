"""The tables of docs/results.md that are made of the records of benchmarks/gpu_session.py, for ``benchmarks/results.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import contestants
from contestants import spread

Record = Mapping[str, Any]
"""Of one measurement: "what", "commit", "machine", "result"."""


def of_tests(record: Record) -> Iterator[tuple[str, str]]:
    result = record["result"]
    lines = result["end"].strip().splitlines()
    yield (
        record["what"][2:],
        f"{'passed' if result['passed'] else 'FAILED'}: {lines[-1].strip('= ') if lines else 'no output'}",
    )


def of_step(record: Record) -> Iterator[tuple[str, str]]:
    result = record["result"]
    peak = f", peak {result['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in result else ""
    yield record["what"][2:], f"{spread(result['milliseconds'])} ms{peak}"


def of_prediction(record: Record) -> Iterator[tuple[str, str]]:
    for name, result in record["result"]["results"].items():
        milliseconds = [1e3 * s for s in result["seconds"]]
        yield f"{record['what'][2:]}: {name}", f"{spread(milliseconds)} ms, {result['over_nnunet']:.2f} of nnU-Net's"


def of_convolutions(record: Record) -> Iterator[tuple[str, str]]:
    for way, milliseconds in record["result"].items():
        yield f"{record['what'][2:]}: {way}", f"{spread(milliseconds, '.2f')} ms"


def of_profile(record: Record) -> Iterator[tuple[str, str]]:
    largest = ", ".join(f"{row['operation']} {row['share']:.0%}" for row in record["result"][:5])
    yield record["what"][2:], largest


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
    """The lines of the page: a table a stage; medians, least and most.

    Raises:
        SystemExit: a record is of a dry run on a CPU, which says nothing about a GPU.
    """
    if not records:
        return ["No stage of `benchmarks/gpu_session.py` has been run on a GPU yet.", ""]
    dry = next((record["what"] for record in records if record["machine"].get("warning") == contestants.WITHOUT_GPU), None)
    if dry is not None:
        raise SystemExit(f"the record {dry!r} is of a dry run without a GPU: take it away from docs/results/gpu")
    lines = []
    for number, (heading, rows) in STAGES.items():
        of_stage = [record for record in records if record["what"].startswith(f"{number} ")]
        if of_stage:
            machines = sorted({f"{r['machine']['device']}, torch {r['machine']['torch']}, {r['commit']}" for r in of_stage})
            lines += [f"### {heading}", "", "; ".join(machines) + ".", "", "| | |", "| --- | --- |"]
            lines += [f"| {what} | {found} |" for record in of_stage for what, found in rows(record)]
            lines.append("")
    return lines
