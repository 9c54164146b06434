"""Mixins that add another network, DSFF and E2ENet to nnU-Net trainers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_e2enet.dsff import (
    HISTORY_FILE,
    CosineSchedule,
    Distribution,
    Growth,
    Importance,
    KernelL1Norm,
    RandomGrowth,
    Schedule,
    StaticSchedule,
    TopologyHistory,
    TopologyUpdater,
    Uniform,
    explored_share,
    random_topology,
    sparsity,
)
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, fusion_flows, maskable_layers
from nnunetv2_e2enet.network.blocks import KERNEL_SIZE
from nnunetv2_e2enet.network.compact import store_active_only
from nnunetv2_e2enet.network.e2enet import located
from nnunetv2_e2enet.network.learned_shift import hold_whole_offsets
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST
from nnunetv2_e2enet.training.architecture import BASE_NUM_FEATURES, MAX_NUM_FEATURES, e2enet_architecture
from nnunetv2_e2enet.training.checkpoints import check_checkpoint, is_out_of_memory, is_write_failure
from nnunetv2_e2enet.training.interface import TRAINER_ATTRIBUTES, Overrides, check_attributes
from nnunetv2_e2enet.training.logging import DSFFLogger
from nnunetv2_e2enet.training.parallel import share_topology

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as TrainerBase
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
else:
    TrainerBase = object


WHOLE_SHIFT_FROM = 0.9  # of the epochs, with a learned shift
OBSERVATIONS = 8  # batches that are tried before an update


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends nnU-Net's console command with the message of an E2ENetError, without a traceback."""
    try:
        yield
    except E2ENetError as error:
        raise SystemExit(f"E2ENet: {error}") from None


class NetworkMixin(Overrides, TrainerBase):
    """Trains another network than the plans say; to be put before an nnU-Net trainer.

    What is trained is written into the model folder's ``plans.json`` and into checkpoints, so prediction needs no settings.
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
        with one_line_errors():
            check_attributes(self, TRAINER_ATTRIBUTES)
            self._write_architecture_into_plans()
            super().initialize()

    def _write_architecture_into_plans(self) -> None:
        """From here on the plans describe what is trained: nnU-Net copies them into the model folder and into checkpoints."""
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
        """As nnU-Net does, but a file that is there is replaced only by one that is complete."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        target, temporary = Path(filename), Path(f"{filename}.tmp")
        try:
            super().save_checkpoint(str(temporary))
            temporary.replace(target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if is_out_of_memory(error):
                raise SystemExit(
                    f"E2ENet: out of memory while {target} was written ({reason}): former checkpoints are intact. Free memory "
                    "and resume with --c"
                ) from error
            if is_write_failure(error):
                free = shutil.disk_usage(target.parent).free
                raise SystemExit(
                    f"E2ENet: {target} could not be written ({reason}; {free / 1e9:.1f} GB are free): former checkpoints are "
                    "intact. Make room and resume with --c"
                ) from error
            raise

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """As nnU-Net does, after a check that the checkpoint is of this network."""
        if not self.was_initialized:
            self.initialize()
        if isinstance(filename_or_checkpoint, str):
            architecture = self.configuration_manager.configuration["architecture"]
            with one_line_errors():
                check_checkpoint(Path(filename_or_checkpoint), architecture, self.unwrapped_network.state_dict())
        with one_line_errors():
            super().load_checkpoint(filename_or_checkpoint)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.local_rank == 0:
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Of what a killed training was about to write."""
        for pattern in ("checkpoint_*.pth.tmp", f".{HISTORY_FILE}.*.tmp"):
            for file in Path(self.output_folder).glob(pattern):
                file.unlink()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
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


class DSFFMixin(NetworkMixin):
    """Trains a network with maskable layers with dynamic sparse feature fusion; to be put before an nnU-Net trainer."""

    own_hooks = (*NetworkMixin.own_hooks, "configure_optimizers")  # whose arguments differ between nnU-Net's variants

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the signature that nnU-Net inspects)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.feature_sparsity = 0.8  # share of maskable connections that are off; 0 trains the dense network
        self.topology_update_period: int | None = 5  # epochs between two updates of the topology; None keeps that of the start
        self.initial_prune_fraction = 0.5  # share of active connections replaced at epoch 0; falls to 0 by a cosine
        self.schedule: Schedule | None = None  # of the updates; None: a cosine with the two settings above
        self.distribution: Distribution = Uniform()  # connections per layer
        self.importance: Importance = KernelL1Norm()  # which connections are kept
        self.growth: Growth = RandomGrowth()  # which connections are tried
        self.initial_gain = 1.0  # factor of the initial weights of maskable layers
        self.block_size = 1  # output maps that share their input maps
        self.compute_active_only = False  # blocks with equally many inputs each; only active ones are stored and multiplied
        self.topology_seed = 0
        self._is_prepared = False

    def initialize(self) -> None:
        with one_line_errors():
            super().initialize()
            if not self._is_prepared:  # a class of the user's configures the optimizer without a call of this one's
                self._prepare_late()
            self.topology_history = self._follow_topology()

    def configure_optimizers(self, *args: Any, **kwargs: Any) -> Any:
        """As nnU-Net does, after topology and weights have got the form in which they are trained."""
        if not self._is_prepared:
            self._prepare_network()
            self._is_prepared = True
        return super().configure_optimizers(*args, **kwargs)

    def _prepare_late(self) -> None:
        """The optimizer holds the same parameters; DistributedDataParallel has sent their old values to all processes."""
        if self.is_ddp:
            raise E2ENetError(
                f"{type(self).__name__}.configure_optimizers does not call super().configure_optimizers(), which prepares the "
                "topology: let it do so, or train on one device"
            )
        self._prepare_network()
        self._is_prepared = True

    def _prepare_network(self) -> None:
        """Bring topology and weights into the form in which they are trained."""
        network = self.unwrapped_network
        for _, layer in maskable_layers(network):
            layer.share_inputs(self.block_size, self.compute_active_only)
        seed = f"{self.topology_seed}/{self.fold}"  # one a fold, so that agreement between folds reflects learning
        random_topology(network, self.feature_sparsity, self.distribution, seed)
        share_topology(network)
        self.topology_updater = TopologyUpdater(network, self._schedule(), self.importance, self.growth, seed)
        for layer in self.topology_updater.layers.values():
            layer.initialize_weights(self.initial_gain)
            if self.compute_active_only and not self.topology_updater.observes["dense_gradients"]:
                store_active_only(layer)

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Optimizer state of all connections, as checkpoints had it once, is taken for those that are stored."""
        super().load_checkpoint(filename_or_checkpoint)
        for layer in self.topology_updater.layers.values():
            state = self.optimizer.state.get(layer.weight, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == layer.shape:
                    state[key] = layer.gather(value)

    def _follow_topology(self) -> TopologyHistory:
        path = Path(self.output_folder) / HISTORY_FILE if self.local_rank == 0 else None
        flows = fusion_flows(self.unwrapped_network)
        history = TopologyHistory(self.topology_updater.layers, flows, path, self.importance)
        self.logger.local_logger = DSFFLogger(history, self.logger.local_logger.verbose)
        return history

    def _schedule(self) -> Schedule:
        if self.schedule is not None:
            return self.schedule
        if self.topology_update_period is None:
            return StaticSchedule()
        return CosineSchedule(self.num_epochs, self.topology_update_period, self.initial_prune_fraction)

    def on_train_start(self) -> None:
        super().on_train_start()
        with one_line_errors():
            self._check_topology()
            if self.current_epoch == 0:
                for layer in self.topology_updater.layers.values():
                    layer.explored.copy_(layer.mask)  # with -pretrained_weights, what was explored before does not count
                self.topology_history.start()
            else:
                self.topology_history.resume(self.current_epoch)

    def _check_topology(self) -> None:
        """Raises E2ENetError unless every layer has as many active connections as the sparsity says, in blocks."""
        layers = self.topology_updater.layers
        expected = self.distribution.active(self.feature_sparsity, layers)
        wrong = {name: layer.n_active for name, layer in layers.items() if layer.n_active != expected[name]}
        if wrong:
            raise E2ENetError(
                f"the loaded weights have a sparsity of {sparsity(layers):.3f}, but {type(self).__name__} trains with "
                f"{self.feature_sparsity}: load weights of that sparsity, or use the trainer that they were trained with"
            )
        loose = [name for name, layer in layers.items() if not layer.fits_blocks()]
        if loose:
            raise E2ENetError(
                f"{loose[0]} and {len(loose) - 1} more layers of the loaded weights have output maps that do not share their "
                f"input maps, but {type(self).__name__} trains with block_size {self.block_size}: load weights in such blocks"
            )

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        with one_line_errors():
            self._update_topology()

    def _update_topology(self) -> None:
        """Before the first iteration, so that validation and checkpoints see networks that were trained after an update."""
        updater = self.topology_updater
        if updater.needs_observation(self.current_epoch):
            self._observe()
        update = updater.update(self.current_epoch, self.optimizer)
        if update is not None:
            self.topology_history.add(update)
        values = {
            "sparsity": sparsity(updater.layers),
            "prune_fraction": updater.schedule.prune_fraction(self.current_epoch),
            "connections_changed": update.replaced if update else 0,
            "explored": explored_share(updater.layers),
        }
        for name, value in values.items():
            self.logger.log(f"dsff_{name}", value, self.current_epoch)
        self.print_to_log_file(
            "DSFF sparsity {sparsity:.4f}, prune fraction {prune_fraction:.4f}, connections changed {connections_changed}, "
            "explored {explored:.4f}".format(**values)
        )

    def _observe(self) -> None:
        """Show one batch to the criteria of DSFF, with gradients that the optimizer never sees.

        Raises:
            E2ENetError: no batch gives finite gradients, however small the loss is scaled.
        """
        network, updater = self.unwrapped_network, self.topology_updater
        scale = 1.0 if self.grad_scaler is None else float(self.grad_scaler.get_scale())
        for _ in range(OBSERVATIONS):
            self.optimizer.zero_grad(set_to_none=True)
            batch = next(self.dataloader_train)
            data, target = (_on_device(batch[key], self.device) for key in ("data", "target"))
            with updater.observation():
                with torch.autocast("cuda") if self.device.type == "cuda" else nullcontext():  # as nnU-Net's train_step
                    loss = self.loss(network(data), target)
                (loss * scale).backward()
            if updater.observation_is_finite():
                return
            scale /= 16  # of half precision's overflows
        raise E2ENetError(
            f"{OBSERVATIONS} batches in a row gave gradients that are not finite before epoch {self.current_epoch}: the "
            "training has diverged. Resume it from its last checkpoint with --c and a lower initial_lr"
        )


def _on_device(values: Any, device: torch.device) -> Any:
    return [value.to(device) for value in values] if isinstance(values, list) else values.to(device)


class E2ENetMixin(DSFFMixin):
    """Trains E2ENet with dynamic sparse feature fusion; to be put before an nnU-Net trainer.

    ``class MyTrainer(E2ENetMixin, nnUNetTrainerDA5): pass`` is all that a combination takes. Works with any U-Net plans:
    patch, strides and dimension come from them, channels from here (unless the plans are E2ENet's).
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the signature that nnU-Net inspects)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.shift_size = 3  # channel groups of the depth shift, odd; 1 = no shift
        self.learned_shift = False  # each channel learns how far it moves, in whole slices over the last tenth of the epochs
        self.kernel_size = list(KERNEL_SIZE)  # of all convolutions, depth first
        self.base_num_features = BASE_NUM_FEATURES  # channels of the finest level
        self.max_num_features = MAX_NUM_FEATURES
        self.encoder_class: type[nn.Module] | None = None  # another backbone; None: that of the plans, Encoder by default
        self.decoder_class: type[nn.Module] | None = None  # another fusion; None: that of the plans, FusionDecoder by default
        self.channels_last = False  # how maps lie in memory on the device, never what is computed (docs/memory.md)
        self.recompute = "blocks"  # in the backward pass; "none" is faster, "nodes" takes less memory (docs/memory.md)

    def initialize(self) -> None:
        super().initialize()
        with one_line_errors():
            network = cast(E2ENet, self.unwrapped_network)
            network.recompute = self.recompute
            network.check_patch_size(self.configuration_manager.patch_size)

    def _prepare_network(self) -> None:
        super()._prepare_network()
        network = cast(E2ENet, self.unwrapped_network)
        if self.channels_last:
            network.to(memory_format=CHANNELS_LAST[network.dimension])  # type: ignore[call-overload]

    def network_architecture(self, architecture: dict[str, Any]) -> dict[str, Any]:
        result = e2enet_architecture(
            architecture,
            self.base_num_features,
            self.max_num_features,
            feature_sparsity=self.feature_sparsity,
            shift_size=self.shift_size,
            kernel_size=self.kernel_size,
            learned_shift=self.learned_shift,
            **self._classes(),
        )
        if len(result["arch_kwargs"]["strides"]) == 2:
            # A network of two levels has one head, and nnU-Net's deep supervision gives the last one no weight.
            self.enable_deep_supervision = False
        return result

    def _classes(self) -> dict[str, str]:
        """Names under which prediction will import the classes that are not E2ENet's own.

        Raises:
            E2ENetError: a class cannot be imported by its name.
        """
        given = {"encoder_class": self.encoder_class, "decoder_class": self.decoder_class}
        names = {argument: f"{cls.__module__}.{cls.__qualname__}" for argument, cls in given.items() if cls is not None}
        for argument, name in names.items():
            located(argument, name)
        return names

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch >= int(WHOLE_SHIFT_FROM * self.num_epochs):
            hold_whole_offsets(self.unwrapped_network, self.optimizer)

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,  # noqa: ARG004 (nnU-Net's signature)
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """E2ENet for a configuration; one of other plans is built with E2ENet's defaults."""
        architecture = e2enet_architecture(configuration_manager.configuration["architecture"])
        network: nn.Module = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )
        return network
