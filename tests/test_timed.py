"""Trainings that know their seconds, and trainings of as many seconds as another one."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from support import Project, make

from nnunetv2_e2enet.training import timed
from nnunetv2_e2enet.training.timed import FIRST_ITERATIONS, TRAINING_TIME_FILE, TimedMixin
from nnunetv2_e2enet.training.variants import variant

EPOCHS = {"num_epochs": 4, "num_val_iterations_per_epoch": 1}


class Killed(Exception):  # noqa: N818 (stands for a kill)
    pass


class Timed(TimedMixin, nnUNetTrainer):
    pass


Other = variant(Timed, "other", **EPOCHS, num_iterations_per_epoch=3)
AsLong = variant(Timed, "as_long", **EPOCHS, as_long_as="Timed_other")


def train(
    cls: Any, project: Project, monkeypatch: pytest.MonkeyPatch, seconds: float, epochs_before_a_kill: int | None = None
) -> tuple[list[int], dict[str, Any]]:
    """A training on a clock that an iteration moves by so many seconds: iterations of each epoch, and the record.

    It goes on from a checkpoint if there is one.
    """
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timed.time, "monotonic", lambda: clock.now)

    class Clocked(cls):
        def train_step(self, batch: dict[str, Any]) -> Any:
            clock.now += seconds
            return super().train_step(batch)

        def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
            epochs.append(len(train_outputs))
            super().on_train_epoch_end(train_outputs)

        def on_epoch_start(self) -> None:
            if self.current_epoch == epochs_before_a_kill:
                raise Killed
            super().on_epoch_start()

    epochs: list[int] = []
    Clocked.__name__ = cls.__name__
    trainer = make(Clocked, project, project.tiny_plans())
    trainer.save_every = 1
    checkpoint = Path(trainer.output_folder) / "checkpoint_latest.pth"
    if checkpoint.is_file():
        trainer.load_checkpoint(str(checkpoint))
    with nullcontext() if epochs_before_a_kill is None else pytest.raises(Killed):
        trainer.run_training()
    return epochs, json.loads((Path(trainer.output_folder) / TRAINING_TIME_FILE).read_text())


def test_a_training_takes_the_seconds_of_another(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"seconds": 72.0, "iterations": 12, "epochs": [[18.0, 3]] * 4, "ended": True}
    assert train(Other, in_process, monkeypatch, 6.0) == ([3] * 4, expected)
    epochs = [FIRST_ITERATIONS, 10, 10, 11]
    expected = {"seconds": 72.0, "iterations": 36, "epochs": [[2.0 * n, n] for n in epochs], "ended": True}
    assert train(AsLong, in_process, monkeypatch, 2.0) == (epochs, expected)


def test_a_training_that_was_killed_knows_the_seconds_of_before(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    _, unfinished = train(Other, in_process, monkeypatch, 6.0, epochs_before_a_kill=2)
    assert unfinished == {"seconds": 36.0, "iterations": 6, "epochs": [[18.0, 3]] * 2, "ended": False}
    with pytest.raises(SystemExit, match=r"of a training that has ended: train Timed_other first"):
        train(AsLong, in_process, monkeypatch, 2.0)
    assert train(Other, in_process, monkeypatch, 6.0)[1]["seconds"] == 72
    assert train(AsLong, in_process, monkeypatch, 2.0, epochs_before_a_kill=2)[0] == [FIRST_ITERATIONS, 10]
    epochs, record = train(AsLong, in_process, monkeypatch, 2.0)
    assert epochs == [10, 11]
    assert (record["seconds"], record["iterations"]) == (72, 36)


def test_all_processes_take_the_iterations_of_the_first(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one would wait for a step that the others do not take."""

    class OnAnotherRank(AsLong):
        def on_train_epoch_start(self) -> None:
            self.is_ddp = True
            super().on_train_epoch_start()
            self.is_ddp = False

    sent = iter([FIRST_ITERATIONS, 4, 6, 7])
    monkeypatch.setattr(timed.distributed, "broadcast", lambda planned, src: planned.fill_(next(sent)) if src == 0 else None)
    train(Other, in_process, monkeypatch, 6.0)
    assert train(OnAnotherRank, in_process, monkeypatch, 2.0)[0] == [FIRST_ITERATIONS, 4, 6, 7]


def test_the_other_training_must_have_ended(in_process: Project) -> None:
    trainer = make(AsLong, in_process, in_process.tiny_plans())
    with pytest.raises(
        SystemExit, match=r"^E2ENet: Timed_as_long trains .* but there is no .*Timed_other__.*: train Timed_other first"
    ):
        trainer.run_training()
