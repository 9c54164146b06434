"""Networks as nnU-Net builds them, from model folders, plans and data sets; and the records of their trainings."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import nn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import read_json
from nnunetv2_e2enet.registration import find_trainer
from nnunetv2_e2enet.training.architecture import e2enet_architecture, is_e2enet
from nnunetv2_e2enet.training.checkpoints import CHECKPOINTS, fold_checkpoints, read_checkpoint

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

LOGGED = ("train_losses", "val_losses", "ema_fg_dice")


@contextmanager
def of_others(what: str) -> Iterator[None]:
    """Any error that plans, checkpoints or networks of others bring about is an E2ENetError, which says ``what`` failed."""
    try:
        yield
    except E2ENetError:
        raise
    except Exception as error:
        raise E2ENetError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())})") from error


@dataclass(frozen=True)
class Design:
    """A network to be built, and the patch that it works on; plain data, so that another process can build it too.

    Attributes:
        name: what tables call it.
        origin: where it comes from, for people.
        plans, dataset: content of ``plans.json`` and ``dataset.json``.
        configuration: of the plans.
        trainer: nnU-Net's class that builds the network.
        architecture: as in plans, in the place of the plans' own; or None.
        checkpoint: file of weights and topology; random ones where it is None.
    """

    name: str
    origin: str
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    configuration: str
    trainer: str = "nnUNetTrainer"
    architecture: Mapping[str, Any] | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        available = self._manager.available_configurations
        if self.configuration not in available:
            raise E2ENetError(
                f"the plans have no configuration {self.configuration}: choose with -c from {', '.join(available)}"
            )

    @property
    def _manager(self) -> PlansManager:
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return PlansManager(dict(self.plans))

    @property
    def settings(self) -> ConfigurationManager:
        """nnU-Net's view of the configuration."""
        return self._manager.get_configuration(self.configuration)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return tuple(int(n) for n in self.settings.patch_size)

    @property
    def batch_size(self) -> int:
        """Patches in a training step."""
        return int(self.settings.batch_size)

    @property
    def input_channels(self) -> int:
        """Of the image, with one for each class of a cascade's first stage."""
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

        return int(determine_num_input_channels(self._manager, self.settings, dict(self.dataset)))

    @property
    def outputs(self) -> int:
        """Channels of the logits."""
        return int(self._manager.get_label_manager(dict(self.dataset)).num_segmentation_heads)

    @property
    def has_regions(self) -> bool:
        """Whether the classes are regions, which may overlap."""
        return bool(self._manager.get_label_manager(dict(self.dataset)).has_regions)

    @property
    def resolutions(self) -> int:
        """At so many, nnU-Net's loss compares a network's outputs."""
        return len(self.settings.pool_op_kernel_sizes) - 1

    def input_shape(self, batch_size: int = 1) -> tuple[int, ...]:
        """Batch, channels, and the patch."""
        return (batch_size, self.input_channels, *self.patch_size)

    def build(self, deep_supervision: bool = False) -> nn.Module:
        """The network on the CPU.

        Raises:
            E2ENetError: nnU-Net does not find the trainer, or the weights do not fit.
        """
        settings = self.settings
        if self.architecture is not None:
            settings.configuration["architecture"] = self.architecture
        described = is_e2enet(settings.configuration["architecture"])  # plans say all of it, whatever trained it
        trainer = find_trainer("nnUNetTrainer" if described else self.trainer)
        with redirect_stdout(StringIO()):
            network: nn.Module = trainer.build_network_architecture(
                self._manager, settings, self.input_channels, self.outputs, deep_supervision
            )
        if self.checkpoint is not None:
            try:
                network.load_state_dict(read_checkpoint(self.checkpoint)["network_weights"])
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise E2ENetError(f"the weights in {self.checkpoint} do not fit the network of its plans: {reason}") from error
        return network


@dataclass(frozen=True)
class Training:
    """The record of one fold's training.

    Attributes:
        fold: its name.
        trainer, configuration: nnU-Net's names.
        epochs: how many were finished.
        curves: values by epoch, by nnU-Net's name of them (``LOGGED``).
        epoch_seconds: median duration of an epoch; NaN where unknown.
    """

    fold: str
    trainer: str
    configuration: str
    epochs: int
    curves: dict[str, list[float]]
    epoch_seconds: float


def read_trainings(model: Path) -> list[Training]:
    """One for each fold that has a checkpoint."""
    trainings = []
    for fold, file in fold_checkpoints(model).items():
        checkpoint = read_checkpoint(file, lazily=True)
        logged = checkpoint.get("logging") or {}
        curves = {name: [math.nan if value is None else float(value) for value in logged.get(name, [])] for name in LOGGED}
        starts, ends = (logged.get(f"epoch_{edge}_timestamps", []) for edge in ("start", "end"))
        seconds = [end - start for start, end in zip(starts, ends, strict=False)]
        trainings.append(
            Training(
                fold,
                str(checkpoint["trainer_name"]),
                str(checkpoint["init_args"]["configuration"]),
                int(checkpoint["current_epoch"]),
                curves,
                float(median(seconds)) if seconds else math.nan,
            )
        )
    return trainings


def model_design(model: Path, name: str) -> Design:
    """The trained network of a model folder, with the weights and topology of its first fold.

    Raises:
        E2ENetError: no checkpoint in any fold.
    """
    file = next((f for n in CHECKPOINTS for f in sorted(model.glob(f"fold_*/{n}"))), None)
    if file is None:
        raise E2ENetError(f"{model} has no checkpoint in any fold_*: finish a training, or profile its plans.json")
    checkpoint = read_checkpoint(file, lazily=True)
    return Design(
        name,
        f"{model.resolve().parent.name}, {model.name}, {file.parent.name}",
        read_json(model / "plans.json"),
        read_json(model / "dataset.json"),
        str(checkpoint["init_args"]["configuration"]),
        str(checkpoint["trainer_name"]),
        checkpoint=file,
    )


def e2enet_variant(design: Design, sparsity: float) -> Design:
    """E2ENet in the place of the network of a design, as ``nnUNetTrainerE2ENet`` trains it."""
    architecture = e2enet_architecture(design.settings.configuration["architecture"], feature_sparsity=sparsity)
    return replace(design, name=f"E2ENet S={sparsity:g}", trainer="nnUNetTrainer", architecture=architecture, checkpoint=None)


def residual_encoder_variant(design: Design) -> Design:
    """nnU-Net's residual encoder preset with the strides, kernels and channels of the U-Net of a design.

    Presets M and L are the same network wherever their plans have the same strides; they differ in patch and batch.

    Raises:
        E2ENetError: the design is not stock nnU-Net.
    """
    architecture = deepcopy(design.settings.configuration["architecture"])
    given = architecture["arch_kwargs"]
    if "n_conv_per_stage" not in given or "kernel_sizes" not in given:
        raise E2ENetError("the plans are not of stock nnU-Net: give nnUNetPlans to compare with residual encoder presets")
    stages = given["n_stages"]
    given.pop("n_conv_per_stage")
    given["n_blocks_per_stage"] = [1, 3, 4, *[6] * stages][:stages]
    given["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    return replace(design, name="ResEnc M/L", trainer="nnUNetTrainer", architecture=architecture, checkpoint=None)


def dataset_folder(name: str) -> Path | None:
    """The folder of a data set, by name or number, in ``nnUNet_preprocessed``; None where there is none."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    root = os.environ.get("nnUNet_preprocessed")
    try:
        folder = Path(root or "") / maybe_convert_to_dataset_name(name)
    except (ValueError, RuntimeError):  # neither a name nor a number; or a number that none or several data sets have
        return None
    return folder if root and folder.is_dir() else None
