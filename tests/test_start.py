"""The start of a training: every active connection has He normal weights, whatever drew the topology."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from support import Project, make, train_epochs

from nnunetv2_e2enet.network import maskable_layers
from nnunetv2_e2enet.registration import EXPERIMENTS, MODULES, TRAINER_MODULE, load_classes
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.training.dsff import DSFFMixin
from nnunetv2_e2enet.training.trainer import E2ENetMixin
from nnunetv2_e2enet.training.variants import variant

FOUND = load_classes([*MODULES[TRAINER_MODULE], EXPERIMENTS]).found
TRAINERS = {name: cls for name, cls in FOUND.items() if issubclass(cls, DSFFMixin)}
NARROW = {"base_num_features": 16, "max_num_features": 64}  # some layers have thousands of connections all the same


def initialized(cls: Any, project: Project, **settings: Any) -> Any:
    narrow = NARROW if issubclass(cls, E2ENetMixin) else {}
    trainer = make(variant(cls, "start", **narrow, **settings), project)
    trainer.initialize()
    return trainer


def he_deviation(shape: torch.Size) -> float:
    """Of He et al. (ICCV 2015) for a leaky ReLU of slope 0.01, of the dense layer as PyTorch counts its inputs."""
    return math.sqrt(2 / (1 + 0.01**2) / shape[1:].numel())


@pytest.mark.parametrize("name", TRAINERS)
def test_every_active_connection_starts_with_he_normal_weights(in_process: Project, name: str) -> None:
    torch.manual_seed(0)
    large = 0
    trainer = initialized(TRAINERS[name], in_process)
    for layer_name, layer in maskable_layers(trainer.unwrapped_network):
        weights = layer.masked_weight().detach().flatten(2)
        assert torch.equal((weights != 0).any(2), layer.mask), layer_name
        if layer.n_active > 1000:
            large += 1
            active = weights[layer.mask]
            expected = trainer.initial_gain * he_deviation(layer.shape)
            assert float(active.std()) == pytest.approx(expected, rel=0.05), layer_name
            assert abs(float(active.mean())) < 0.05 * expected
    assert large


def test_all_trainers_but_the_demonstration_start_as_the_method_says(in_process: Project) -> None:
    gains = {name: make(cls, in_process).initial_gain for name, cls in TRAINERS.items()}
    assert {name for name, gain in gains.items() if gain != 1} == {"nnUNetTrainerE2ENet_demo"}


def test_the_gain_multiplies_maskable_weights_alone(in_process: Project) -> None:
    found = []
    for gain in (1.0, 0.5):
        torch.manual_seed(0)
        trainer = initialized(nnUNetTrainerE2ENet_smoke, in_process, initial_gain=gain)
        found.append((dict(trainer.network.named_parameters()), dict(maskable_layers(trainer.network))))
    (whole, layers), (half, _) = found
    for name, weight in whole.items():
        masked = name.removesuffix(".weight") in layers
        torch.testing.assert_close(half[name], weight * (0.5 if masked else 1.0))


def test_pretrained_weights_are_what_was_trained(in_process: Project, trained: Any) -> None:
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
    trainer.initialize()
    checkpoint = trained / "fold_0" / "checkpoint_final.pth"
    load_pretrained_weights(trainer.network, str(checkpoint))
    given = torch.load(checkpoint, weights_only=False)["network_weights"]
    for name, layer in maskable_layers(trainer.network):
        assert torch.equal(layer.weight, given[f"{name}.weight"])
        assert torch.equal(layer.mask, given[f"{name}.mask"])


@pytest.mark.parametrize("cooperative", [False, True])
def test_an_optimizer_of_the_users_trains_prepared_weights(in_process: Project, cooperative: bool) -> None:
    class OwnOptimizer(nnUNetTrainerE2ENet_smoke):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            if cooperative:
                super().configure_optimizers()
            optimizer = torch.optim.AdamW(self.network.parameters(), 1e-3)
            return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)

    trainer = initialized(OwnOptimizer, in_process)
    assert type(trainer.optimizer) is torch.optim.AdamW
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for _, layer in maskable_layers(trainer.network):
        assert id(layer.weight) in held
        assert torch.equal((layer.weight.flatten(2) != 0).any(2), layer.mask)
    train_epochs(trainer, 1)
    assert all((layer.weight.flatten(2)[~layer.mask] == 0).all() for _, layer in maskable_layers(trainer.network))
