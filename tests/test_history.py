"""The history of the topology: the file in the fold's folder, and what goes into nnU-Net's log."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from support import Project, make, train_epochs
from torch import Tensor, nn

from nnunetv2_e2enet.dsff import (
    HISTORY_FILE,
    CosineSchedule,
    Importance,
    KernelL1Norm,
    TopologyHistory,
    TopologyRecord,
    TopologyUpdater,
    read_history,
)
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, MaskableLayer, fusion_flows, maskable_layers
from nnunetv2_e2enet.network.fusion import FusionNode
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.training.checkpoints import read_checkpoint
from nnunetv2_e2enet.training.logging import KEYS
from nnunetv2_e2enet.training.variants import variant

N_EPOCHS = 7


class Run:
    """A training of a small network without data: weights change at random between updates."""

    def __init__(self, path: Path | None, seed: int = 0, width: int = 6, importance: Importance | None = None) -> None:
        torch.manual_seed(seed)
        self.network = E2ENet(1, 2, 3, [width, 8, 10], nn.Conv3d, [[1] * 3, [1, 2, 2], [2] * 3])
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1)
        self.updater = TopologyUpdater(self.network, CosineSchedule(N_EPOCHS, 1), importance, seed=seed)
        self.history = TopologyHistory(self.updater.layers, fusion_flows(self.network), path, importance)

    def epochs(self, first: int, last: int) -> None:
        for epoch in range(first, last):
            update = self.updater.update(epoch, self.optimizer)
            if update is not None:
                self.history.add(update)
            with torch.no_grad():
                for i, layer in enumerate(self.updater.layers.values()):
                    generator = torch.Generator().manual_seed(100 * epoch + i)
                    layer.weight += torch.randn(layer.weight.shape, generator=generator)
                    layer.clear_inactive_weights()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / HISTORY_FILE


# --- flows --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("flow", ["forward", "upward", "downward"])
def test_flows_are_the_channels_through_which_a_node_sees_its_neighbours(flow: str) -> None:
    """With the connections of one flow alone, the node's output depends on that flow's map and no other."""
    network = E2ENet(1, 2, 3, [4, 6, 8], nn.Conv3d, [[1] * 3, [1, 2, 2], [2] * 3], feature_sparsity=0.0, shift_size=1)
    node = network.get_submodule("decoder.stages.0.1")
    assert isinstance(node, FusionNode)
    layer = dict(maskable_layers(network))["decoder.stages.0.1.blocks.0.conv"]
    mask = torch.zeros_like(layer.mask)
    mask[:, fusion_flows(network)["decoder.stages.0.1.blocks.0.conv"][flow]] = True
    layer.set_topology(mask)
    maps = {
        "downward": torch.randn(1, 4, 4, 8, 8),
        "forward": torch.randn(1, 6, 4, 4, 4),
        "upward": torch.randn(1, 8, 2, 2, 2),
    }  # finest level first
    before = node(list(maps.values()))
    for name, values in maps.items():
        changed = node(list({**maps, name: values + torch.randn_like(values)}.values()))
        assert torch.equal(changed, before) is (name != flow)


# --- the file -----------------------------------------------------------------------------------------------------------


def test_records_are_what_happened(path: Path) -> None:
    run = Run(path)
    run.history.start()
    layers = run.updater.layers
    start = {name: layer.mask.clone() for name, layer in layers.items()}
    survivors = dict(start)
    masks = [start]
    for epoch in range(N_EPOCHS):
        run.epochs(epoch, epoch + 1)
        masks.append({name: layer.mask.clone() for name, layer in layers.items()})
        survivors = {name: mask & masks[-1][name] for name, mask in survivors.items()}
    history = read_history(path)
    assert [record.epoch for record in history.records] == list(
        range(N_EPOCHS - 1)
    )  # the start, and before all epochs but the first and the last
    assert [part.flow for part in history.parts if part.layer == "decoder.stages.0.1.blocks.0.conv"] == [
        "forward",
        "upward",
        "downward",
    ]
    for record, topology in zip(history.records, masks[1:], strict=False):
        by_layer = active_by_layer(history.parts, record)
        assert by_layer == {name: int(mask.sum()) for name, mask in topology.items()}
        assert record.fraction == pytest.approx(
            run.updater.schedule.prune_fraction(record.epoch) if record.epoch else 0, abs=1e-6
        )
    for before, after in zip(history.records, history.records[1:], strict=False):
        changes = zip(before.active, after.pruned, after.grown, after.active, strict=True)
        assert all(a - pruned + grown == b for a, pruned, grown, b in changes)
        assert sum(after.pruned) == sum(after.grown) > 0
    last = history.records[-1]
    assert sum(last.explored) == sum(int(layer.explored.sum()) for layer in layers.values())
    # without regrown ones, which were switched off in between
    assert sum(last.survivors) <= sum(int(mask.sum()) for mask in survivors.values())
    assert 0 < sum(last.survivors) < sum(last.active)


def active_by_layer(parts: Any, record: TopologyRecord) -> dict[str, int]:
    result: dict[str, int] = {}
    for part, active in zip(parts, record.active, strict=True):
        result[part.layer] = result.get(part.layer, 0) + active
    return result


class OfActive:
    """The importance of the paper, and none where nothing is active."""

    label = KernelL1Norm.label

    def score(self, layer: MaskableLayer) -> Tensor:
        return KernelL1Norm().score(layer).masked_fill(~layer.mask, -torch.inf)


def test_an_importance_of_active_connections_alone_is_recorded(path: Path) -> None:
    histories = []
    for importance in (KernelL1Norm(), OfActive()):
        run = Run(path, importance=importance)
        run.history.start()
        run.epochs(0, N_EPOCHS)
        histories.append(read_history(path))
    assert histories[0] == histories[1]


class Unranked:
    def score(self, layer: MaskableLayer) -> Tensor:
        return KernelL1Norm().score(layer).log().masked_fill(layer.mask, -torch.inf)


def test_a_history_that_begins_with_scores_that_cannot_be_ranked_names_the_criterion(path: Path) -> None:
    with pytest.raises(E2ENetError, match=r"^Unranked gives active connections of .* scores that are not finite"):
        Run(path, importance=Unranked()).history.start()


def test_threshold_and_importance_are_those_of_the_kernels(path: Path) -> None:
    run = Run(path)
    run.history.start()
    name, layer = next(iter(run.updater.layers.items()))
    with torch.no_grad():
        layer.weight.copy_(run.updater.layers[name].over_kernel(layer.mask) * torch.ones_like(layer.weight))
        one = layer.mask.nonzero()[0]
        layer.weight[tuple(one)] = 0.5
    kernel = layer.weights_per_connection
    update = run.updater.update(1, run.optimizer)
    assert update is not None
    run.history.add(update)
    record = read_history(path).records[-1]
    assert record.threshold[0] == kernel  # half of the active ones are pruned, the small one first
    assert record.importance[0] == kernel


def test_resumed_history_is_that_of_an_uninterrupted_training(path: Path, tmp_path: Path) -> None:
    straight = Run(path)
    straight.history.start()
    straight.epochs(0, N_EPOCHS)
    expected = path.read_bytes()

    other = tmp_path / "other.jsonl"
    first = Run(other)
    first.history.start()
    first.epochs(0, 3)
    saved = {key: value.clone() for key, value in first.network.state_dict().items()}
    born = {name: values.clone() for name, values in first.history.born.items()}
    first.epochs(3, 5)  # lost with the checkpoint
    with other.open("ab") as file:
        file.write(b'{"epoch":6,"fraction":0.0')  # a crash tears the last line off
    assert len(read_history(other).records) == 5

    second = Run(other, seed=0)
    second.network.load_state_dict(saved)
    second.history.born = born
    second.history.resume(3)
    assert [record.epoch for record in read_history(other).records] == [0, 1, 2]
    second.epochs(3, N_EPOCHS)
    assert other.read_bytes() == expected


def test_a_former_history_stays_until_there_is_a_checkpoint(in_process: Project) -> None:
    """A start by mistake, or without checkpoints, leaves the checkpoints of a finished training, and its history."""
    files = []
    for disabled in (False, True, False):
        trainer = make(variant(nnUNetTrainerE2ENet_smoke, "again", save_every=1, topology_update_period=1), in_process)
        trainer.disable_checkpointing = disabled
        trainer.initialize()
        trainer.topology_history.start()
        path = Path(trainer.output_folder) / HISTORY_FILE
        before = path.read_bytes() if files else None
        assert path.is_file() is bool(files)
        train_epochs(trainer, 2)
        files.append(path.read_bytes())
        assert [record.epoch for record in read_history(path).records] == [0, 1]
        if disabled:
            assert files[-1] == before
    assert files[0] == files[1] != files[2]


def test_a_checkpoint_that_fails_leaves_the_former_history(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for attempt in ("first", "second"):
        trainer = make(variant(nnUNetTrainerE2ENet_smoke, "full", save_every=1), in_process)
        trainer.initialize()
        trainer.topology_history.start()
        path = Path(trainer.output_folder) / HISTORY_FILE
        if attempt == "first":
            train_epochs(trainer, 1)
            former = path.read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="former checkpoints are intact"):
        train_epochs(trainer, 1)
    assert path.read_bytes() == former


@pytest.mark.parametrize("former", [b"of a former training\n", None])
def test_a_beginning_is_taken_back_where_what_follows_fails(path: Path, former: bytes | None) -> None:
    if former is not None:
        path.write_bytes(former)
    run = Run(path)
    run.history.start()

    def interrupted() -> None:
        with run.history.begun():
            assert [record.epoch for record in read_history(path).records] == [0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_bytes() if path.is_file() else None) == former
    run.epochs(0, 2)
    assert [record.epoch for record in read_history(path).records] == [0, 1]


def test_an_update_that_changed_nothing_is_recorded_once(path: Path) -> None:
    """A checkpoint is written before the update of its epoch, which is made again when a training goes on."""
    straight = Run(path)
    straight.history.start()
    straight.epochs(0, 3)
    last = read_history(path).records[-1]
    history = read_history(path)
    without_changes = replace(history, records=(*history.records[:-1], replace(last, grown=[0] * len(last.grown))))
    assert [record.epoch for record in without_changes.up_to(2)] == [0, 1]
    assert [record.epoch for record in without_changes.up_to(0)] == [0]


def test_history_that_is_missing_begins_where_the_training_goes_on(path: Path) -> None:
    run = Run(path)
    run.history.resume(4)
    run.epochs(4, 6)
    assert [record.epoch for record in read_history(path).records] == [4, 4, 5]


def test_damaged_and_foreign_histories_are_named(path: Path, tmp_path: Path) -> None:
    run = Run(path)
    run.history.start()
    run.epochs(0, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    for content in (b"", b"not JSON\n", lines[0] + b"{}\n", lines[0] + b"\0\0\0\n" + lines[2]):
        path.write_bytes(content)
        with pytest.raises(E2ENetError, match="cannot be read as a topology history"):
            run.history.resume(2)
        assert path.read_bytes() == content
    path.write_bytes(lines[0].replace(b'"format":2', b'"format":1'))
    with pytest.raises(E2ENetError, match=r"has format 1, expected 2: read it with the release that wrote it$"):
        run.history.resume(2)
    path.write_bytes(b"".join(lines))
    with pytest.raises(E2ENetError, match="another network"):
        Run(path, width=7).history.resume(2)
    nowhere = Run(tmp_path / "missing" / "file").history
    nowhere.start()
    with pytest.raises(E2ENetError, match="could not be written"), nowhere.begun():
        pass


# --- the trainer --------------------------------------------------------------------------------------------------------


def test_training_writes_its_history(trained: Path) -> None:
    history = read_history(trained / "fold_0" / HISTORY_FILE)
    assert [record.epoch for record in history.records] == [0, 1]
    final = read_checkpoint(trained / "fold_0" / "checkpoint_final.pth")["network_weights"]
    last = active_by_layer(history.parts, history.records[-1])
    assert last == {name: int(final[f"{name}.mask"].sum()) for name in last}
    assert last.keys() == {key.removesuffix(".mask") for key in final if key.endswith(".mask")}


def test_checkpointed_log_has_dsffs_values(trained: Path) -> None:
    logged = read_checkpoint(trained / "fold_0" / "checkpoint_final.pth")["logging"]
    history = read_history(trained / "fold_0" / HISTORY_FILE)
    assert logged["dsff_sparsity"][:3] == pytest.approx([0.8] * 3, abs=1e-3)
    assert logged["dsff_prune_fraction"][:4] == [0.5, 0.25, 0.0, None]
    assert logged["dsff_connections_changed"][:3] == [0, sum(history.records[1].grown), 0]
    connections = sum(part.connections for part in history.parts)
    assert logged["dsff_explored"][2] == pytest.approx(sum(history.records[-1].explored) / connections)
    assert max(int(born.max()) for born in logged["dsff_born"] if born is not None) == 1


def test_progress_plot_is_that_of_stock_nnunet(trained: Path, tmp_path: Path) -> None:
    """Of all epochs: nnU-Net draws as many as every list of the log has, DSFF's among them."""
    log = read_checkpoint(trained / "fold_0" / "checkpoint_final.pth")["logging"]
    stock = nnunet_logger.LocalLogger()
    stock.load_checkpoint({key: values for key, values in log.items() if not key.startswith("dsff_")})
    assert len(log["train_losses"]) == 3
    with matplotlib.rc_context():
        matplotlib.rc_file_defaults()  # as in the process that trained
        stock.plot_progress_png(str(tmp_path))
    found, expected = (matplotlib.image.imread(folder / "progress.png") for folder in (trained / "fold_0", tmp_path))
    assert np.array_equal(found, expected)


def test_stock_trainer_goes_on_from_the_checkpoint(in_process: Project, trained: Path, monkeypatch: Any) -> None:
    """Its log and progress plot are whole; back in ours, what was logged before is still there."""
    checkpoint = trained / "fold_0" / "checkpoint_final.pth"
    plans = load_json(str(trained / "plans.json"))
    stock = make(variant(nnUNetTrainer, "short", num_epochs=5, save_every=1), in_process, plans)
    stock.initialize()
    stock.load_checkpoint(str(checkpoint))
    drawn = []
    monkeypatch.setattr(stock.logger.local_logger, "plot_progress_png", lambda _: drawn.append(lengths(stock)))
    train_epochs(stock, 2)
    assert drawn == [4, 5]
    ours = make(variant(nnUNetTrainerE2ENet_smoke, "longer", num_epochs=8), in_process)
    ours.initialize()
    ours.load_checkpoint(str(Path(stock.output_folder) / "checkpoint_latest.pth"))
    train_epochs(ours, 1)
    values = ours.logger.get_value("dsff_prune_fraction", None)
    assert values[:4] == [0.5, 0.25, 0.0, None]
    assert len(values) == ours.current_epoch


def lengths(trainer: Any) -> int:
    """How many epochs nnU-Net's plot shows."""
    return min(len(values) for values in trainer.logger.local_logger.my_fantastic_logging.values())


def test_checkpoint_from_before_there_was_a_history(in_process: Project, trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "fold_0" / "checkpoint_final.pth", weights_only=False)
    content["logging"] = {key: values for key, values in content["logging"].items() if not key.startswith("dsff_")}
    torch.save(content, tmp_path / "checkpoint.pth")
    trainer = make(variant(nnUNetTrainerE2ENet_smoke, "older", num_epochs=6), in_process)
    trainer.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    trainer.topology_history.resume(trainer.current_epoch)
    train_epochs(trainer, 1)
    assert [record.epoch for record in read_history(Path(trainer.output_folder) / HISTORY_FILE).records] == [3, 3]
    assert trainer.logger.get_value("dsff_prune_fraction", None)[:3] == [None] * 3


class WeightsAndBiases:
    """What nnU-Net calls of the ``wandb`` module."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.step = 0
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def init(self, **_: Any) -> "WeightsAndBiases":
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))


def test_weights_and_biases_gets_dsffs_values(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    service = WeightsAndBiases()
    monkeypatch.setattr(nnunet_logger, "wandb", service)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    trainer = make(variant(nnUNetTrainerE2ENet_smoke, "watched"), in_process)
    trainer.initialize()
    trainer.topology_history.start()
    train_epochs(trainer, 2)
    for key in KEYS:
        steps = {step: values[key] for step, values in service.logged if key in values}
        assert steps == dict(enumerate(trainer.logger.get_value(key, None)))
        assert sorted(steps) == [0, 1]
    assert any("train_losses" in values for _, values in service.logged)


def test_a_record_for_the_papers_network_is_small_and_complete(path: Path) -> None:
    """docs/topology.md says about 2 KB an update for the network of the AMOS plan, however many its connections are."""
    features = [48, 96, 192, 320, 320, 320]
    network = E2ENet(1, 16, 6, features, nn.Conv3d, [[1] * 3, [1, 2, 2], *[[2] * 3] * 4])
    updater = TopologyUpdater(network, CosineSchedule(1000))
    history = TopologyHistory(updater.layers, fusion_flows(network), path)
    history.start()
    update = updater.update(5, torch.optim.SGD(network.parameters(), 0.01))
    assert update is not None
    history.add(update)
    read = read_history(path)
    record = read.records[-1]
    assert active_by_layer(read.parts, record) == {name: layer.n_active for name, layer in updater.layers.items()}
    assert sum(record.grown) == update.replaced > 0
    assert sum(record.explored) == sum(int(layer.explored.sum()) for layer in updater.layers.values())
    connections = sum(layer.n_connections for layer in updater.layers.values())
    assert len(path.read_bytes().splitlines()[-1]) < 2500 < connections / 500
