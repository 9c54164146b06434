"""Trainings that know their seconds, and trainings of as many seconds as another one."""

from __future__ import annotations

import json
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


class Timed(TimedMixin, nnUNetTrainer):
    pass


Other = variant(Timed, "other", **EPOCHS, num_iterations_per_epoch=3)
AsLong = variant(Timed, "as_long", **EPOCHS, as_long_as="Timed_other")


def train(cls: Any, project: Project, monkeypatch: pytest.MonkeyPatch, seconds: float) -> tuple[list[int], dict[str, Any]]:
    """A training on a clock that an iteration moves by so many seconds: iterations of each epoch, and the record."""
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

    epochs: list[int] = []
    Clocked.__name__ = cls.__name__
    trainer = make(Clocked, project, project.tiny_plans())
    trainer.run_training()
    return epochs, json.loads((Path(trainer.output_folder) / TRAINING_TIME_FILE).read_text())


def test_a_training_takes_the_seconds_of_another(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(Other, in_process, monkeypatch, 6.0) == ([3] * 4, {"seconds": 72.0, "iterations": 12})
    expected = {"seconds": 72.0, "iterations": 36}
    assert train(AsLong, in_process, monkeypatch, 2.0) == ([FIRST_ITERATIONS, 10, 10, 11], expected)


def test_the_other_training_must_have_ended(in_process: Project) -> None:
    trainer = make(AsLong, in_process, in_process.tiny_plans())
    with pytest.raises(
        SystemExit, match=r"^E2ENet: Timed_as_long trains .* but there is no .*Timed_other__.*: train Timed_other first"
    ):
        trainer.run_training()
