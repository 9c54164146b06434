"""``python -m integration --folder NEW_FOLDER``: the whole workflow, or a part of it."""

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

from rich.console import Console

from integration.cell import Workspace
from integration.plans import CONFIGURATIONS
from integration.schemes import HIPPOCAMPUS, SCHEMES, hippocampus, phantoms
from integration.table import print_results, write_results
from integration.workflow import Harness, Result, Selection, run_workflow
from nnunetv2_e2enet.registration import find_nnunet, is_registered


def main() -> int:
    parser = argparse.ArgumentParser(prog="integration", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for all that it writes")
    parser.add_argument("--schemes", nargs="+", choices=[s.name for s in SCHEMES], default=[s.name for s in SCHEMES])
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS)
    parser.add_argument("--data", choices=["hippocampus", "phantoms"], help="default: hippocampus where it is there")
    parser.add_argument("--workers", type=int, default=2, help="schemes at the same time, one thread each (default: 2)")
    parser.add_argument(
        "--harness",
        choices=get_args(Harness),
        default="mixed",
        help="run commands in processes of their own, all or those of one cell of each scheme and configuration, or in forks, "
        "which is fast and not quite as a user does (default: %(default)s)",
    )
    args = parser.parse_args()
    if not is_registered(find_nnunet()):
        parser.error("nnU-Net does not find E2ENet: run `e2enet register` first")
    folder = args.folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty: remove it, or name a new one")

    start = time.monotonic()
    console = Console()

    def report(result: Result) -> None:
        minutes, seconds = divmod(round(time.monotonic() - start), 60)
        where = f"{result.scheme:<17}{result.configuration:<19}{result.step:<29}"
        console.out(f"{minutes:3d}:{seconds:02d}  {where}{result.outcome} {result.message}", highlight=False)

    work = Workspace(folder)
    use_phantoms = args.data == "phantoms" or (args.data is None and not HIPPOCAMPUS.is_dir())
    source = phantoms(folder / "phantoms") if use_phantoms else hippocampus()
    selection = Selection(
        [scheme for scheme in SCHEMES if scheme.name in args.schemes],
        [name for name in CONFIGURATIONS if name in args.configurations],
    )
    results = run_workflow(work, source, selection, args.workers, report, args.harness)
    seconds = time.monotonic() - start
    write_results(folder / "results.json", results, source.name, seconds, args.harness)
    print_results(console, results, folder)
    console.print(f"{source.name}, {seconds / 60:.1f} minutes")
    return int(any(result.outcome != "passed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
