"""Results as a table in the terminal and as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from integration.workflow import STEP_NAMES, Result

REPOSITORY = Path(__file__).resolve().parents[2]
STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("nnunetv2-e2enet", "nnunetv2", "torch")}
    return {**packages, "python": platform.python_version()}


def commit() -> str:
    """The commit of this repository, with a note if files differ from it; where git cannot tell, that."""

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    name = git("rev-parse", "--short=10", "HEAD")
    if name is None:
        return "unknown (no git repository)"
    return f"{name} with changes" if git("status", "--porcelain", "--untracked-files=no") else name


def write_results(path: Path, results: Sequence[Result], source: str, seconds: float, harness: str) -> None:
    content = {
        "versions": versions(),
        "commit": commit(),
        "harness": harness,
        "data": source,
        "seconds": round(seconds),
        "results": [{**asdict(result), "seconds": round(result.seconds, 1), "log": str(result.log)} for result in results],
    }
    path.write_text(json.dumps(content, indent=1))


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def print_results(console: Console, results: Sequence[Result], folder: Path) -> None:
    """Steps and configurations for each scheme; below, why a step failed, and the log to look into."""
    by_cell = {(result.scheme, result.configuration, result.step): result for result in results}
    configurations = list(dict.fromkeys(result.configuration for result in results))
    for scheme in dict.fromkeys(result.scheme for result in results):
        table = Table(title=f"labels: {scheme}", title_justify="left")
        table.add_column("step")
        for configuration in configurations:
            table.add_column(configuration)
        for step in STEP_NAMES:
            cells = [by_cell.get((scheme, configuration, step)) for configuration in configurations]
            if any(cells):
                table.add_row(step, *(_text(cell) for cell in cells))
        console.print(table)
    for result in results:
        if result.outcome == "failed":
            where = f"{result.scheme}, {result.configuration}, {result.step}"
            console.out(f"failed {where}: {result.message}; log: {result.log}", style=STYLES["failed"], highlight=False)
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in STYLES}
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    console.out(f"logs: {folder}/logs/SCHEME/CONFIGURATION/STEP.log", highlight=False)


def _text(result: Result | None) -> str:
    if result is None:
        return ""
    return f"[{STYLES[result.outcome]}]{result.outcome}[/] {result.seconds:.0f} s"
