"""The examples of docs/extending.md: each is a file of at most 30 lines that trains, resumes, predicts and is looked at."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from support import Project, make, train_epochs

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.dsff import HISTORY_FILE, read_history
from nnunetv2_e2enet.evaluation.topology.sources import read_topologies
from nnunetv2_e2enet.network import MaskableLayer, fusion_flows, maskable_layers
from nnunetv2_e2enet.settings import override
from nnunetv2_e2enet.training.variants import variant

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = {
    "largest_weight": "nnUNetTrainerE2ENet_largestWeight",
    "balanced_growth": "nnUNetTrainerE2ENet_balanced",
    "two_flows": "nnUNetTrainerE2ENet_twoFlows",
    "pooled_backbone": "nnUNetTrainerE2ENet_pooled",
}
SMALL = {"num_epochs": 4, "save_every": 1, "topology_update_period": 1, "base_num_features": 8, "max_num_features": 16}


def example(module: str) -> Any:
    return getattr(importlib.import_module(module), EXAMPLES[module])


def start(module: str, project: Project, **settings: Any) -> Any:
    trainer = make(variant(example(module), "small", **{**SMALL, **settings}), project)
    trainer.initialize()
    return trainer


def masks(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: layer.mask.clone() for name, layer in maskable_layers(trainer.unwrapped_network)}


def test_the_page_shows_every_example_as_it_is() -> None:
    page = (DOCS / "extending.md").read_text()
    assert sorted(path.stem for path in (DOCS / "examples").glob("*.py")) == sorted(EXAMPLES)
    for name, trainer in EXAMPLES.items():
        code = (DOCS / "examples" / f"{name}.py").read_text()
        assert f"```python\n{code}```" in page
        assert f"-tr {trainer}" in page
        assert len(code.splitlines()) <= 30


@pytest.mark.parametrize("module", EXAMPLES)
def test_an_example_trains_resumes_and_predicts(in_process: Project, module: str) -> None:
    trainer = start(module, in_process)
    trainer.topology_history.start()
    train_epochs(trainer, 2)
    checkpoint = Path(trainer.output_folder) / "checkpoint_latest.pth"
    resumed = start(module, in_process)
    resumed.load_checkpoint(str(checkpoint))
    for one in (trainer, resumed):
        one.on_train_epoch_start()
    before, after = masks(trainer), masks(resumed)
    assert all(torch.equal(mask, after[name]) for name, mask in before.items())
    assert all(layer.n_active == round(0.2 * layer.n_connections) for _, layer in maskable_layers(resumed.network))

    # prediction knows nothing but the plans and the weights
    manager = PlansManager(trainer.plans_manager.plans)
    network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, 5, False)
    network.load_state_dict(trainer.network.state_dict())
    trainer.set_deep_supervision_enabled(False)
    x = torch.randn(1, 1, 24, 64, 64)
    with torch.no_grad(), override(engine="on"):
        predicted = network.eval()(x)
    steps_aside = module in ("two_flows", "pooled_backbone")
    assert (engine.why_pytorch(network) is not None) is steps_aside
    with torch.no_grad(), engine.disabled():
        torch.testing.assert_close(predicted, trainer.network.eval()(x), atol=1e-3, rtol=1e-3)


def test_the_criterion_decides_what_is_pruned(in_process: Project) -> None:
    trainer = start("largest_weight", in_process)
    train_epochs(trainer, 1)
    trainer.current_epoch = 1
    (_, layer), *_ = maskable_layers(trainer.network)
    largest = layer.weight.detach().flatten(2).abs().amax(2)
    before = layer.mask.clone()
    trainer.on_train_epoch_start()
    pruned = before & ~layer.mask
    assert pruned.any()
    assert largest[pruned].max() <= largest[before & layer.mask].min()


def test_the_criterion_is_named_where_topologies_are_shown(in_process: Project, tmp_path: Path) -> None:
    trainer = start("largest_weight", in_process)
    trainer.topology_history.start()
    train_epochs(trainer, 3)
    folder = Path(trainer.output_folder)
    history = read_history(folder / HISTORY_FILE)
    assert history.importance == "largest weight of the kernel"
    assert all(isinstance(value, float) for record in history.records for value in record.importance)
    assert main(["topology", str(folder), "--report", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "largest weight of the kernel" in page


def test_growth_balances_the_output_maps(in_process: Project) -> None:
    def spread(module: str | None) -> float:
        """Of the number of active connections of an output map, mean over layers."""
        trainer = start(module or "largest_weight", in_process, num_epochs=20)
        for epoch in range(1, 8):
            trainer.topology_updater.update(epoch, trainer.optimizer)
        layers: list[MaskableLayer] = [layer for _, layer in maskable_layers(trainer.network)]
        return sum(float(layer.mask.sum(layer.input_axis).float().std()) for layer in layers) / len(layers)

    assert spread("balanced_growth") < 0.8 * spread(None)


def test_the_wiring_has_no_downward_flow(in_process: Project, tmp_path: Path) -> None:
    trainer = start("two_flows", in_process)
    flows = fusion_flows(trainer.network)
    assert flows
    assert all(list(of_node) == ["forward", "upward"] for of_node in flows.values())
    trainer.topology_history.start()
    train_epochs(trainer, 3)  # with two updates
    (fold,) = read_topologies(Path(trainer.output_folder))
    written, shown = read_history(Path(trainer.output_folder) / HISTORY_FILE), fold.history
    assert fold.why_no_history == ""
    assert {part.layer: part.connections for part in shown.parts} == {
        name: layer.n_connections for name, layer in maskable_layers(trainer.network)
    }
    assert len(shown.records) == len(written.records) == 3
    for whole, divided in zip(shown.records, written.records, strict=True):
        assert [sum(values) for values in (whole.active, whole.grown, whole.survivors)] == [
            sum(values) for values in (divided.active, divided.grown, divided.survivors)
        ]
        assert min(divided.importance) <= min(whole.importance) <= max(whole.importance) <= max(divided.importance)
    assert main(["topology", trainer.output_folder, "--report", str(tmp_path / "page.html")]) == 0
    assert "its fusion nodes and flows are not known" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("module", ["two_flows", "pooled_backbone"])
def test_export_says_what_it_cannot_hold(in_process: Project, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = start(module, in_process)
    trainer.on_train_start()
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        loader._finish()
    train_epochs(trainer, 1)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = str(Path(trainer.output_folder).parent)
    assert main(["export", folder, str(Path(folder) / "model.e2enet"), "-f", "0"]) == 1
    assert "E2ENet's own encoder and decoder only" in " ".join(capsys.readouterr().err.split())


def test_a_class_that_prediction_could_not_import_is_refused(in_process: Project) -> None:
    class Local(torch.nn.Module):
        pass

    trainer = make(variant(example("two_flows"), "local", **SMALL, decoder_class=Local), in_process)
    with pytest.raises(SystemExit, match=r"decoder_class is .*Local.*cannot be imported"):
        trainer.initialize()
