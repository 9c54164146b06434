"""Mixin that adds dynamic sparse feature fusion to nnU-Net trainers."""

from __future__ import annotations

from contextlib import nullcontext
from inspect import isclass, isfunction, signature
from math import isfinite
from pathlib import Path
from typing import Any

import torch

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
from nnunetv2_e2enet.network import fusion_flows, maskable_layers, store_active_only
from nnunetv2_e2enet.training.logging import DSFFLogger
from nnunetv2_e2enet.training.network import NetworkMixin, one_line_errors
from nnunetv2_e2enet.training.parallel import share_topology

OBSERVATIONS = 8  # batches that are tried before an update

# Of settings that are objects: what they have to be, and an example
_ROLES: dict[str, tuple[type, object]] = {
    "schedule": (Schedule, StaticSchedule()),
    "distribution": (Distribution, Uniform()),
    "importance": (Importance, KernelL1Norm()),
    "growth": (Growth, RandomGrowth()),
}


class DSFFMixin(NetworkMixin):
    """Trains a network with maskable layers with dynamic sparse feature fusion; to be put before an nnU-Net trainer."""

    own_hooks = (*NetworkMixin.own_hooks, "configure_optimizers")  # whose arguments differ between nnU-Net's variants

    feature_sparsity = 0.8  # share of maskable connections that are off; 0 trains the dense network
    topology_update_period: int | None = 5  # epochs between two updates of the topology; None keeps that of the start
    initial_prune_fraction = 0.5  # share of active connections replaced at epoch 0; falls to 0 by a cosine
    schedule: Schedule | None = None  # of the updates; None: a cosine with the two settings above
    distribution: Distribution = Uniform()  # connections per layer
    importance: Importance = KernelL1Norm()  # which connections are kept
    growth: Growth = RandomGrowth()  # which connections are tried
    initial_gain = 1.0  # factor of the initial weights of maskable layers
    block_size = 1  # output maps that share their input maps
    compute_active_only = False  # blocks with equally many inputs each; only active ones are stored and multiplied
    topology_seed = 0
    _is_prepared = False

    def initialize(self) -> None:
        """As nnU-Net does, with a topology and its history."""
        with one_line_errors():
            self._check_settings()
            super().initialize()
            if not self._is_prepared:  # a class of the user's configures the optimizer without a call of this one's
                self._prepare_late()
            self.topology_history = self._follow_topology()

    def _check_settings(self) -> None:
        """Raises E2ENetError if a setting is of another type than it has to be."""
        for name, default in self._settings().items():
            value, is_switch = getattr(self, name), isinstance(default, bool)
            if isinstance(value, bool) != is_switch:
                wanted = "a switch: use True or False" if is_switch else f"no switch: use a value such as {default!r}"
                raise E2ENetError(f"{name} is {value!r}, but it is {wanted}")
        if not isinstance(self.initial_gain, (int, float)) or not isfinite(self.initial_gain):
            raise E2ENetError(
                f"initial_gain is {self.initial_gain!r}, but it is a factor of weights: use a number such as 1.0"
            )
        for name, (role, example) in _ROLES.items():
            if name != "schedule" or self.schedule is not None:
                _check_role(name, getattr(self, name), role, example)

    def configure_optimizers(self, *args: Any, **kwargs: Any) -> Any:
        """As nnU-Net does, after the start of the topology."""
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
        """Draw the topology and the initial weights, and store active weights alone where asked to."""
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
        """As nnU-Net does; of an older checkpoint's optimizer state, that of the stored connections is kept."""
        super().load_checkpoint(filename_or_checkpoint)
        for layer in self.topology_updater.layers.values():
            state = self.optimizer.state.get(layer.weight, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == layer.shape:
                    state[key] = layer.gather(value)

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net does; with the first checkpoint, the history takes the place of a former training's."""
        with one_line_errors(), self.topology_history.begun():  # before the checkpoint, which is of no use without it
            super().save_checkpoint(filename)

    def _follow_topology(self) -> TopologyHistory:
        writes = self.local_rank == 0 and not self.disable_checkpointing
        path = Path(self.output_folder) / HISTORY_FILE if writes else None
        flows = fusion_flows(self.unwrapped_network)
        history = TopologyHistory(self.topology_updater.layers, flows, path, self.importance)
        self.logger.local_logger = DSFFLogger(history, self.logger.local_logger)
        return history

    def _schedule(self) -> Schedule:
        if self.schedule is not None:
            return self.schedule
        if self.topology_update_period is None:
            return StaticSchedule()
        return CosineSchedule(self.num_epochs, self.topology_update_period, self.initial_prune_fraction)

    def on_train_start(self) -> None:
        """As nnU-Net does; the history begins, or goes on at the epoch of the checkpoint."""
        with one_line_errors():
            if self.was_initialized:  # with loaded weights, perhaps
                self._check_topology()
        super().on_train_start()
        with one_line_errors():
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
        """As nnU-Net does; then the topology is updated where the schedule says so."""
        super().on_train_epoch_start()
        with one_line_errors():
            self._update_topology()

    def _update_topology(self) -> None:
        """Update before the first iteration, so that validation and checkpoints see networks that were trained since."""
        updater = self.topology_updater
        observed = updater.needs_observation(self.current_epoch)
        if observed:
            self._observe()
        update = updater.update(self.current_epoch, self.optimizer)
        if observed:
            self.optimizer.zero_grad(set_to_none=True)  # also of trainers that add the gradients of batches up
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


def _check_role(name: str, value: Any, role: type, example: object) -> None:
    """Raises E2ENetError unless ``value``, of the setting ``name``, has the methods of a protocol, for as many arguments."""
    methods = {method: own for method, own in vars(role).items() if isfunction(own) and not method.startswith("_")}
    arguments = {method: list(signature(own).parameters)[1:] for method, own in methods.items()}
    try:
        for method, names in arguments.items():
            signature(getattr(value, method)).bind(*names)
    except (AttributeError, TypeError):
        if isclass(value):
            found, remedy = f"the class {value.__name__}", f"write {value.__name__}(), with its arguments if it takes some"
        else:
            found, remedy = repr(value), f"use one of nnunetv2_e2enet.dsff, such as {example}, or your own (docs/extending.md)"
        wanted = ", ".join(f"{method}({', '.join(names)})" for method, names in arguments.items())
        raise E2ENetError(f"{name} is {found}, but an object with {wanted} is needed: {remedy}") from None


def _on_device(values: Any, device: torch.device) -> Any:
    return [value.to(device) for value in values] if isinstance(values, list) else values.to(device)
