"""Trainings that know their seconds, and trainings of as many seconds as another one: comparisons at equal cost."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from nnunetv2_e2enet.files import read_json, write_atomically
from nnunetv2_e2enet.training.interface import Overrides

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as TrainerBase
else:
    TrainerBase = object

TRAINING_TIME_FILE = "training_time.json"
FIRST_ITERATIONS = 5  # of the first epoch, in which the speed is not known yet


class TimedMixin(Overrides, TrainerBase):
    """Takes the time of a training; to be put before an nnU-Net trainer.

    ``training_time.json`` in the output folder holds the seconds of all iterations together, and their number, also of a
    training that was interrupted. Validation does not count.

    Attributes:
        as_long_as: name of another timed trainer, whose seconds on the same data set, plans, configuration and fold this one
            takes. After the first epoch, the iterations of each epoch follow from the seconds that are left and from the
            seconds of an iteration in the former epoch. None: nnU-Net's number of iterations.

    Raises:
        SystemExit: at the start of a training, if the other trainer has not ended one yet.
    """

    as_long_as: str | None = None
    _allowed: float | None = None
    _epochs: Sequence[tuple[float, int]] = ()  # seconds and iterations of each
    _epoch_started = 0.0

    def on_train_start(self) -> None:
        """As nnU-Net does, with the seconds that the training may take."""
        if self.as_long_as is not None:
            self._allowed = self._seconds_of(self.as_long_as)
        super().on_train_start()
        file = Path(self.output_folder) / TRAINING_TIME_FILE
        if self.current_epoch and file.is_file():  # a training that goes on
            self._epochs = read_json(file)["epochs"][: self.current_epoch]
        else:
            self._epochs = []

    def _seconds_of(self, trainer: str) -> float:
        from nnunetv2.utilities.file_path_utilities import convert_trainer_plans_config_to_identifier

        plans = self.plans_manager.plans_name
        model = convert_trainer_plans_config_to_identifier(trainer, plans, self.configuration_name)
        file = Path(self.output_folder_base).with_name(model) / f"fold_{self.fold}" / TRAINING_TIME_FILE
        time_taken = read_json(file) if file.is_file() else {}
        if not time_taken.get("ended"):
            raise SystemExit(
                f"E2ENet: {type(self).__name__} trains for as many seconds as {trainer}, but there is no {file} of "
                f"a training that has ended: train {trainer} first"
            )
        return float(time_taken["seconds"])

    def on_train_epoch_start(self) -> None:
        """As nnU-Net does, with as many iterations as fit into the epoch's share of the time."""
        super().on_train_epoch_start()
        if self._allowed is not None:
            planned = torch.tensor(self._planned_iterations(self._allowed), device=self.device)
            if self.is_ddp:  # each process has a clock of its own
                distributed.broadcast(planned, src=0)
            self.num_iterations_per_epoch = int(planned)
        self._epoch_started = time.monotonic()

    def _planned_iterations(self, seconds: float) -> int:
        if not self._epochs:
            return FIRST_ITERATIONS
        left = (seconds - sum(spent for spent, _ in self._epochs)) / max(1, self.num_epochs - self.current_epoch)
        last, iterations = self._epochs[-1]
        planned: int = max(1, round(left * iterations / last))
        return planned

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """As nnU-Net does, and takes the time of an iteration."""
        super().on_train_epoch_end(train_outputs)
        self._epochs = [*self._epochs, (time.monotonic() - self._epoch_started, len(train_outputs))]
        self._write_time(ended=False)

    def on_train_end(self) -> None:
        """As nnU-Net does, and writes that the training has ended."""
        super().on_train_end()
        self._write_time(ended=True)

    def _write_time(self, ended: bool) -> None:
        if self.local_rank == 0:
            content = {
                "seconds": sum(seconds for seconds, _ in self._epochs),
                "iterations": sum(iterations for _, iterations in self._epochs),
                "epochs": self._epochs,
                "ended": ended,
            }
            write_atomically(Path(self.output_folder) / TRAINING_TIME_FILE, json.dumps(content))
