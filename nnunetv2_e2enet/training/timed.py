"""Trainings with a fixed number of seconds, for comparisons at equal cost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_e2enet.files import write_atomically
from nnunetv2_e2enet.training.interface import Overrides

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as TrainerBase
else:
    TrainerBase = object

TRAINING_TIME_FILE = "training_time.json"
FIRST_ITERATIONS = 5  # of the first epoch, in which the speed is not known yet


class TimedMixin(Overrides, TrainerBase):
    """Trains for ``training_seconds`` in ``num_epochs`` epochs; to be put before an nnU-Net trainer.

    After the first epoch, the iterations of each epoch follow from the seconds that are left and from those that an iteration
    of the former epoch took. Validation does not count. ``training_time.json`` in the output folder holds both.

    Attributes:
        training_seconds: of all training iterations together.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: Any,
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.training_seconds = 60.0
        self._spent, self._iterations = 0.0, 0
        self._seconds_per_iteration: float | None = None
        self._epoch_started = 0.0

    def on_train_epoch_start(self) -> None:
        """As nnU-Net does, with as many iterations as fit into the epoch's share of the time."""
        super().on_train_epoch_start()
        self.num_iterations_per_epoch = self._planned_iterations()
        self._epoch_started = time.monotonic()

    def _planned_iterations(self) -> int:
        if self._seconds_per_iteration is None:
            return FIRST_ITERATIONS
        left = (self.training_seconds - self._spent) / max(1, self.num_epochs - self.current_epoch)
        planned: int = max(1, round(left / self._seconds_per_iteration))
        return planned

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """As nnU-Net does, and takes the time of an iteration."""
        super().on_train_epoch_end(train_outputs)
        seconds = time.monotonic() - self._epoch_started
        self._spent += seconds
        self._iterations += len(train_outputs)
        self._seconds_per_iteration = seconds / len(train_outputs)

    def on_train_end(self) -> None:
        """As nnU-Net does, and writes the seconds and iterations of the training."""
        super().on_train_end()
        if self.local_rank == 0:
            content = {"seconds": self._spent, "iterations": self._iterations}
            write_atomically(Path(self.output_folder) / TRAINING_TIME_FILE, json.dumps(content))
