"""Trainings that are ended by SIGKILL, again and again, and resumed until they are done."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import Project
from torch import Tensor

from nnunetv2_e2enet.dsff import HISTORY_FILE, History, read_history
from nnunetv2_e2enet.training.checkpoints import read_checkpoint

SERVER = Path(__file__).with_name("fault_server.py")
TRAINER = "nnUNetTrainerE2ENet_fragile"
EPOCHS = 9
KILLED = -9
Kill = float | list[Any] | None

MOMENTS = (
    "checkpoint half written",
    "checkpoint written, not in its place",
    "checkpoint in its place",
    "topology half updated",
    "topology updated, not saved",
    "record torn",
)


@dataclass(frozen=True)
class Outcome:
    """What a training left behind."""

    folder: Path
    checkpoint: dict[str, Any]
    history: History

    @property
    def log(self) -> dict[str, list[Any]]:
        return self.checkpoint["logging"]

    def masks(self) -> dict[str, Tensor]:
        state = self.checkpoint["network_weights"]
        return {key.removesuffix(".mask"): value for key, value in state.items() if key.endswith(".mask")}


class Trainings:
    """Runs nnU-Net's training command in forks of a server."""

    def __init__(self, project: Project, server: subprocess.Popen[str]) -> None:
        self.project = project
        self.server = server

    def run(self, results: Path, resume: bool, kill: Kill) -> int:
        """Exit status of one attempt."""
        results.mkdir(exist_ok=True)
        folders = {**self.project.environment, "nnUNet_results": str(results)}
        environment = {**folders, "nnUNet_n_proc_DA": "0", "nnUNet_e2enet_engine": "on"}
        arguments = ["993", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu", *(["--c"] if resume else [])]
        job = {"arguments": arguments, "environment": environment, "log": str(results / "log.txt"), "kill": kill}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def finish(self, results: Path, resume: bool) -> Outcome:
        """Run to the end."""
        status = self.run(results, resume, None)
        assert status == 0, (results / "log.txt").read_text()[-4000:]
        folder = results / self.project.dataset / f"{TRAINER}__nnUNetPlans__3d_fullres" / "fold_0"
        return Outcome(folder, read_checkpoint(folder / "checkpoint_final.pth"), read_history(folder / HISTORY_FILE))


@pytest.fixture(scope="module")
def trainings(project: Project) -> Iterator[Trainings]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SERVER.parent)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(SERVER)], env=environment, **pipes) as server:
        yield Trainings(project, server)
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture(scope="module")
def uninterrupted(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, float]:
    """A whole training, and how many seconds it takes."""
    start = time.monotonic()
    outcome = trainings.finish(tmp_path_factory.mktemp("uninterrupted"), resume=False)
    assert [record.epoch for record in outcome.history.records] == list(range(0, EPOCHS - 1, 2))
    return outcome, time.monotonic() - start


def totals(history: History, values: Callable[[Any], list[int]]) -> list[dict[str, int]]:
    """Sums over each layer, for every record: how they divide into flows depends on the weights."""
    result = []
    for record in history.records:
        by_layer: dict[str, int] = {}
        for part, value in zip(history.parts, values(record), strict=True):
            by_layer[part.layer] = by_layer.get(part.layer, 0) + value
        result.append(by_layer)
    return result


def assert_as_uninterrupted(outcome: Outcome, reference: Outcome) -> None:
    state, masks = outcome.checkpoint["network_weights"], outcome.masks()
    assert outcome.checkpoint["current_epoch"] == EPOCHS
    for name, mask in masks.items():
        assert int(mask.sum()) == round(0.2 * mask.numel())
        assert state[f"{name}.weight"][~mask].abs().sum() == 0
        assert bool((state[f"{name}.explored"] >= mask).all())
    records, expected = outcome.history.records, reference.history.records
    assert outcome.history.parts == reference.history.parts
    assert [(r.epoch, r.fraction) for r in records] == [(r.epoch, r.fraction) for r in expected]
    assert records[0].active == expected[0].active
    for values in (lambda r: r.active, lambda r: r.pruned, lambda r: r.grown):
        assert totals(outcome.history, values) == totals(reference.history, values)
    assert totals(outcome.history, lambda r: r.active)[-1] == {name: int(mask.sum()) for name, mask in masks.items()}
    explored = {name: int(state[f"{name}.explored"].sum()) for name in masks}
    assert totals(outcome.history, lambda r: r.explored)[-1] == explored
    born = [values for values in outcome.log["dsff_born"] if values is not None]
    survivors = {name: int((mask & (b == 0)).sum()) for (name, mask), b in zip(masks.items(), born, strict=True)}
    assert totals(outcome.history, lambda r: r.survivors)[-1] == survivors
    for key, values in reference.log.items():
        if key in ("lrs", "dsff_sparsity", "dsff_prune_fraction", "dsff_connections_changed"):
            assert outcome.log[key] == values
        elif not key.startswith("dsff_"):
            assert len(outcome.log[key]) == EPOCHS
    left = {path.name for path in outcome.folder.iterdir() if path.is_file() and not path.name.startswith("training_log_")}
    assert left == {"checkpoint_best.pth", "checkpoint_final.pth", "debug.json", HISTORY_FILE}


def killed_training(trainings: Trainings, results: Path, kills: list[Kill]) -> Outcome:
    for attempt, kill in enumerate(kills):
        status = trainings.run(results, attempt > 0, kill)
        assert status == KILLED, (results / "log.txt").read_text()[-4000:]
    return trainings.finish(results, resume=True)


@pytest.mark.parametrize(
    "kills",
    [
        [["checkpoint half written", 2], ["topology half updated", 5]],
        [["record torn", 3], ["history about to be rewritten", 1]],
    ],
    ids=["checkpoint, then topology", "history, then its repair"],
)
def test_killed_training_ends_as_an_uninterrupted_one(
    trainings: Trainings, uninterrupted: tuple[Outcome, float], tmp_path: Path, kills: list[Kill]
) -> None:
    assert_as_uninterrupted(killed_training(trainings, tmp_path / "results", kills), uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_killed_at_any_moment(trainings: Trainings, uninterrupted: tuple[Outcome, float], tmp_path: Path, seed: int) -> None:
    """Each seed is killed once at a moment that is looked for, which seeds take in turn, and once at a random time."""
    reference, seconds = uninterrupted
    chance = random.Random(seed)
    moment = [MOMENTS[seed % len(MOMENTS)], chance.randint(1, 4)]
    status = trainings.run(tmp_path / "results", False, moment)
    assert status == KILLED, (tmp_path / "results" / "log.txt").read_text()[-4000:]
    assert trainings.run(tmp_path / "results", True, chance.uniform(0, seconds)) in (KILLED, 0)
    assert_as_uninterrupted(trainings.finish(tmp_path / "results", resume=True), reference)
