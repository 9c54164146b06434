"""Common parts of the commands that report numbers.

These are ``--json``, files that are checked first and written last, and a bar of steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import make_writable, write


def add_json_argument(parser: argparse._ActionsContainer) -> None:
    """``--json``: ``-`` in ``args.json`` stands for standard output."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write everything as JSON; without FILE, print it and nothing else",
    )


def plain_console(soft_wrap: bool = False, stderr: bool = False) -> Console:
    """A console that prints names and paths as they are, also where they look like rich's markup or emoji."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap, stderr=stderr)


def console_for(args: argparse.Namespace) -> Console:
    """Standard output for people; standard error where JSON is printed."""
    return plain_console(stderr=args.json == "-")


def check_folders(args: argparse.Namespace, *options: str) -> None:
    """Raises E2ENetError unless the files of ``--json`` and other options can be written into folders that are there."""
    given = [getattr(args, option) for option in options] + ([] if args.json in (None, "-") else [Path(args.json)])
    for file in given:
        if file is not None:
            check_folder_of(file)
    if args.json not in (None, "-") and Path(args.json).exists():
        _check_is_output(Path(args.json))


def check_folder_of(file: Path) -> None:
    """Raises E2ENetError unless a file can be written into a folder that is there."""
    if file.is_dir():
        raise E2ENetError(f"cannot write {file}: it is a folder; name a file")
    folder = file.resolve().parent
    if not folder.is_dir():
        raise E2ENetError(f"cannot write {file}: the folder {file.parent} is missing; make it, or choose another place")
    make_writable(folder)


def _check_is_output(file: Path) -> None:
    """Raises E2ENetError for a file that no command wrote: ``--json`` takes an argument that follows it for FILE."""
    try:
        written = "provenance" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        written = False
    if not written:
        raise E2ENetError(f"--json {file} is there, and no earlier output: name another file, or write --json at the end")


def write_json(args: argparse.Namespace, content: Mapping[str, Any]) -> list[Path]:
    """Print or write a result; returns the file that was written, if any."""
    from nnunetv2_e2enet.evaluation.plain import plain

    if args.json is None:
        return []
    text = json.dumps(plain(content), indent=1, allow_nan=False)
    if args.json == "-":
        print(text)
        return []
    write(Path(args.json), text + "\n")
    return [Path(args.json)]


@contextmanager
def step_bar(console: Console, steps: int) -> Iterator[Callable[[str], None]]:
    """A bar of ``steps``; what it gives is told what is done next."""
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps)
        yield lambda description: progress.update(task, description=description, advance=1)


def say_written(console: Console, files: list[Path]) -> None:
    """One line a file."""
    for file in files:
        console.print(f"Wrote {file}", soft_wrap=True)
