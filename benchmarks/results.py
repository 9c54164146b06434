"""Tables and figures of docs/results.md from the records in docs/results: ``make results``.

    python benchmarks/results.py [RECORD ...] [--page PAGE]

Records are what benchmarks/hippocampus.py writes, by default all of docs/results/*.json. The page gets, between two markers,
one section a record; a figure a record goes beside the record. Between other markers it gets the tables of docs/results/gpu
(benchmarks/gpu_session.py; also what failed), docs/results/starts (benchmarks/starts.py), docs/results/cpu and
docs/results/counts (benchmarks/recording.py). Everything is computed from the records alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import contestants
import gpu_results
import numpy as np
import recording
import starts
from numpy.typing import NDArray

from nnunetv2_e2enet import files
from nnunetv2_e2enet.evaluation.report import drawing
from nnunetv2_e2enet.evaluation.report.charts import model_style
from nnunetv2_e2enet.evaluation.statistics import Interval, mean_interval

DOCS = Path(__file__).resolve().parents[1] / "docs"
PARTS = ("trainings", "gpu", "starts", "cpu", "counts")
"""Of the page: what is between the two markers of each comes from the records."""
PHANTOMS = "phantoms of fifteen structures, 8 cases to train on in fold 0 and 32 in fold 1, the same 16 to validate on"
FOLDS = "Solid lines and filled marks are of the first fold, dashed lines and hollow marks of the other."
POINTS = 100  # of Dice
FOUND = 0.1  # mean Dice from which on a structure counts as found
SHOWN = 0.1  # of pseudo Dice, below the end of the worst training: earlier epochs are steep and all alike

Record = Mapping[str, Any]


def runs_of(record: Record) -> dict[tuple[int, str], Record]:
    """By fold and contestant; folds in order, the baseline first."""
    runs = {}
    for key, run in record["results"].items():
        contestant, _, fold = key.rpartition(" | fold ")
        runs[int(fold), contestant] = run
    return dict(sorted(runs.items(), key=lambda item: (item[0][0], item[0][1] != contestants.BASELINE, item[0][1])))


def above_baseline(
    runs: Mapping[tuple[int, str], Record], key: tuple[int, str], labels: NDArray[np.intp] | slice = slice(None)
) -> Interval | None:
    """Points of Dice that a run is above the baseline of its fold, over the same cases; None for the baseline and without one.

    Args:
        runs: those of a record.
        key: fold and contestant of the run.
        labels: places of those whose mean is a case's Dice.

    Raises:
        SystemExit: the cases are not the same.
    """
    baseline = (key[0], contestants.BASELINE)
    if key == baseline or baseline not in runs:
        return None
    ours, theirs = (runs[run]["case_dice"] for run in (key, baseline))
    if ours.keys() != theirs.keys():
        raise SystemExit("a fold was validated on other cases by its baseline: these records do not belong together")
    dice = np.array([[np.nanmean(np.array(of[case])[labels]) for case in sorted(ours)] for of in (ours, theirs)])
    return mean_interval(POINTS * (dice[0] - dice[1]))


def in_points(interval: Interval) -> str:
    if np.isnan(interval.low):  # one case
        return f"{interval.mean:+.2f}"
    return f"{interval.mean:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"


def calls(run: Record) -> list[Record]:
    """Machine and commit of each call that trained a fold; older records hold those of one call."""
    of_run: list[Record] = run.get("calls", [run])
    return of_run


def table(record: Record) -> list[str]:
    """A row a run, and one for the mean of each contestant over the folds that it shares with the baseline."""
    runs = runs_of(record)
    lines = [
        "| fold | | Dice | points above nnU-Net, 95 % | active parameters | multiply-accumulates | s an epoch | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    means: dict[str, list[tuple[float, float]]] = {}
    for (fold, contestant), run in runs.items():
        above = above_baseline(runs, (fold, contestant))
        compared = "" if above is None else in_points(above)
        if above is not None:
            means.setdefault(contestant, []).append((run["dice"], above.mean))
        costs = run["costs"]
        commits = ", ".join(dict.fromkeys(call["commit"] for call in calls(run)))
        lines.append(
            f"| {fold} | {contestant} | {run['dice']:.4f} | {compared} | {costs['parameters_active'] / 1e6:.2f} M | "
            f"{costs['macs_active'] / 1e9:.2f} G | {run['median_epoch_seconds']:.0f} | {commits} |"
        )
    for contestant, folds in means.items():
        if len(folds) > 1 and "phantoms" not in record["settings"]:  # whose folds differ in more than chance
            dice, above = np.mean(folds, axis=0)
            lines.append(f"| mean of {len(folds)} | {contestant} | {dice:.4f} | {above:+.2f} | | | | |")
    return lines


def by_structure(record: Record) -> list[str]:
    """A row a structure: its mean Dice over the cases of a fold, for each run whose record names the structures.

    Where some run finds none of a structure, two more rows are over the structures that all runs find.
    """
    runs = {key: run for key, run in runs_of(record).items() if "structures" in run}
    if not runs:
        return []
    columns = ["structure", *(f"{contestant}, fold {fold}" for fold, contestant in runs)]
    names = next(iter(runs.values()))["structures"]
    dice = np.array([np.nanmean(list(run["case_dice"].values()), axis=0) for run in runs.values()])
    rows = [[name, *(f"{value:.3f}" for value in of_runs)] for name, of_runs in zip(names, dice.T, strict=True)]
    found = np.flatnonzero((dice >= FOUND).all(axis=0))
    if 0 < len(found) < len(names):
        rows.append([f"the {len(found)} that all find", *(f"{value:.3f}" for value in dice[:, found].mean(axis=1))])
        above = [above_baseline(runs, key, found) for key in runs]
        rows.append(["points above nnU-Net, 95 %", *("" if points is None else in_points(points) for points in above)])
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)] + [""]


def figure(record: Record) -> drawing.Figure:
    """Pseudo Dice over iterations and over seconds of training, one line a run; and Dice over what a network costs."""
    runs, settings = runs_of(record), record["settings"]
    names = list(dict.fromkeys(contestant for _, contestant in runs))
    first = min(fold for fold, _ in runs)
    with drawing.style():
        drawn, axes = drawing.new_figure(11, rows=5)
        by_iteration, by_second, by_size, by_work, by_time = (row[0] for row in axes)
        for (fold, contestant), run in runs.items():
            colour, marker = model_style(names.index(contestant))
            line, fill = ("-", "full") if fold == first else ("--", "none")
            label = contestant if fold == min(f for f, c in runs if c == contestant) else None
            iterations, seconds = (
                settings["iterations"] * np.arange(1, len(run["pseudo_dice"]) + 1),
                np.cumsum(run["epoch_seconds"]),
            )
            by_iteration.plot(iterations, run["pseudo_dice"], linestyle=line, color=colour, label=label)
            by_second.plot(seconds, run["pseudo_dice"], linestyle=line, color=colour)
            costs = run["costs"]["parameters_active"] / 1e6, run["costs"]["macs_active"] / 1e9, seconds[-1] / 60
            for axis, cost in zip((by_size, by_work, by_time), costs, strict=True):
                axis.plot(cost, run["dice"], marker, color=colour, fillstyle=fill)
        least = min(run["pseudo_dice"][-1] for run in runs.values()) - SHOWN
        for axis, label in ((by_iteration, "iterations"), (by_second, "seconds of training and its validation batches")):
            axis.set(xlabel=label, ylabel="pseudo Dice", ylim=(max(0, least), None))
        labels = ("million active parameters", "G multiply-accumulates of a patch", "minutes of training")
        for axis, label in zip((by_size, by_work, by_time), labels, strict=True):
            axis.set(xlabel=label, ylabel="Dice of the fold", xlim=(0, 1.05 * axis.dataLim.xmax))
        drawing.legend_above(drawn)
    return drawn


def section(record: Record, name: str) -> list[str]:
    settings, runs = record["settings"], runs_of(record)
    given = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value is not None)
    machines = [call["machine"] for run in runs.values() for call in calls(run)]
    machines = sorted({f"{machine['device']}, torch {machine['torch']}" for machine in machines})
    cases = ", ".join(f"{run['cases']} in fold {fold}" for (fold, c), run in runs.items() if c == contestants.BASELINE)
    return [
        f"### {name}: {PHANTOMS if 'phantoms' in settings else 'MSD Task04 Hippocampus'}",
        "",
        *([record["remark"], ""] if "remark" in record else []),
        f"`python benchmarks/hippocampus.py`: {given}. {'; '.join(machines)}.",
        f"Validation cases: {cases or 'no baseline yet'}. The interval is a bootstrap over the cases of a fold.",
        "",
        *table(record),
        "",
        *by_structure(record),
        f"![Pseudo Dice over iterations and seconds, Dice over what a network costs](results/{name}.svg)",
        "",
        *([FOLDS, ""] if len({fold for fold, _ in runs}) > 1 else []),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, help="default: docs/results/*.json")
    parser.add_argument("--page", type=Path, default=DOCS / "results.md")
    given = parser.parse_args(arguments)
    records = given.records or sorted((given.page.parent / "results").glob("*.json"))
    text = given.page.read_text(encoding="utf-8")
    missing = [marker for part in PARTS for marker in markers(part) if marker not in text]
    if missing:
        raise SystemExit(f"{given.page} lacks the markers {', '.join(missing)}, between which the tables go")
    folder = given.page.parent / "results"
    folder.mkdir(exist_ok=True)
    trainings = []
    for file in records:
        record = json.loads(file.read_text())
        trainings += section(record, file.stem)
        files.write_atomically(folder / f"{file.stem}.svg", drawing.svg(figure(record)))
    lines = {
        "trainings": trainings or ["No training on real scans has been recorded yet.", ""],
        "gpu": gpu_results.section(of_sessions(read(folder / "gpu"))),
        "starts": starts.section(read(folder / "starts")),
        "cpu": recording.section(list(read(folder / "cpu").values())),
        "counts": recording.section(list(read(folder / "counts").values())),
    }
    for part in PARTS:
        text = with_lines(text, part, lines[part])
    files.write_atomically(given.page, text)


def read(folder: Path) -> dict[str, Record]:
    """All records of a folder, by the names of their files."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def of_sessions(contents: Mapping[str, Record]) -> list[Record]:
    """Each file of a GPU holds a record, or all of those of a session."""
    return [record for content in contents.values() for record in content.get("records", [content])]


def markers(part: str) -> tuple[str, str]:
    return f"<!-- make results, {part}: begin -->", f"<!-- make results, {part}: end -->"


def with_lines(text: str, part: str, lines: Sequence[str]) -> str:
    """The page with these lines between the markers of a part."""
    begin, end = markers(part)
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return "\n".join([f"{before}{begin}", "", *lines, ""]).rstrip("\n") + f"\n\n{end}{after}"


if __name__ == "__main__":
    main()
