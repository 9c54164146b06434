"""``e2enet topology``: what it says of trainings of which the truth is known."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from support import Hostile, Project, make, train_epochs

from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.dsff import HISTORY_FILE
from nnunetv2_e2enet.evaluation.topology import figures
from nnunetv2_e2enet.evaluation.topology.figures import VIEWS, views
from nnunetv2_e2enet.evaluation.topology.measures import agreements, depth_groups, update_epochs
from nnunetv2_e2enet.evaluation.topology.sources import read_topologies
from nnunetv2_e2enet.trainers.e2enet_experiment_trainers import nnUNetTrainerDSFF
from nnunetv2_e2enet.training.variants import variant

NODE = "decoder.stages.0.1.blocks.0.conv"
CHECKPOINT = "checkpoint_final.pth"
NO_HISTORY = {"evolution", "survival", "agreement"}
"""Views that a single checkpoint cannot show."""


@pytest.fixture
def numbers(trained: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Of both folds."""
    assert main(["topology", str(trained), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def state(trained: Path, fold: int) -> dict[str, torch.Tensor]:
    return torch.load(trained / f"fold_{fold}" / CHECKPOINT, weights_only=False)["network_weights"]


def architecture(content: dict[str, Any]) -> dict[str, Any]:
    return architecture_of(content["init_args"]["plans"])


def architecture_of(plans: dict[str, Any]) -> dict[str, Any]:
    return plans["configurations"]["3d_fullres"]["architecture"]


# --- numbers ------------------------------------------------------------------------------------------------------------


def test_shares_are_those_of_the_masks(trained: Path, numbers: dict[str, Any]) -> None:
    for index, fold in enumerate(numbers["folds"]):
        masks = state(trained, index)
        assert [node["epochs"] for node in fold["nodes"]] == [[0, 1]] * len(fold["nodes"])
        for node in fold["nodes"]:
            flows = node["flows"]
            mask = masks[f"{node['layer']}.mask"]
            channels = node["channels"]
            last = {flow: values["active"][-1] for flow, values in flows.items()}
            assert last["forward"] == int(mask[:, :channels].sum())
            assert last["upward"] == int(mask[:, channels : 2 * channels].sum())
            assert last.get("downward", 0) == int(mask[:, 2 * channels :].sum())
            assert ("downward" in flows) is (node["level"] > 0)
            for moment in range(2):
                assert sum(values["share"][moment] for values in flows.values()) == pytest.approx(1)
        levels = max(node["level"] for node in fold["nodes"]) + 2
        assert len(fold["nodes"]) == levels * (levels - 1) // 2


def test_agreement_is_the_overlap_of_the_masks(trained: Path, numbers: dict[str, Any]) -> None:
    first, second = state(trained, 0), state(trained, 1)
    by_flow = {item["kind"]: item for item in numbers["agreement"]}
    names = [key for key in first if key.endswith("upsample.mask")]
    both = sum(int((first[name] & second[name]).sum()) for name in names)
    active = sum(int(first[name].sum()) for name in names)
    assert by_flow["upsampling"]["overlap"] == pytest.approx(both / active)
    chance = sum(int(first[name].sum()) ** 2 / first[name].numel() for name in names)
    assert by_flow["upsampling"]["chance"] == pytest.approx(chance / active)
    assert by_flow["upsampling"]["chance"] == pytest.approx(0.2, abs=0.01)
    assert list(by_flow) == ["forward", "upward", "downward", "upsampling", "second block"]
    nodes = {f"{node['layer']}.mask": node["channels"] for node in numbers["folds"][0]["nodes"]}
    forward = [(first[name][:, :channels], second[name][:, :channels]) for name, channels in nodes.items()]
    both = sum(int((a & b).sum()) for a, b in forward)
    active = sum(int(a.sum() + b.sum()) for a, b in forward) / 2
    assert by_flow["forward"]["overlap"] == pytest.approx(both / active)


def test_every_active_connection_was_switched_on_at_one_moment(numbers: dict[str, Any]) -> None:
    for fold in numbers["folds"]:
        records = fold["history"]["records"]
        began = [sum(records[0]["active"]), *(sum(record["grown"]) for record in records[1:])]
        cohorts = [fold["cohorts"][str(record["epoch"])] for record in records]
        living = [n * share for n, share in zip(began, cohorts, strict=True)]
        assert sum(living) == pytest.approx(sum(records[-1]["active"]))
        assert living[0] == pytest.approx(sum(records[-1]["survivors"]))
        for shares in fold["survival"].values():
            assert shares[0] == 1
            assert shares == sorted(shares, reverse=True)
            assert 0 < shares[-1] < 1


def test_importance_of_depth_groups(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels from the maps that are moved up weigh double, and half of those that are moved down are off."""
    weight, mask = (state(trained, 0)[f"{NODE}.{key}"].clone() for key in ("weight", "mask"))
    before, _, after = torch.tensor_split(torch.arange(mask.shape[1]), 3)
    mask[:] = True
    weight.fill_(1.0)
    weight[:, before] = 2.0
    mask[::2, after] = False
    file = tmp_path / "checkpoint.pth"
    content = torch.load(trained / "fold_0" / CHECKPOINT, weights_only=False)
    content["network_weights"] |= {f"{NODE}.weight": weight, f"{NODE}.mask": mask}
    torch.save(content, file)
    assert main(["topology", str(file), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["folds"][0]["depth_groups"]
    found = {group["offset"]: group for group in groups if (group["stage"], group["level"]) == (1, 1)}
    assert found[-1]["norm"] == pytest.approx(2 * found[0]["norm"]) == pytest.approx(2 * found[1]["norm"])
    assert [found[offset]["density"] for offset in (-1, 0, 1)] == [1, 1, 0.5]


def test_depth_groups_of_a_learned_shift(trained: Path, tmp_path: Path) -> None:
    """They are those of the offsets that were learned, in whole slices."""
    content = torch.load(trained / "fold_0" / CHECKPOINT, weights_only=False)
    arguments = architecture(content)["arch_kwargs"]
    arguments["learned_shift"] = True
    weights = content["network_weights"]
    convs = [key for key in weights if key.endswith(".conv.weight")]
    weights |= {key.replace("conv.weight", "shift.offsets"): torch.zeros(weights[key].shape[1]) for key in convs}
    offsets = weights[NODE.replace("conv", "shift.offsets")]
    offsets[0], offsets[1:3] = -2.4, 1.6
    torch.save(content, tmp_path / "learned.pth")
    (fold,) = read_topologies(tmp_path / "learned.pth")
    groups = depth_groups(fold).set_index(["stage", "level", "offset"])
    found = groups.loc[(1, 1), "density"].to_dict()
    mask = weights[f"{NODE}.mask"].float()
    assert found == pytest.approx({-2: float(mask[:, 0].mean()), 0: float(mask[:, 3:].mean()), 2: float(mask[:, 1:3].mean())})
    assert next(view for view in views([fold]) if view.key == "depth").figure is not None


# --- what is there and what is not ----------------------------------------------------------------------------------------


def test_a_checkpoint_alone(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What somebody sends: it has a topology and a log, and the page says what it does not have."""
    file = Path(shutil.copy(trained / "fold_0" / CHECKPOINT, tmp_path / "model.pth"))
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    assert main(["topology", str(file), "--report", str(page), "--figures", str(figures)]) == 0
    assert "model: no history, a checkpoint alone does not hold the history" in capsys.readouterr().out
    shown = set(VIEWS) - NO_HISTORY
    assert {path.name for path in figures.iterdir()} == {f"{key}.{kind}" for key in shown for kind in ("png", "svg")}
    for path in figures.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in figures.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    text = page.read_text()
    for key, (title, *_) in VIEWS.items():
        part = text[text.index(f"<h3>{title}") :].split("</figure>")[0]
        assert ("<svg" in part) is (key not in NO_HISTORY)
        assert ("Not shown: " in part) is (key in NO_HISTORY)


def test_dsff_in_another_network(in_process: Project, tmp_path: Path) -> None:
    """What does not need fusion nodes is shown all the same; nnU-Net's networks hold layers under several names."""
    plans = in_process.plans()
    features = architecture_of(plans)["arch_kwargs"]["features_per_stage"]
    features[:] = [8] * len(features)
    for fold in range(2):
        settings = {"num_epochs": 4, "save_every": 3, "topology_update_period": 1, "topology_seed": fold}
        trainer = make(variant(nnUNetTrainerDSFF, "short", **settings), in_process, plans)
        trainer.initialize()
        trainer.topology_history.start()
        train_epochs(trainer, 3)
        shutil.move(trainer.output_folder, tmp_path / f"fold_{fold}")
    folds = read_topologies(tmp_path)
    assert [fold.why_no_history for fold in folds] == ["", ""]
    shown = {view.key for view in views(folds) if view.figure is not None}
    assert shown == {"change", "survival", "agreement", "losses"}
    updates = figures.change(folds).axes[0].collections[0].get_segments()
    assert [line[0][0] for line in updates] == update_epochs(folds[0]) == [1, 2]  # as the history and the losses have them
    (agreement,) = agreements(folds).itertuples()
    assert agreement.kind == "all layers"
    layers = list(zip(*(fold.connections.layers.values() for fold in folds), strict=True))
    active = sum(first.n_active for first, _ in layers)
    assert agreement.overlap == pytest.approx(sum(int((a.mask & b.mask).sum()) for a, b in layers) / active)
    assert agreement.chance == pytest.approx(sum(a.n_active * b.n_active / a.n_connections for a, b in layers) / active)
    assert agreement.chance == pytest.approx(0.2, abs=0.01)
    assert main(["topology", str(tmp_path), "--report", str(tmp_path / "page.html")]) == 0
    assert "this network is not E2ENet" in (tmp_path / "page.html").read_text()


def test_history_of_another_training_is_not_shown(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "fold_0"
    folder.mkdir()
    shutil.copy(trained / "fold_0" / CHECKPOINT, folder)
    assert main(["topology", str(folder)]) == 0
    assert f"{HISTORY_FILE} is not there" in capsys.readouterr().out
    shutil.copy(trained / "fold_1" / HISTORY_FILE, folder)
    assert main(["topology", str(folder)]) == 0
    assert "is not the history of the checkpoint beside it" in capsys.readouterr().out
    shutil.copy(trained / "fold_0" / HISTORY_FILE, folder)
    assert main(["topology", str(folder)]) == 0
    assert "no history" not in capsys.readouterr().out


def test_of_an_unfinished_training_the_history_goes_as_far_as_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fold_0"
    folder.mkdir()
    shutil.copy(trained / "fold_0" / CHECKPOINT, folder / "checkpoint_latest.pth")
    history = (trained / "fold_0" / HISTORY_FILE).read_text().splitlines(keepends=True)
    later = history[-1].replace('{"epoch":1', '{"epoch":4')
    (folder / HISTORY_FILE).write_text("".join(history) + later)
    (fold,) = read_topologies(folder)
    assert fold.has_history
    assert [record.epoch for record in fold.history.records] == [0, 1]


def test_a_history_that_begins_before_an_update_of_the_same_epoch(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a training was resumed and its history was missing."""
    folder = tmp_path / "fold_0"
    shutil.copytree(trained / "fold_0", folder)
    history = (folder / HISTORY_FILE).read_text()
    (folder / HISTORY_FILE).write_text(history.replace('{"epoch":0', '{"epoch":1'))
    numbers = []
    for path in (folder, trained / "fold_0"):
        assert main(["topology", str(path), "--report", str(tmp_path / "page.html"), "--json"]) == 0
        numbers.append(json.loads(capsys.readouterr().out)["folds"][0]["nodes"])
    late, early = numbers
    assert [node["epochs"] for node in late] == [[1, 1]] * len(late)
    assert [node["flows"] for node in late] == [node["flows"] for node in early]


def test_nothing_that_can_be_looked_at(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(trained / "fold_0" / CHECKPOINT, weights_only=False)
    weights = content["network_weights"]
    torch.save({"weights": 1}, tmp_path / "other.pth")
    torch.save({**content, "network_weights": {f"module.{key}": v for key, v in weights.items()}}, tmp_path / "renamed.pth")
    content["network_weights"] = {key: values for key, values in weights.items() if not key.endswith(("mask", "explored"))}
    torch.save(content, tmp_path / "maskless.pth")
    architecture(content)["network_class_name"] = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    torch.save(content, tmp_path / "stock.pth")
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "is not there"),
        ([str(tmp_path)], "has no checkpoint in any fold_"),
        ([str(trained), "--folds", "0", "3"], "has no checkpoint in fold_3"),
        ([str(tmp_path / "other.pth")], "not a checkpoint of an nnU-Net training"),
        ([str(tmp_path / "renamed.pth")], "has no connections of decoder.stages.0.0"),
        ([str(tmp_path / "maskless.pth")], "has no connections of decoder.stages.0.0"),
        ([str(tmp_path / "stock.pth")], "of a network without DSFF"),
        ([str(trained), "--report", str(tmp_path / "missing" / "page.html")], "is missing"),
        ([str(trained), "--json", str(tmp_path)], "it is a folder; name a file"),
        ([str(trained / "fold_0"), "--folds", "3"], "fold_0 is one training: leave --folds out"),
        ([str(trained / "fold_0" / CHECKPOINT), "--folds", "0"], "is one training: leave --folds out"),
    ):
        assert main(["topology", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("e2enet topology: ")
        assert message in error
        assert error.count("\n") == 1


def test_nothing_of_a_checkpoint_is_executed_or_imported(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "fold_0" / CHECKPOINT, weights_only=False)
    torch.save({**content, "extra": Hostile(tmp_path / "executed")}, tmp_path / "hostile.pth")
    assert main(["topology", str(tmp_path / "hostile.pth")]) == 1
    architecture(content)["arch_kwargs"]["norm_op"] = "antigravity.geohash"
    torch.save(content, tmp_path / "odd.pth")
    assert main(["topology", str(tmp_path / "odd.pth")]) == 0  # the name was not looked at
    assert not (tmp_path / "executed").exists()


# --- figures and page -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, _tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.ids.update([values["id"]] if values.get("id") else [])
        self.links += [str(values[name]) for name in ("src", "href", "xlink:href") if name in values]


def test_page_through_the_command(project: Project, trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = project.run("e2enet", "topology", str(trained), "--report", str(page), "--json", str(tmp_path / "numbers.json"))
    assert "Active connections of each node, by direction" in result.stdout
    assert load_json(str(tmp_path / "numbers.json"))["format"] == 1
    text = page.read_text()
    parsed = Page(text)
    assert all(link.startswith("#") for link in parsed.links)
    assert [name for name, times in parsed.ids.items() if times > 1] == []
    assert {link[1:] for link in parsed.links} <= parsed.ids.keys()
    assert "Not shown" not in text
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert drawings.count('role="img"') == len(VIEWS)
    assert not re.search(r"(fill|stroke): #", drawings), "a colour that does not change in the dark"
