"""Checkpoints that are damaged, foreign or hostile, and disks that are full."""

import gzip
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from support import Hostile, Project, architecture, full_disk, make, train_epochs
from torch import nn

from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.networks import read_trainings
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.network.encoder import Encoder
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.training.checkpoints import check_architecture, newest_checkpoint, read_checkpoint
from nnunetv2_e2enet.training.trainer import E2ENetMixin
from nnunetv2_e2enet.training.variants import variant


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of a real one, to be spoilt."""
    return Path(shutil.copy(trained / "fold_0" / "checkpoint_final.pth", tmp_path / "checkpoint.pth"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def arguments(content: dict[str, Any]) -> dict[str, Any]:
    return content["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]


def test_real_checkpoint_is_read_without_running_code(checkpoint: Path) -> None:
    content = read_checkpoint(checkpoint)
    assert content["trainer_name"] == "nnUNetTrainerE2ENet_smoke"
    assert len(content["logging"]["mean_fg_dice"]) == 3
    assert content["init_args"]["plans"]["configurations"]["3d_fullres"]["patch_size"] == [24, 64, 64]


def test_what_a_trainer_may_log(checkpoint: Path) -> None:
    logged = {"array": np.arange(3, dtype=np.uint8), "number": np.int16(7), "flag": np.bool_(True)}
    rewrite(checkpoint, lambda content: content["logging"].update(logged))
    found = read_checkpoint(checkpoint)["logging"]
    assert found["array"].tolist() == [0, 1, 2]
    assert (found["number"], found["flag"]) == (7, True)
    rewrite(checkpoint, lambda content: content["logging"].update(folder=checkpoint.parent))
    with pytest.raises(E2ENetError, match=r"holds pathlib.*PosixPath, which is not read because .*; let the trainer save"):
        read_checkpoint(checkpoint)


def test_checkpoints_are_read_as_torch_2_5_does(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks each function that is allowed for its name."""

    def allowed() -> dict[str, Any]:
        return {f"{f.__module__}.{f.__name__}": f for f in torch.serialization.get_safe_globals()}

    monkeypatch.setattr(torch._weights_only_unpickler, "_get_user_allowed_globals", allowed)
    assert read_checkpoint(checkpoint)["current_epoch"] == 3


def test_checkpoints_are_read_by_several_threads(checkpoint: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        epochs = list(pool.map(lambda _: read_checkpoint(checkpoint)["current_epoch"], range(24)))
    assert epochs == [3] * 24


def test_an_unfinished_training_is_read_from_where_nnunet_would_go_on(tmp_path: Path) -> None:
    """The best checkpoint is of an earlier epoch than the latest, and its curves end there."""
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    for name, epochs in (("best", 2), ("latest", 3)):
        checkpoint = {
            **{key: {} for key in ("network_weights", "optimizer_state")},
            "current_epoch": epochs,
            "init_args": {"configuration": "3d_fullres"},
            "trainer_name": "nnUNetTrainer",
            "logging": {"train_losses": [-0.5] * epochs},
        }
        torch.save(checkpoint, model / "fold_0" / f"checkpoint_{name}.pth")
    (training,) = read_trainings(model)
    assert training.epochs == len(training.curves["train_losses"]) == 3
    assert newest_checkpoint(model / "fold_0") == model / "fold_0" / "checkpoint_latest.pth"
    assert newest_checkpoint(model) is None


def test_resumes_from_an_intact_checkpoint(in_process: Project, checkpoint: Path) -> None:
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
    trainer.load_checkpoint(str(checkpoint))
    assert trainer.current_epoch == 3


def test_checkpoints_from_before_a_setting_existed_are_resumed(in_process: Project, checkpoint: Path) -> None:
    rewrite(checkpoint, lambda content: [arguments(content).pop(name) for name in ("kernel_size", "learned_shift")])
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
    trainer.load_checkpoint(str(checkpoint))
    assert trainer.current_epoch == 3


def test_checkpoints_of_several_gpus_are_resumed(in_process: Project, checkpoint: Path) -> None:
    """Their names of tensors begin with "module.", which nnU-Net takes off."""

    def wrap(content: dict[str, Any]) -> None:
        content["network_weights"] = {f"module.{key}": value for key, value in content["network_weights"].items()}

    weights = read_checkpoint(checkpoint)["network_weights"]
    rewrite(checkpoint, wrap)
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
    trainer.load_checkpoint(str(checkpoint))
    resumed = trainer.network.state_dict()
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[key], weights[key]) for key in weights)


NO_CHECKPOINTS = {
    "empty": b"",
    "text": b"not a checkpoint\n" * 9,
    "scan": gzip.compress(bytes(400)),
    "packed": b"X" + bytes(7) + b'{"nnunetv2-e2enet":',
    "letters": b"i" * 40,
    "numbers": b"I1\x002\n",
}


@pytest.mark.parametrize("damage", [*NO_CHECKPOINTS, "truncated", "list", "missing"])
def test_files_that_are_no_checkpoints(checkpoint: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = checkpoint.read_bytes()
    if damage == "missing":
        checkpoint.unlink()
    elif damage == "list":
        torch.save([1, 2], checkpoint)
    else:
        checkpoint.write_bytes({**NO_CHECKPOINTS, "truncated": data[: len(data) // 2]}[damage])
    with pytest.raises(E2ENetError, match="checkpoint") as error:
        read_checkpoint(checkpoint)
    assert "\n" not in str(error.value)
    assert main(["topology", str(checkpoint)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "remove" not in message
    assert "weights_only" not in message
    assert damage == "missing" or "name a model folder, a fold's folder or a checkpoint_*.pth" in message


def test_memory_that_runs_out_is_no_fault_of_a_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to remove it."""
    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(RuntimeError, match="memory"):
        read_checkpoint(checkpoint)


def test_a_damaged_checkpoint_to_validate_has_no_next_one(in_process: Project, checkpoint: Path) -> None:
    """As ``nnUNetv2_train`` makes a trainer for ``--c`` and for ``--val``."""
    checkpoint.write_bytes(b"torn")
    made = (in_process.dataset, "3d_fullres", 0, "nnUNetTrainerE2ENet_smoke", "nnUNetPlans")
    for resumes, remedy in ((True, "repeat the command; nnU-Net resumes"), (False, "finish the training with --c, which")):
        trainer = get_trainer_from_args(*made, resumes, torch.device("cpu"))
        with pytest.raises(SystemExit, match=f"or it is truncated: remove it and {remedy}"):
            trainer.load_checkpoint(str(checkpoint))


def test_hostile_checkpoint_is_not_executed(in_process: Project, checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    rewrite(checkpoint, lambda content: content.update(extra=Hostile(mark)))
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
    with pytest.raises(SystemExit, match="which is not read because a file could run code through it"):
        trainer.load_checkpoint(str(checkpoint))
    assert not mark.exists()
    torch.load(checkpoint, weights_only=False)  # it would have been
    assert mark.exists()


def test_model_folder_with_a_hostile_checkpoint_is_not_executed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("validation")))
    mark = tmp_path / "executed"
    for checkpoint in model.glob("fold_*/*.pth"):
        rewrite(checkpoint, lambda content: content.update(extra=Hostile(mark)))
    assert main(["profile", str(model), "--rounds", "1"]) == 1
    assert "which is not read because a file could run code through it" in capsys.readouterr().err
    assert not mark.exists()


def first_mask(content: dict[str, Any]) -> str:
    return next(key for key in content["network_weights"] if key.endswith(".mask"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: arguments(c).update(feature_sparsity=0.7), "feature_sparsity = 0.7, but the trainer has 0.8"),
        (lambda c: arguments(c).update(shift_size=5), "shift_size = 5, but the trainer has 3"),
        (lambda c: arguments(c).update(kernel_size=[3, 1, 3]), r"kernel_size = \[3, 1, 3\], but the trainer has \[1, 3, 3\]"),
        (lambda c: arguments(c).update(learned_shift=True), "learned_shift = True, but the trainer has False"),
        (lambda c: arguments(c)["strides"].pop(), "strides ="),
        (lambda c: arguments(c).update(features_per_stage=[1]), "features_per_stage"),
        (lambda c: c["network_weights"].pop(first_mask(c)), "lacks 1 of the network's tensors"),
        (lambda c: c["network_weights"]["encoder.stages.0.0.conv.weight"].fill_(float("nan")), "not finite"),
        (
            lambda c: c["init_args"]["plans"]["configurations"]["3d_fullres"].update(
                architecture={"network_class_name": "UNet"}
            ),
            "is of UNet",
        ),
    ],
    ids=["sparsity", "shift size", "kernel", "learned shift", "levels", "channels", "masks", "nan", "foreign"],
)
def test_checkpoints_of_another_network_are_refused(
    in_process: Project,
    checkpoint: Path,
    change: Callable[[dict[str, Any]], Any],
    message: str,
) -> None:
    rewrite(checkpoint, change)
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    with pytest.raises(SystemExit, match=message) as stop:
        trainer.load_checkpoint(str(checkpoint))
    assert str(stop.value).startswith("E2ENet: ")
    assert "\n" not in str(stop.value)
    assert all(torch.equal(value, before[key]) for key, value in trainer.network.state_dict().items())


def test_a_configuration_may_inherit_its_network() -> None:
    """As those of nnU-Net's cascades do in the checkpoints of stock trainers."""
    entry = architecture([8, 16], [[1, 1, 1], [2, 2, 2]])
    configurations = {"3d_fullres": {"architecture": entry}, "cascade": {"inherits_from": "3d_fullres"}}
    content = {"init_args": {"plans": {"configurations": configurations}, "configuration": "cascade"}, "trainer_name": "stock"}
    check_architecture(Path("checkpoint"), content, entry, "plans.json", "train anew")
    configurations["3d_fullres"]["inherits_from"] = "cascade"
    del configurations["3d_fullres"]["architecture"]
    with pytest.raises(E2ENetError, match="is of an unknown network"):
        check_architecture(Path("checkpoint"), content, entry, "plans.json", "train anew")


def test_weights_of_another_shift_size_are_refused() -> None:
    def network(shift_size: int, dimension: int = 3) -> E2ENet:
        conv = nn.Conv3d if dimension == 3 else nn.Conv2d
        return E2ENet(1, 2, 2, 4, conv, [[1] * dimension, [2] * dimension], shift_size=shift_size)

    with pytest.raises(E2ENetError, match="trained with shift_size 5, but the network has 3"):
        network(3).load_state_dict(network(5).state_dict())
    network(3).load_state_dict(network(3).state_dict())
    network(3, dimension=2).load_state_dict(network(5, dimension=2).state_dict())  # in 2D nothing is shifted


def test_modules_of_the_users_may_store_what_they_like(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are not finite in a buffer, as in a mask of attention, and things that are no tensors."""
    monkeypatch.setattr(Encoder, "get_extra_state", lambda _: {"version": 3}, raising=False)
    monkeypatch.setattr(Encoder, "set_extra_state", lambda *_: None, raising=False)

    def make_trainer() -> Any:
        trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
        trainer.initialize()
        trainer.network.encoder.register_buffer("attention_mask", torch.full((2,), -torch.inf))
        return trainer

    trainer = make_trainer()
    train_epochs(trainer, 1)
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(path))
    resumed = make_trainer()
    resumed.load_checkpoint(str(path))
    assert resumed.current_epoch == 2
    rewrite(path, lambda content: content["network_weights"].pop("encoder._extra_state"))
    with pytest.raises(SystemExit, match=r"lacks 1 of the network's tensors .*, such as encoder\._extra_state"):
        make_trainer().load_checkpoint(str(path))


def test_a_trainer_may_leave_out_a_checkpoint(in_process: Project) -> None:
    class WithoutBest(nnUNetTrainer):
        def save_checkpoint(self, filename: str) -> None:
            if "checkpoint_best" not in filename:
                super().save_checkpoint(filename)

    class Ours(E2ENetMixin, WithoutBest):
        base_num_features, max_num_features = 8, 8

    trainer = make(Ours, in_process)
    trainer.initialize()
    for name in ("best", "latest"):
        trainer.save_checkpoint(str(Path(trainer.output_folder) / f"checkpoint_{name}.pth"))
    assert [path.name for path in Path(trainer.output_folder).glob("checkpoint*")] == ["checkpoint_latest.pth"]


def test_what_a_trainer_of_the_users_logs_stays_in_the_log(in_process: Project) -> None:
    class WithSurfaceDice(nnUNetTrainer):
        def __init__(self, plans: Any, configuration: str, fold: int, dataset_json: Any, device: torch.device) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.logger.local_logger.my_fantastic_logging["surface_dice"] = []

        def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
            super().on_validation_epoch_end(val_outputs)
            self.logger.log("surface_dice", 0.5, self.current_epoch)

    class Ours(E2ENetMixin, WithSurfaceDice):
        base_num_features, max_num_features = 8, 8

    trainer = make(Ours, in_process)
    trainer.initialize()
    train_epochs(trainer, 2)
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    assert read_checkpoint(path)["logging"]["surface_dice"] == [0.5, 0.5]
    assert read_checkpoint(path)["logging"]["dsff_explored"][1] > 0


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_full_disk_leaves_the_former_checkpoint(in_process: Project, share: float) -> None:
    """The write fails half-way, or with the last kilobyte."""
    trainer = make(variant(nnUNetTrainerE2ENet_smoke, "full_disk", save_every=1), in_process)
    trainer.initialize()
    train_epochs(trainer, 1)
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    former = path.read_bytes()
    unwritten = pytest.raises(SystemExit, match=r"checkpoint_latest\.pth could not be written .* GB are free")
    with unwritten, full_disk(int(share * len(former)) - 1000):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == former
    assert not list(path.parent.glob("*.tmp"))


def no_memory(*_arguments: Any, **_options: Any) -> Any:
    return torch.empty(2**60, dtype=torch.uint8)


def no_gpu_memory(*_arguments: Any, **_options: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB")


@pytest.mark.parametrize("failure", [no_memory, no_gpu_memory])
def test_out_of_memory_is_called_that(in_process: Project, failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real error of the CPU's allocator; that of a GPU's in the words of PyTorch."""
    trainer = make(variant(nnUNetTrainerE2ENet_smoke, "memory", save_every=1), in_process)
    trainer.initialize()
    train_epochs(trainer, 1)
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    former = path.read_bytes()
    monkeypatch.setattr(trainer.optimizer, "state_dict", failure)
    with pytest.raises(SystemExit, match=r"^E2ENet: out of memory while .*checkpoint_latest.pth was written") as stop:
        trainer.save_checkpoint(str(path))
    assert "GB are free" not in str(stop.value)
    assert path.read_bytes() == former
    assert not list(path.parent.glob("*.tmp"))


def test_other_errors_of_the_training_are_not_those_of_the_disk(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA reports errors of earlier kernels wherever it is called next, as when weights are copied for a checkpoint."""

    def report(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
    trainer.initialize()
    monkeypatch.setattr(trainer.optimizer, "state_dict", report)
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    with pytest.raises(RuntimeError, match=r"^CUDA error: device-side assert triggered$"):
        trainer.save_checkpoint(str(path))
    assert list(path.parent.glob("checkpoint*")) == []


def test_diverged_training_stops_before_it_is_saved(in_process: Project) -> None:
    trainer = make(variant(nnUNetTrainerE2ENet_smoke, "diverged", save_every=1), in_process)
    trainer.initialize()
    train_epochs(trainer, 1)
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    former = latest.read_bytes()
    with torch.no_grad():
        trainer.network.encoder.stages[0][0].conv.weight.fill_(float("inf"))
    with pytest.raises(SystemExit, match="the training has diverged"):
        train_epochs(trainer, 1)
    assert latest.read_bytes() == former


def test_plans_file_in_the_model_folder_is_what_was_trained(trained: Path) -> None:
    saved = read_checkpoint(trained / "fold_0" / "checkpoint_final.pth")["init_args"]["plans"]
    assert load_json(str(trained / "plans.json"))["configurations"] == saved["configurations"]
