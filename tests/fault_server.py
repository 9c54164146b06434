"""Starts trainings and kills them: one job a line on standard input, one answer a line on standard output.

A job is ``{"arguments": […], "environment": {…}, "log": FILE, "kill": null | SECONDS | [MOMENT, COUNT]}``: nnU-Net's training
command is run with these arguments in a fork of this process, which has imported everything once, and ends with SIGKILL after
so many seconds, or when it comes to such a moment for so many times. The answer is the exit status, -9 if it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import torch
from nnunetv2.run import run_training

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.dsff import history, updater
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.training import trainer
from nnunetv2_e2enet.training.variants import variant


class nnUNetTrainerE2ENet_fragile(
    variant(  # type: ignore[misc]
        nnUNetTrainerE2ENet_smoke,
        "settings",
        num_epochs=9,
        num_iterations_per_epoch=1,
        topology_update_period=2,
        save_every=3,
        base_num_features=4,
        max_num_features=8,
    )
):
    """A few seconds on the CPU engine, without what takes longer and writes nothing that a training goes on from."""

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = super().train_step(batch)
        assert engine.why_pytorch(self.network) is None
        return result

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        pass

    def plot_network_architecture(self) -> None:
        pass

    def initialize(self) -> None:
        super().initialize()
        self.logger.local_logger.plot_progress_png = lambda _: None


class Moments:
    """Ends this process when it comes to a moment for the ``count``-th time."""

    def __init__(self, moment: str, count: int) -> None:
        self.moment = moment
        self.left = count

    def reached(self, moment: str) -> None:
        if moment == self.moment:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def announce(self) -> None:
        """Let the trainer come by all of them."""
        mock.patch.object(torch, "save", self._saving(torch.save)).start()
        mock.patch.object(Path, "replace", self._replacing(Path.replace)).start()
        mock.patch.object(updater, "_replace", self._updating(updater._replace)).start()
        mock.patch.object(history.os, "fsync", self._appending(os.fsync)).start()
        train = trainer.E2ENetMixin.on_train_epoch_end
        mock.patch.object(trainer.E2ENetMixin, "on_train_epoch_end", self._updated(train)).start()

    def _saving(self, save: Callable[..., None]) -> Callable[..., None]:
        def half_written(content: Any, name: str) -> None:
            size = sum(value.numel() * value.element_size() for value in content["network_weights"].values())
            with Path(name).open("wb") as file:
                save(content, _HalfWritten(file, size, self))
            self.reached("checkpoint written, not in its place")

        return half_written

    def _replacing(self, replace: Callable[..., Path]) -> Callable[..., Path]:
        def replaced(source: Path, target: Path) -> Path:
            if history.HISTORY_FILE in source.name:
                self.reached("history about to be rewritten")
            result = replace(source, target)
            if source.suffix == ".tmp" and history.HISTORY_FILE not in source.name:
                self.reached("checkpoint in its place")
            return result

        return replaced

    def _updating(self, update: Callable[..., None]) -> Callable[..., None]:
        def updated(*arguments: Any) -> None:
            update(*arguments)
            self.reached("topology half updated")

        return updated

    def _appending(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def torn(descriptor: int) -> None:
            if self.moment == "record torn" and self.left == 1:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - 20)
            self.reached("record torn")
            fsync(descriptor)

        return torn

    def _updated(self, epoch_end: Callable[..., None]) -> Callable[..., None]:
        def ended(*arguments: Any) -> None:
            epoch_end(*arguments)
            self.reached("topology updated, not saved")

        return ended


class _HalfWritten:
    """A file that comes to its moment when half of what is expected has been written."""

    def __init__(self, file: BinaryIO, size: int, moments: Moments) -> None:
        self.file, self.size, self.moments, self.written = file, size, moments, 0

    def write(self, data: bytes) -> int:
        self.written += self.file.write(data)
        if self.written > self.size / 2:
            self.size = sys.maxsize
            self.file.flush()
            self.moments.reached("checkpoint half written")
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def train(job: dict[str, Any]) -> None:
    """In the fork."""
    with Path(job["log"]).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= job["environment"]
    if isinstance(job["kill"], list):
        Moments(*job["kill"]).announce()
    sys.argv = ["nnUNetv2_train", *job["arguments"]]
    run_training.run_training_entry()


def serve(job: dict[str, Any]) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            train(job)
            status = 0
        except BaseException:  # noqa: BLE001 (whatever it is, this is not the server)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if isinstance(job["kill"], float):
        time.sleep(job["kill"])
        os.kill(child, signal.SIGKILL)  # there is no harm if it has just ended: it is waited for below
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    # where nnU-Net's command looks for trainers
    registered = import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainerE2ENet")
    setattr(registered, nnUNetTrainerE2ENet_fragile.__name__, nnUNetTrainerE2ENet_fragile)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
