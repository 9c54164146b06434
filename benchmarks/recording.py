"""Records of what was measured on a CPU, or counted: what benchmarks print and write, and their tables in docs/results.md."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from contestants import COMMIT
from contestants import spread as spread_of_rounds

from nnunetv2_e2enet import engine, files
from nnunetv2_e2enet.evaluation.provenance import processor


def spread(values: Sequence[float], digits: int) -> str:
    """Median, least and most, with so many digits after the point; fewer of large values."""
    form = f".{max(0, digits - max(0, len(str(int(max(values)))) - 1))}f"
    return spread_of_rounds(values, form) if len(values) > 1 else f"{values[0]:{form}}"


def seconds_in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Of each call, round by round, so that a machine whose speed drifts drifts for all. Calls have been made once before."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


CLEARER = {
    "Memory of all processes": "Memory of all processes, shared pages counted once, looked at four times a second",
    "Memory of the largest process": "Largest resident set of one process, shared pages counted in full",
}
"""Titles of records on the page, where the recorded one does not say how memory is counted."""


@dataclass
class Table:
    """What was measured of each candidate, in seconds or GiB, round by round.

    ``bases`` are those that the others are divided by, in the same round. A candidate without a value is left out.
    """

    title: str
    values: dict[str, list[float]]
    bases: list[str]
    notes: list[str] = field(default_factory=list)
    unit: str = "seconds"

    def rows(self) -> list[list[str]]:
        """The heading, and a row a candidate: median, least and most of all rounds."""
        bases = [base for base in self.bases if self.values.get(base)]
        found = [["", self.unit, *(f"over {base}" for base in bases)]]
        for name, values in self.values.items():
            if values:
                ratios = [[a / b for a, b in zip(values, self.values[base], strict=False)] for base in bases]
                cells = (spread(r, 2) if r else "-" for r in ratios)
                found.append([name, spread(values, 3), *cells])
        return found

    def heading(self) -> str:
        several = any(len(values) > 1 for values in self.values.values())
        return f"{self.title}: median (least to most)" if several else self.title

    def lines(self) -> list[str]:
        """For a terminal."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [f"\n{self.heading()}"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return lines + [line for note in self.notes for line in textwrap.wrap(note, 100, subsequent_indent="  ")]

    def markdown(self) -> list[str]:
        heading, *rows = self.rows()
        lines = [f"{self.heading()}.", ""]
        lines += [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]
        return [*lines, "", *(f"- {note}" for note in self.notes), *([""] if self.notes else [])]


def machine() -> dict[str, Any]:
    try:
        openvino = version("openvino")
    except PackageNotFoundError:
        openvino = "not installed"
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "kernels": engine.status().kernels,
        "torch": torch.__version__,
        "openvino": openvino,
    }


def command() -> str:
    """This process's, without the file that it writes."""
    arguments = sys.argv[1:]
    if "--json" in arguments:
        at = arguments.index("--json")
        arguments = arguments[:at] + arguments[at + 2 :]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def write(file: Path, tables: Sequence[Table], counted: bool = False) -> None:
    """All that was measured so far, with command, commit and machine; what was counted is the same on any machine."""
    about: dict[str, Any] = {"command": command(), "commit": COMMIT}
    about["machine"] = {"cpu": "Counted: no device", "torch": torch.__version__} if counted else machine()
    files.write_atomically(file, json.dumps({**about, "tables": [asdict(table) for table in tables]}, indent=1) + "\n")


def section(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the page: for each record what it was measured with, its remark if it has one, and its tables."""
    lines = []
    for record in records:
        about = ", ".join(f"{key} {value}" for key, value in record["machine"].items() if key != "cpu")
        lines += [f"### `{record['command']}`", "", f"{record['machine']['cpu']}, {about}; commit {record['commit']}.", ""]
        lines += [record["remark"], ""] if "remark" in record else []
        for table in record["tables"]:
            lines += Table(**{**table, "title": CLEARER.get(table["title"], table["title"])}).markdown()
    return lines or ["No record yet.", ""]
