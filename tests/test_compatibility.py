"""docs/compatibility.md is of this state of the repository: it names all features, and only tests that there are."""

import ast
import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, get_args

import pytest
from integration import table
from integration.compatibility import PAGE, named_tests, outcomes, page
from integration.features import FEATURES
from integration.workflow import STEP_NAMES, Harness

TESTS = Path(__file__).parent
NOT_RUN = {
    "Python 3.10, nnU-Net 2.8.1",
    "Python 3.12, nnU-Net 2.8.1",
    "Python 3.13, nnU-Net 2.8.1",
    "Python 3.10, nnU-Net 2.8.0 and all dependencies at their lower bounds (torch 2.5, scipy 1.10)",
}
"""Versions that the machine of the tests lacked."""
FEATURE_NAMES = [feature.name for features in FEATURES.values() for feature in features]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_feature_is_on_the_page() -> None:
    text = PAGE.read_text()
    assert [name for name in FEATURE_NAMES if f"\n| {name} | " not in text] == []
    rows = text[text.index("\n## ") :].count("\n| ") - 2 * len(FEATURES)  # without the heads of the tables
    assert rows == len(FEATURE_NAMES)


def test_every_feature_works_or_the_page_says_why_it_did_not_run() -> None:
    text = PAGE.read_text()
    features = [feature for features in FEATURES.values() for feature in features]
    tables = text[text.index("\n## ") :]
    verdicts = {feature.name: row(tables, feature.name).split(" | ")[1] for feature in features}
    not_run = {name for name, verdict in verdicts.items() if verdict == "not run"}
    unexplained = {feature.name for feature in features if not feature.remark}
    assert not_run & unexplained <= NOT_RUN
    assert [name for name in verdicts if name not in not_run and not re.match(r"yes(, \d+ of \d+)?$", verdicts[name])] == []
    counted = re.findall(r" (\d+) of (\d+) (?:steps )?\|", text)  # of features, and of the steps in each cell
    assert len(counted) > len(features) / 2
    assert [(n, m) for n, m in counted if n != m] == []


def test_the_page_names_tests_that_there_are() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)", PAGE.read_text()))
    assert named == {tuple(name.removeprefix("tests/").split("::")) for name in named_tests()}
    for file, function in named:
        assert function in functions(TESTS / file), f"{file} has no {function}"


def test_every_step_and_every_command_of_nnunet_is_a_feature() -> None:
    steps = {step for features in FEATURES.values() for feature in features for step in feature.steps}
    assert steps == set(STEP_NAMES)
    commands = {entry.name for entry in distribution("nnunetv2").entry_points if entry.group == "console_scripts"}
    assert commands
    assert commands - set(re.findall(r"nnUNetv2_\w+", " ".join(FEATURE_NAMES))) == set()


def workflow(outcome: str, harness: str = "processes") -> dict[str, Any]:
    cell = {"scheme": "plain", "configuration": "2d"}
    results = [{**cell, "step": step, "outcome": outcome if step == "--c" else "passed"} for step in STEP_NAMES]
    versions = {"nnunetv2": "2.8.1", "torch": "2.13.0", "python": "3.11.7", "nnunetv2-e2enet": "0.1.0"}
    origin = {"versions": versions, "commit": "0123456789", "harness": harness}
    return {**origin, "data": "phantoms", "seconds": 90, "results": results}


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {name} | "))


def test_the_page_says_what_the_results_say(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    networks = "test_train_and_predict"
    cases = {
        f'"tests.test_configurations" name="{networks}[2 levels]"': "",
        f'"tests.test_configurations" name="{networks}[3 levels]"': "<failure/>",
        f'"tests.test_configurations" name="{networks}[4 slices, 7 levels]"': "<skipped/>",
        '"tests.test_compile" name="test_topology_updates_compile_nothing[2]"': "",
        '"tests.test_crossval" name="test_jobs_are_submitted_for_what_is_not_done"': "",
    }
    content = "".join(f"<testcase classname={case}>{outcome}</testcase>" for case, outcome in cases.items())
    junit.write_text(f"<testsuites><testsuite>{content}</testsuite></testsuites>")
    text = page(workflow("failed"), outcomes([junit]), "abc")
    assert f"| plain | {len(STEP_NAMES) - 1} of {len(STEP_NAMES)} steps |\n" in text
    assert "| NO, 1 of 2 |" in row(text, "2 and 3 levels")
    assert "| yes |" in row(text, "`torch.compile`: topology updates compile nothing")
    assert "| not run |" in row(text, "five folds as one command (`e2enet crossval`)")  # there are other tests of it
    assert "| not run |" in row(text, "4 slices, 7 levels")
    assert "| NO |" in row(text, "`--c` after the training was killed")
    assert f"| NO, {len(STEP_NAMES) - 1} of {len(STEP_NAMES)} |" in row(text, "`2d`")
    assert "| not run |" in row(text, "`3d_fullres`")
    assert "| yes |" in row(page(workflow("passed"), {}, "abc"), "`--c` after the training was killed")


def test_skipped_steps_do_not_count_as_working() -> None:
    assert "| NO |" in row(page(workflow("skipped"), {}, "abc"), "`--c` after the training was killed")


@pytest.mark.parametrize("title", FEATURES)
def test_sections(title: str) -> None:
    assert f"\n## {title}\n" in PAGE.read_text()


def test_the_page_says_on_what_it_ran_and_how() -> None:
    """Forks are not what a user runs, and the page does not claim so."""
    processes, mixed, forks = (page(workflow("passed", harness), {}, "abcdef") for harness in get_args(Harness))
    for text in (processes, mixed, forks):
        assert "the workflow ran on 0123456789, the tests on abcdef." in text
        for difference in ("not run as a user runs them", "fork", "spawn", "cpu_count", "10^6 intensities instead of 10^8"):
            assert difference in text
    assert "every command is nnU-Net's console script in a process of its own" in processes
    assert "every command" not in forks
    assert "all commands run in forks" in forks
    assert "(plain in 3d_fullres, regions in 3d_lowres, ignore in 3d_cascade_fullres, regions + ignore in 2d)" in mixed
    assert "In the other cells, commands run in forks" in mixed


def test_the_commit_is_that_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        settings = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
        command = ["git", *settings, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(table, "REPOSITORY", tmp_path)
    assert table.commit() == "unknown (no git repository)"
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    assert git("rev-parse", "HEAD").startswith(table.commit())
    (tmp_path / "file").write_text("two")
    assert table.commit() == f"{git('rev-parse', '--short=10', 'HEAD')} with changes"
