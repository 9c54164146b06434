"""The part of `make test-integration` that is fast: its most demanding labels, in one configuration, on phantoms."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from integration import __main__ as command
from integration import checks, workflow
from integration.cell import Cell, Workspace
from integration.commands import ForkingRunner, Runner, StepError
from integration.schemes import SCHEMES, phantoms
from integration.steps import Step
from integration.workflow import CELLS_WITH_FIVE_FOLDS, STEP_NAMES, Harness, Result, SchemeRun, Selection, run_workflow

# What depends on neither labels nor configuration is left to the whole of it.
LEFT_OUT = (
    "train fold all",
    "predict, fold all",
    "predict, best checkpoint",
    "predict, no mirroring",
    "predict, in parts",
    "determine_postprocessing",
)
SCHEME = next(scheme for scheme in SCHEMES if scheme.regions and scheme.ignore)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("workflow")
    source, selection = phantoms(folder / "phantoms", n_training=5), Selection([SCHEME], ["3d_fullres"], LEFT_OUT)
    work = Workspace(folder)
    found = SchemeRun(work, source, SCHEME, selection, lambda _configuration: runner, lambda _result: None).results()
    return {result.step: result for result in found}


@pytest.mark.parametrize("step", [name for name in STEP_NAMES if name not in LEFT_OUT])
def test_regions_with_ignore_label(results: dict[str, Result], step: str) -> None:
    result = results[step]
    log = result.log.read_text()[-4000:] if result.log.exists() else ""
    assert result.outcome == "passed", f"{result.message}\n{log}"


def test_the_same_probabilities_are_not_taken_for_others(tmp_path: Path) -> None:
    """A case in which a network sees the same everywhere may be the same, but not all of them."""
    varied, blind = np.arange(4.0).reshape(1, 4), np.ones((1, 4))
    folders = {
        "first": {"a": varied, "b": blind},
        "other": {"a": varied + 1, "b": blind},
        "blind": {"a": blind, "b": blind},
    }
    for folder, cases in folders.items():
        (tmp_path / folder).mkdir()
        for name, values in cases.items():
            np.savez(tmp_path / folder / f"{name}.npz", probabilities=values)
    checks.expect_different(tmp_path / "first", tmp_path / "other")
    checks.expect_different(tmp_path / "first", tmp_path / "blind")
    for folder, message in (("first", "have the same probabilities for a.npz$"), ("blind", "cannot be told apart")):
        with pytest.raises(StepError, match=message):
            checks.expect_different(tmp_path / folder, tmp_path / folder)


class Pretended:
    """Stands for what runs console commands, and writes into a log how it would do it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> "Pretended":
        return self

    def __exit__(self, *_error: object) -> None:
        """Ends nothing."""

    def run(self, log: Path, *words: str, environment: dict[str, str], killed_by: Path | None = None) -> None:  # noqa: ARG002
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(" ".join([self.kind, *words]))


def fail(cell: Cell) -> None:
    if cell.configuration == "3d_lowres":
        raise StepError("no such luck")


def crash(_cell: Cell) -> None:
    json.loads("nothing")


STEPS = (
    Step("first", lambda _cell: None),
    Step("failing", fail),
    Step("after failing", lambda _cell: None, ("failing",), ("failing",)),
    Step("crashing", crash),
    Step("last", lambda _cell: None, ("first",)),
)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "Runner", partial(Pretended, "processes"))
    monkeypatch.setattr(workflow, "ForkingRunner", partial(Pretended, "forks"))
    monkeypatch.setattr(workflow, "add_configurations", lambda _path: None)
    monkeypatch.setattr(workflow, "STEPS", STEPS)
    names = (workflow.PREPARE, *(step.name for step in STEPS))
    monkeypatch.setattr(workflow, "STEP_NAMES", names)
    monkeypatch.setattr("integration.table.STEP_NAMES", names)


@pytest.mark.usefixtures("pretended", "registered")
def test_a_failed_step_is_shown_and_stops_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["integration", "--folder", str(tmp_path), "--data", "phantoms", "--schemes", "plain"])
    monkeypatch.setenv("COLUMNS", "200")
    assert command.main() == 1
    output = capsys.readouterr().out
    content: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    outcomes = {(r["configuration"], r["step"]): r["outcome"] for r in content["results"]}
    for configuration in ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"):
        assert outcomes[configuration, "last"] == "passed"
        assert outcomes[configuration, "crashing"] == "failed"
    assert outcomes["3d_lowres", "failing"] == "failed"
    assert outcomes["3d_lowres", "after failing"] == outcomes["3d_cascade_fullres", "after failing"] == "skipped"
    assert outcomes["2d", "after failing"] == "passed"
    assert "failed plain, 3d_lowres, failing: no such luck; log: " in output
    assert "JSONDecodeError" in (tmp_path / "logs" / "plain" / "2d" / "crashing.log").read_text()
    assert "17 passed, 5 failed, 2 skipped" in output


PHANTOM = ("e2enet", "phantom", "1", "--cases", "1", "--test-cases", "0", "--size", "18", "52", "52")


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("harness", get_args(Harness))
def test_mixed_runs_one_cell_of_each_kind_in_processes(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[tuple[str, str], str] = {}

    def note(cell: Cell) -> None:
        cell.run("command")
        ran[cell.scheme.name, cell.configuration] = cell.log.read_text().split()[0]

    monkeypatch.setattr(workflow, "STEPS", (Step("first", note),))
    monkeypatch.setattr(workflow, "write_dataset", lambda *_: None)
    source = phantoms(tmp_path / "phantoms", n_training=1)
    run_workflow(Workspace(tmp_path), source, Selection(SCHEMES), 2, lambda _result: None, harness)
    processes = {cell for cell, kind in ran.items() if kind == "processes"}
    expected = {"processes": set(ran), "mixed": set(CELLS_WITH_FIVE_FOLDS), "forks": set()}
    assert len(ran) == 16
    assert processes == expected[harness]
    planned = (Workspace(tmp_path).log(SCHEME, "all", workflow.PREPARE)).read_text()
    assert planned.startswith("forks" if harness == "forks" else "processes")


@pytest.mark.parametrize("in_forks", [True, False])
def test_commands_have_their_environment_and_log_and_fail_visibly(in_forks: bool, runner: Runner, tmp_path: Path) -> None:
    log, raw = tmp_path / "folder" / "command.log", tmp_path / "raw"
    assert isinstance(runner, ForkingRunner)
    runner = runner if in_forks else Runner()
    runner.run(log, *PHANTOM, environment={"nnUNet_raw": str(raw)})
    assert (raw / "Dataset001_Phantom" / "dataset.json").is_file()
    with pytest.raises(StepError, match="e2enet ended with exit code 1, but 0 was expected"):
        runner.run(log, *PHANTOM, environment={"nnUNet_raw": str(raw)})
    assert log.read_text().count("$ e2enet phantom 1") == 2
    assert "is not empty" in log.read_text()


def test_a_process_is_killed_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the harness that runs each command in a process of its own; one that ends before that is no killed one."""
    script = tmp_path / "command"
    script.write_text(
        f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\ntouch {tmp_path}/$1\n[ $1 = early ] && wait\nexit 0\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    log = tmp_path / "log.txt"
    Runner().run(log, "command", "early", environment={}, killed_by=tmp_path / "early")
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 30
    while (
        Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text() and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()
    with pytest.raises(StepError, match="exit code 0, but -9 was expected"):
        Runner().run(log, "command", "other", environment={}, killed_by=tmp_path / "never")
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
