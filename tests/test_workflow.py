"""The part of `make test-integration` that is fast: its most demanding labels, in one configuration, on phantoms."""

import json
from pathlib import Path
from typing import Any

import pytest
from integration import __main__ as command
from integration import workflow
from integration.cell import Cell, Workspace
from integration.commands import Runner, StepError
from integration.schemes import SCHEMES, phantoms
from integration.steps import Step
from integration.workflow import STEP_NAMES, Result, SchemeRun, Selection

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
    found = SchemeRun(Workspace(folder), source, SCHEME, selection, runner, lambda _result: None).results()
    return {result.step: result for result in found}


@pytest.mark.parametrize("step", [name for name in STEP_NAMES if name not in LEFT_OUT])
def test_regions_with_ignore_label(results: dict[str, Result], step: str) -> None:
    result = results[step]
    log = result.log.read_text()[-4000:] if result.log.exists() else ""
    assert result.outcome == "passed", f"{result.message}\n{log}"


class Pretended:
    """Stands for the process that runs console commands."""

    def __enter__(self) -> "Pretended":
        return self

    def __exit__(self, *_error: object) -> None:
        """Ends nothing."""

    def run(self, log: Path, *words: str, environment: dict[str, str]) -> None:  # noqa: ARG002
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(" ".join(words))


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
    monkeypatch.setattr(workflow, "Runner", Pretended)
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


def test_commands_have_their_environment_and_log_and_fail_visibly(runner: Runner, tmp_path: Path) -> None:
    log, raw = tmp_path / "folder" / "command.log", tmp_path / "raw"
    phantom = ("e2enet", "phantom", "1", "--cases", "1", "--test-cases", "0", "--size", "18", "52", "52")
    runner.run(log, *phantom, environment={"nnUNet_raw": str(raw)})
    assert (raw / "Dataset001_Phantom" / "dataset.json").is_file()
    with pytest.raises(StepError, match="e2enet ended with exit code 1, but 0 was expected"):
        runner.run(log, *phantom, environment={"nnUNet_raw": str(raw)})
    assert log.read_text().count("$ e2enet phantom 1") == 2
    assert "is not empty" in log.read_text()
