"""Mixin that trains another network than that of the plans, and writes checkpoints whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import isroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_e2enet.dsff import HISTORY_FILE
from nnunetv2_e2enet.errors import E2ENetError, show_message_alone
from nnunetv2_e2enet.training.checkpoints import check_checkpoint, contents_of_checkpoints, why_not_written
from nnunetv2_e2enet.training.interface import TRAINER_ATTRIBUTES, Overrides, check_attributes

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as TrainerBase
else:
    TrainerBase = object


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends nnU-Net's console command with the message of an E2ENetError, without a traceback."""
    try:
        yield
    except E2ENetError as error:
        raise SystemExit(f"E2ENet: {error}") from None


class NetworkMixin(Overrides, TrainerBase):
    """Trains another network than that of the plans; to be put before an nnU-Net trainer.

    The network is described in the model folder's ``plans.json`` and in checkpoints, so prediction needs no settings.
    Checkpoints are written whole and checked before they are continued, and a training that diverges stops.
    """

    own_hooks: tuple[str, ...] = ("network_architecture",)

    def network_architecture(self, architecture: dict[str, Any]) -> dict[str, Any]:
        """The ``architecture`` entry of the network to train.

        Args:
            architecture: that of the plans; not changed.
        """
        return architecture

    def initialize(self) -> None:
        """As nnU-Net does, after the architecture of the trainer has been written into the plans."""
        show_message_alone()  # of errors that end a training where nnU-Net calls the network, not the trainer
        with one_line_errors():
            check_attributes(self, TRAINER_ATTRIBUTES)
            self._name_attributes_without_effect()
            self._write_architecture_into_plans()
            if self._do_i_compile():
                # Or the compiler turns the backward graph of a 2D network channels-last, around operators that are not
                torch._inductor.config.layout_optimization = False
                if self.is_ddp:
                    torch._dynamo.config.optimize_ddp = False  # PyTorch 2.11 fails where it splits a graph with checkpoints
            super().initialize()

    def _mixins(self) -> list[type]:
        """The classes of the trainer in which settings can be, its own first."""
        return [cls for cls in type(self).__mro__ if issubclass(cls, NetworkMixin)]

    def _settings(self) -> dict[str, Any]:
        """The settings of E2ENet, each with its first default."""
        ours = [cls for cls in self._mixins() if cls.__module__.startswith("nnunetv2_e2enet.")]
        return {name: value for cls in ours for name, value in _data(cls).items() if name != "own_hooks"}

    def _name_attributes_without_effect(self) -> None:
        """Log which attributes of the user's classes are called almost as a setting, or are overwritten by ``__init__``."""
        settings = self._settings()
        for cls in self._mixins():
            for name, given in _data(cls).items():
                if name in settings:
                    continue
                for meant in get_close_matches(name, settings, 1, cutoff=0.85):
                    self.print_to_log_file(f"{cls.__name__} has {name}, which is no setting of E2ENet: is {meant} meant?")
                used = vars(self).get(name, given)
                if repr(used) != repr(given):
                    self.print_to_log_file(
                        f"{name} is {used!r}, set by __init__, not the {given!r} of {cls.__name__}: set it in __init__"
                    )

    def _write_architecture_into_plans(self) -> None:
        """Let the plans describe this network: nnU-Net copies them into the model folder and into checkpoints."""
        configuration = self.configuration_manager.configuration
        architecture = self.network_architecture(configuration["architecture"])
        configuration["architecture"] = architecture
        self.plans_manager.plans["configurations"][self.configuration_name]["architecture"] = architecture

    @property
    def unwrapped_network(self) -> nn.Module:
        """The network itself, without DistributedDataParallel and torch.compile."""
        wrapped = isinstance(self.network, DistributedDataParallel)  # not yet while nnU-Net initializes
        network: nn.Module = self.network.module if wrapped else self.network
        unwrapped: nn.Module = getattr(network, "_orig_mod", network)
        return unwrapped

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net does, but only a complete file replaces an existing one."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        target, temporary = Path(filename), Path(f"{filename}.tmp")
        try:
            super().save_checkpoint(str(temporary))
            if not temporary.exists():  # a trainer of the user's leaves this one out
                return
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            reason = why_not_written(error, target)
            if reason is None:
                raise
            raise SystemExit(f"E2ENet: {reason}") from error

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """As nnU-Net does, after a check that the checkpoint is of this network."""
        if not self.was_initialized:
            self.initialize()
        if isinstance(filename_or_checkpoint, str):
            architecture = self.configuration_manager.configuration["architecture"]
            resumes = getattr(self.logger, "resume", True)  # False: to be validated
            with one_line_errors():
                check_checkpoint(Path(filename_or_checkpoint), architecture, self.unwrapped_network, resumes)
        with one_line_errors(), contents_of_checkpoints():  # nnUNetTrainer_warmup asks torch for weights alone
            super().load_checkpoint(filename_or_checkpoint)

    def on_train_start(self) -> None:
        """As nnU-Net does; files that a killed training left half-written are removed."""
        super().on_train_start()
        if self.local_rank == 0:
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Temporary files of a killed training."""
        for pattern in ("checkpoint_*.pth.tmp", f".{HISTORY_FILE}.*.tmp"):
            for file in Path(self.output_folder).glob(pattern):
                file.unlink()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """As nnU-Net does.

        Raises:
            SystemExit: with one line, where a weight is not finite.
        """
        super().on_train_epoch_end(train_outputs)
        with one_line_errors():
            self._check_weights()

    def _check_weights(self) -> None:
        """Raises E2ENetError if the training has diverged; the checkpoints on disk are from before."""
        for name, parameter in self.unwrapped_network.named_parameters():
            if not torch.isfinite(parameter).all():
                raise E2ENetError(
                    f"{name} is not finite after epoch {self.current_epoch}: the training has diverged. Resume it from its "
                    "last checkpoint with --c and a lower initial_lr"
                )


def _data(cls: type) -> dict[str, Any]:
    """The public attributes that a class itself has, without its methods."""
    no_data = (property, staticmethod, classmethod)
    data = {name: value for name, value in vars(cls).items() if not isroutine(value) and not isinstance(value, no_data)}
    return {name: value for name, value in data.items() if not name.startswith("_")}
