"""Runs the steps of all cells: schemes side by side, a scheme's configurations one after the other."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from integration.cell import FIVE_FOLDS, PLANNING, PLANS, Cell, Workspace
from integration.commands import ForkingRunner, Runner, StepError
from integration.plans import CONFIGURATIONS, add_configurations
from integration.schemes import Scheme, Source, write_dataset
from integration.steps import STEPS, Step

Outcome = Literal["passed", "failed", "skipped"]
Harness = Literal["processes", "mixed", "forks"]
PREPARE = "plan and preprocess"
STEP_NAMES = (PREPARE, *(step.name for step in STEPS))
CELLS_WITH_FIVE_FOLDS = (  # one for each scheme and each configuration
    *(("plain", "3d_fullres"), ("regions", "3d_lowres")),
    *(("ignore", "3d_cascade_fullres"), ("regions + ignore", "2d")),
)
TWO_FOLDS = (0, 1)


@dataclass(frozen=True)
class Result:
    """What became of one step.

    Attributes:
        seconds: that it took.
        log: the output of its commands.
        message: why it failed or was skipped.
    """

    scheme: str
    configuration: str
    step: str
    outcome: Outcome
    seconds: float
    log: Path
    message: str = ""


@dataclass(frozen=True)
class Selection:
    """The part of the workflow that is wanted; steps may be left out."""

    schemes: Sequence[Scheme]
    configurations: Sequence[str] = CONFIGURATIONS
    without: Sequence[str] = ()

    def folds(self, scheme: Scheme, configuration: str) -> tuple[int, ...]:
        return FIVE_FOLDS if (scheme.name, configuration) in CELLS_WITH_FIVE_FOLDS else TWO_FOLDS


def run_workflow(
    work: Workspace,
    source: Source,
    selection: Selection,
    n_workers: int,
    report: Callable[[Result], None],
    harness: Harness = "mixed",
) -> list[Result]:
    """All steps of all cells; a step that fails stops those that need it and no other.

    Args:
        n_workers: schemes that are worked on at the same time, each with one thread.
        report: called with each result as it comes, also from other threads.
        harness: how commands are run. "processes": each in a process of its own; "forks": in forks of one that has imported
            nnU-Net, see ``forking.py``; "mixed": processes for planning and in the cells with five folds, forks in the others.
    """

    def run(scheme: Scheme) -> list[Result]:
        with ExitStack() as stack:
            processes = Runner()
            forks = processes if harness == "processes" else stack.enter_context(ForkingRunner())

            def runner_for(configuration: str | None) -> Runner:
                whole = configuration is None or (scheme.name, configuration) in CELLS_WITH_FIVE_FOLDS
                return processes if harness == "mixed" and whole else forks

            return SchemeRun(work, source, scheme, selection, runner_for, report).results()

    with ThreadPoolExecutor(n_workers) as pool:
        return [result for results in pool.map(run, selection.schemes) for result in results]


class SchemeRun:
    """The workflow for one label scheme."""

    def __init__(
        self,
        work: Workspace,
        source: Source,
        scheme: Scheme,
        selection: Selection,
        runner_for: Callable[[str | None], Runner],
        report: Callable[[Result], None],
    ) -> None:
        """``runner_for`` gives what runs the commands of a configuration, or of the preparation of all (None)."""
        self.work, self.source, self.scheme, self.selection = work, source, scheme, selection
        self.runner_for, self.report = runner_for, report
        self.outcomes: dict[tuple[str, str], Result] = {}

    def results(self) -> list[Result]:
        self._prepare()
        for configuration in self.selection.configurations:
            for step in STEPS:
                if step.name not in self.selection.without:
                    self._step(configuration, step)
        return list(self.outcomes.values())

    def _prepare(self) -> None:
        """Once for all configurations: nnU-Net preprocesses them with one command."""

        def prepare() -> None:
            number, folders, runner = str(self.scheme.number), self.work.environment(), self.runner_for(None)
            write_dataset(self.work.raw, self.scheme, self.source)
            check = ("--verify_dataset_integrity", "-npfp", "1", "--no_pp")
            runner.run(log, "nnUNetv2_plan_and_preprocess", "-d", number, *check, environment={**folders, **PLANNING})
            add_configurations(self.work.preprocessed / self.scheme.dataset / f"{PLANS}.json")
            configurations = ("2d", "3d_lowres", "3d_fullres")
            runner.run(log, "nnUNetv2_preprocess", "-d", number, "-np", "1", "-c", *configurations, environment=folders)

        log = self.work.log(self.scheme, "all", PREPARE)
        first, *others = self.selection.configurations
        self._record(self._attempt(first, PREPARE, log, prepare))
        for configuration in others:
            done = self.outcomes[first, PREPARE]
            self._record(Result(done.scheme, configuration, PREPARE, done.outcome, 0.0, log, done.message))

    def _step(self, configuration: str, step: Step) -> None:
        log = self.work.log(self.scheme, configuration, step.name)
        passed = {key for key, result in self.outcomes.items() if result.outcome == "passed"}
        missing = [need for need in self._needs(configuration, step) if need not in passed]
        if missing:
            message = f"needs {' of '.join(reversed(missing[0]))}"
            self._record(Result(self.scheme.name, configuration, step.name, "skipped", 0.0, log, message))
            return
        folds = self.selection.folds(self.scheme, configuration)
        cell = Cell(self.work, self.scheme, configuration, folds, self.runner_for(configuration), log)
        self._record(self._attempt(configuration, step.name, log, lambda: step.run(cell)))

    def _needs(self, configuration: str, step: Step) -> list[tuple[str, str]]:
        needs = [(configuration, name) for name in (PREPARE, *step.needs)]
        if configuration == "3d_cascade_fullres":
            needs += [("3d_lowres", name) for name in step.cascade_needs]
        return needs

    def _attempt(self, configuration: str, name: str, log: Path, action: Callable[[], None]) -> Result:
        start = time.monotonic()
        message = ""
        try:
            action()
        except StepError as error:
            message = str(error)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with what nnU-Net wrote, other steps shall go on)
            message = f"{type(error).__name__}: {error}"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                traceback.print_exc(file=file)
        outcome: Outcome = "failed" if message else "passed"
        return Result(self.scheme.name, configuration, name, outcome, time.monotonic() - start, log, message)

    def _record(self, result: Result) -> None:
        self.outcomes[result.configuration, result.step] = result
        self.report(result)
