"""The moment of an update, and what the optimizer sees of it: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Project, batch, make, train_epochs

from nnunetv2_e2enet.dsff import CosineSchedule, GradientGrowth, InputScaledL1Norm, TopologyUpdater
from nnunetv2_e2enet.network import E2ENet, maskable_layers
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.training.variants import variant

GROWTHS = ["random", "gradient"]


class OverflowingScaler(torch.amp.GradScaler):
    """Overflows at the given steps, as half precision does."""

    def __init__(self, *overflows: int) -> None:
        super().__init__("cpu", init_scale=2.0**10)
        self.overflows, self.steps = overflows, 0

    def scale(self, outputs: Any) -> Any:
        self.steps += 1
        return super().scale(outputs) * (float("inf") if self.steps in self.overflows else 1.0)


def started(project: Project, growth: str = "random", **settings: Any) -> Any:
    torch.manual_seed(0)
    narrow = {"base_num_features": 4, "max_num_features": 8}
    settings = {"num_epochs": 6, "save_every": 1, "topology_update_period": 2, **narrow, **settings}
    trainer = make(variant(nnUNetTrainerE2ENet_smoke, "moment", **settings), project)
    if growth == "gradient":
        trainer.growth = GradientGrowth()
    trainer.initialize()
    return trainer


def masks(trainer: Any) -> list[torch.Tensor]:
    return [layer.mask.clone() for _, layer in maskable_layers(trainer.network)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_update_comes_before_the_first_iteration_of_an_epoch(in_process: Project, monkeypatch: Any) -> None:
    trainer = started(in_process)
    events: list[str] = []
    for name in ("train_step", "validation_step", "save_checkpoint"):
        original = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda *a, n=name, o=original: (events.append(n), o(*a))[1])
    update = trainer.topology_updater.update
    monkeypatch.setattr(
        trainer.topology_updater, "update", lambda *a: (r := update(*a), events.append("update") if r else None)[0]
    )
    train_epochs(trainer, 5)
    steps = ["train_step", "train_step", "validation_step", "save_checkpoint"]
    expected = [*steps, *steps, "update", *steps, *steps, "update", *steps]
    # checkpoint_best is written beside checkpoint_latest where an epoch was the best one
    collapsed = [
        event for before, event in zip([None, *events], events, strict=False) if event != before or event == "train_step"
    ]
    assert collapsed == expected


def test_checkpoints_hold_networks_that_were_trained_after_an_update(in_process: Project) -> None:
    """No connection that was just grown, with a weight of zero, is validated or saved."""
    trainer = started(in_process)
    train_epochs(trainer, 3)
    saved = torch.load(Path(trainer.output_folder) / "checkpoint_latest.pth", weights_only=False)["network_weights"]
    nonzero = active = 0
    for name, layer in maskable_layers(trainer.network):
        assert (saved[f"{name}.explored"] & ~saved[f"{name}.mask"]).any()
        kernels, gradients = (t.flatten(2).abs().sum(2) for t in (saved[f"{name}.weight"], layer.weight.grad))
        assert ((kernels > 0) | (gradients == 0))[layer.mask].all()  # of a map that nobody reads, a gradient is zero
        nonzero += int((kernels[layer.mask] > 0).sum())
        active += layer.n_active
    assert nonzero > 0.8 * active  # a third would be zero directly after the update


@pytest.mark.parametrize(
    ("growth", "stop"),  # before an update, and between two
    [
        ("random", 2),
        ("gradient", 3),
        pytest.param("gradient", 2, marks=pytest.mark.slow),
        pytest.param("random", 3, marks=pytest.mark.slow),
    ],
)
def test_resuming_at_any_epoch_gives_the_same_topologies(in_process: Project, growth: str, stop: int) -> None:
    fixed = batch()

    def train(trainer: Any, epochs: int) -> None:
        trainer.dataloader_train = iter(lambda: fixed, None)
        train_epochs(trainer, epochs, training=trainer.dataloader_train)

    straight = started(in_process, growth)
    straight.topology_history.start()
    train(straight, 5)
    expected = history_of(straight)
    interrupted = started(in_process, growth)
    interrupted.topology_history.start()  # in the same folder
    train(interrupted, stop)
    checkpoint = str(Path(interrupted.output_folder) / "checkpoint_latest.pth")
    interrupted.on_train_epoch_start()  # an update, perhaps, that a kill loses before the next checkpoint
    resumed = started(in_process, growth)
    resumed.load_checkpoint(checkpoint)
    resumed.topology_history.resume(resumed.current_epoch)
    train(resumed, 5 - stop)
    assert same(masks(straight), masks(resumed))
    assert [record.epoch for record in history_of(resumed)] == [record.epoch for record in expected] == [0, 2, 4]


def history_of(trainer: Any) -> Any:
    from nnunetv2_e2enet.dsff import HISTORY_FILE, read_history

    return read_history(Path(trainer.output_folder) / HISTORY_FILE).records


def test_no_gradient_of_an_observation_is_left(in_process: Project) -> None:
    """For trainers that add up the gradients of batches."""
    trainer = started(in_process, "gradient")
    trainer.dataloader_train = iter(batch, None)
    trainer.current_epoch = 2
    trainer.on_train_epoch_start()
    assert all(parameter.grad is None for parameter in trainer.network.parameters())


@pytest.mark.parametrize("growth", GROWTHS)
def test_an_overflow_before_an_update_does_not_change_the_topology(in_process: Project, growth: str) -> None:
    """A step that overflows is left out. The topology is that of a training in which it was not taken."""
    fixed = batch()
    results = []
    for scaler, steps in ((None, 2), (OverflowingScaler(3, 4), 4)):
        trainer = started(in_process, growth)
        trainer.grad_scaler = scaler
        trainer.dataloader_train = iter(lambda: fixed, None)
        trainer.on_train_epoch_start()
        for _ in range(steps):
            trainer.train_step(next(trainer.dataloader_train))
        weights = [layer.weight.detach().clone() for _, layer in maskable_layers(trainer.network)]
        before = masks(trainer)
        trainer.current_epoch = 2
        trainer.on_train_epoch_start()
        assert not same(before, masks(trainer))
        results.append((weights, masks(trainer)))
    (expected_weights, expected), (weights, found) = results
    for a, b in zip(expected_weights, weights, strict=True):
        torch.testing.assert_close(a, b)
    assert same(expected, found)


def test_gradient_growth_survives_a_loss_scale_that_is_too_large(in_process: Project) -> None:
    """The batch that growth observes overflows: it is tried again with a smaller scale, and nothing is ranked by NaN."""
    fixed = batch()
    results = []
    for scale in (2.0**10, 2.0**126):
        trainer = started(in_process, "gradient")
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.dataloader_train = iter(lambda: fixed, None)
        trainer.current_epoch = 2
        trainer.on_train_epoch_start()
        assert trainer.grad_scaler.get_scale() == scale  # the optimizer's scale is its own
        results.append(masks(trainer))
    assert same(*results)


def test_gradients_that_are_never_finite_end_in_one_line(in_process: Project) -> None:
    trainer = started(in_process, "gradient")
    bad = batch()
    bad["data"][:] = torch.nan
    trainer.dataloader_train = iter(lambda: bad, None)
    trainer.current_epoch = 2
    before = masks(trainer)
    with pytest.raises(SystemExit, match="8 batches in a row gave gradients that are not finite before epoch 2"):
        trainer.on_train_epoch_start()
    assert same(before, masks(trainer))


def test_gradient_growth_leaves_the_optimizer_and_clipping_as_they_are(in_process: Project, monkeypatch: Any) -> None:
    """Until the first update both growths train the same; the norm that is clipped is that of active gradients."""
    fixed = batch()
    norms: dict[str, list[float]] = {}
    clip = torch.nn.utils.clip_grad_norm_

    for growth in GROWTHS:
        norms[growth] = []
        monkeypatch.setattr(
            torch.nn.utils, "clip_grad_norm_", lambda *a, g=growth: norms[g].append(float(norm := clip(*a))) or norm
        )
        trainer = started(in_process, growth)
        trainer.dataloader_train = iter(lambda: fixed, None)
        train_epochs(trainer, 3, training=trainer.dataloader_train)
        for _, layer in maskable_layers(trainer.network):
            assert layer.weight.grad is not None
            assert (layer.weight.grad.flatten(2)[~layer.mask] == 0).all()
            assert not layer.dense_gradients
    assert norms["random"][:4] == pytest.approx(norms["gradient"][:4], rel=1e-5)
    assert len(norms["gradient"]) == 6  # no step was taken with what growth observed


def test_input_scaled_importance_does_not_depend_on_the_amplitude_of_a_map() -> None:
    """A map twice as large with kernels half as large computes the same, and is as important as before."""
    torch.manual_seed(0)
    network = E2ENet(1, 2, 3, [6, 8, 10], torch.nn.Conv3d, [[1] * 3, [1, 2, 2], [2] * 3], feature_sparsity=0.5)
    updater = TopologyUpdater(network, CosineSchedule(5, 1), importance=InputScaledL1Norm())
    x = torch.randn(2, 1, 4, 8, 8)
    node = network.decoder.stages[0][0]
    upward = node.flows["upward"]

    def scores() -> torch.Tensor:
        with updater.observation():
            network(x)
        return updater.importance.score(node.blocks[0].conv)

    before = scores()
    with torch.no_grad():
        node.upsample.weight.mul_(2)
        node.blocks[0].conv.weight[:, upward].mul_(0.5)
    torch.testing.assert_close(scores(), before, rtol=1e-4, atol=1e-6)
    expected = node.blocks[0].conv.weight.detach().flatten(2).abs().sum(2)[:, upward]
    assert not torch.allclose(before[:, upward], expected, rtol=0.2)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_input_scaled_importance_without_an_observation_says_so() -> None:
    network = E2ENet(1, 2, 2, [4, 6], torch.nn.Conv3d, [[1] * 3, [2] * 3])
    updater = TopologyUpdater(network, CosineSchedule(5, 1), importance=InputScaledL1Norm())
    with pytest.raises(Exception, match=r"run the network within TopologyUpdater\.observation"):
        updater.update(1, torch.optim.SGD(network.parameters(), 0.1))
