"""Topologies from the folders and files that nnU-Net's trainings leave. Nothing in them is executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from nnunetv2_e2enet.dsff import HISTORY_FILE, History, Part, TopologyHistory, read_history
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, fusion_flows, maskable_layers
from nnunetv2_e2enet.network.blocks import CONV
from nnunetv2_e2enet.network.connections import MaskableLayer, MaskedConv3d
from nnunetv2_e2enet.network.fusion import SOURCES
from nnunetv2_e2enet.network.learned_shift import LearnedDepthShift
from nnunetv2_e2enet.training.architecture import is_e2enet
from nnunetv2_e2enet.training.checkpoints import fold_checkpoints, newest_checkpoint, read_checkpoint

FLOWS = tuple(SOURCES)
KINDS = (*FLOWS, "upsampling", "second block", "all layers")
"""Of connections: their flow, or another name for a layer without flows."""
_COUNTED = ("active", "grown", "explored", "survivors", "importance")


@dataclass(frozen=True)
class Fold:
    """The topology of one training.

    Attributes:
        name: of the fold, or of the file.
        checkpoint: the file.
        trainer: nnU-Net's name of it.
        epoch: epochs trained.
        network: its maskable layers have the checkpoint's weights and topology, everything else has no values; None where DSFF
            is in another network than E2ENet, of which the layers alone are known.
        connections: the maskable layers; its ``born`` is the checkpoint's.
        history: as far as the checkpoint goes; where there is none, one record of the checkpoint's own topology.
        why_no_history: empty where there is one.
        log: nnU-Net's, one entry an epoch.
    """

    name: str
    checkpoint: Path
    trainer: str
    epoch: int
    network: E2ENet | None
    connections: TopologyHistory
    history: History
    why_no_history: str
    log: Mapping[str, Sequence[Any]]

    @property
    def has_history(self) -> bool:
        """Whether the history of the topology could be read."""
        return not self.why_no_history

    @cached_property
    def kinds(self) -> pd.Categorical:
        """Of the parts of the history, in the order of ``KINDS``."""
        return pd.Categorical([self._kind(part) for part in self.history.parts], KINDS)

    def _kind(self, part: Part) -> str:
        if part.flow or self.network is None:
            return part.flow or "all layers"
        return "upsampling" if part.layer.endswith("upsample") else "second block"

    @cached_property
    def counts(self) -> pd.DataFrame:
        """The history by ``record`` and ``part``, whose places in it are the index. Two records may be of the same epoch.

        Columns: ``layer``, ``flow`` (NaN where there is none), ``connections``, ``kind`` of the part; lists of
        ``TopologyRecord``; ``density``, the active connections over all of the part; ``share``, those over the layer's active
        ones.
        """
        parts = pd.DataFrame(self.history.parts, columns=Part._fields).assign(kind=self.kinds)
        parts["flow"] = pd.Categorical(parts["flow"].replace("", None), FLOWS)
        records = [parts.assign(**{name: getattr(record, name) for name in _COUNTED}) for record in self.history.records]
        counts = pd.concat(dict(enumerate(records)), names=["record", "part"]).astype({"importance": float})
        active = counts.groupby(["record", "layer"])["active"].transform("sum")
        return counts.assign(density=counts["active"] / counts["connections"], share=counts["active"] / active.clip(lower=1))

    def at(self, epoch: int | None = None) -> pd.DataFrame:
        """The counts of the first record of an epoch; of the last record for None."""
        epochs = [record.epoch for record in self.history.records]
        return self.counts.loc[len(epochs) - 1 if epoch is None else epochs.index(epoch)]

    def logged(self, key: str) -> list[float]:
        """Values by epoch, those that are missing as NaN; empty where none is known."""
        values = [float("nan") if value is None else float(value) for value in list(self.log.get(key, []))[: self.epoch]]
        return values if any(value == value for value in values) else []


def read_topologies(path: Path, folds: Sequence[str] = ()) -> list[Fold]:
    """All trainings in a model folder or in a fold's folder, or the one of a checkpoint.

    Args:
        path: model folder, fold's folder, or checkpoint.
        folds: names of those that are wanted, such as ``0`` or ``all``; empty for all that are there.

    Raises:
        E2ENetError: there is nothing to read, it is damaged, or of a network without DSFF; or folds are of different networks.
    """
    if path.is_file():
        return [_fold(path.stem, path, None)]
    if not path.is_dir():
        raise E2ENetError(f"{path} is not there: expected a model folder, a fold's folder or a checkpoint")
    alone = newest_checkpoint(path)
    if alone is not None:
        return [_fold(path.name.replace("_", " "), alone, path)]
    found = fold_checkpoints(path)
    wanted = list(dict.fromkeys(folds or found))
    missing = [f"fold_{name}" for name in wanted if name not in found]
    if missing or not found:
        raise E2ENetError(
            f"{path} has no checkpoint in {', '.join(missing) or 'any fold_*'}: expected a model folder "
            "(TRAINER__PLANS__CONFIGURATION), one of its fold folders, or a checkpoint file"
        )
    trainings = [_fold(f"fold {name}", found[name], found[name].parent) for name in wanted]
    for other in trainings[1:]:
        if other.connections.parts != trainings[0].connections.parts:
            raise E2ENetError(
                f"{other.checkpoint} is of another network than {trainings[0].checkpoint}: look at one at a time"
            )
    return trainings


def _fold(name: str, file: Path, folder: Path | None) -> Fold:
    checkpoint = read_checkpoint(file)
    network = _network(checkpoint, file)
    weights = checkpoint["network_weights"]
    layers = dict(maskable_layers(network)) if network else _layers(weights, file)
    _take_weights(layers, weights, file)
    if network:
        _take_offsets(network, weights, file)
    connections = TopologyHistory(layers, fusion_flows(network) if network else {}, None)
    log = checkpoint.get("logging", {})
    connections.load_born(log.get("dsff_born", []))
    epoch = int(checkpoint["current_epoch"])
    history, why_not = _history(folder, connections, epoch)
    return Fold(name, file, str(checkpoint["trainer_name"]), epoch, network, connections, history, why_not, log)


def _network(checkpoint: Mapping[str, Any], file: Path) -> E2ENet | None:
    """As the plans in the checkpoint describe it. Only numbers are taken from there, no names to import."""
    try:
        arguments = checkpoint["init_args"]
        architecture = arguments["plans"]["configurations"][arguments["configuration"]]["architecture"]
        given = architecture["arch_kwargs"]
        own_classes = given.get("encoder_class") or given.get("decoder_class")
        if own_classes or not is_e2enet(architecture):
            return None
        with torch.device("meta"):
            return E2ENet(
                1,
                1,
                given["n_stages"],
                given["features_per_stage"],
                cast(type[nn.Module], CONV[len(given["strides"][0])]),
                given["strides"],
                shift_size=given["shift_size"],
                learned_shift=bool(given.get("learned_shift", False)),
            )
    except (KeyError, TypeError, IndexError) as error:
        raise E2ENetError(f"{file} does not say how its network is built ({error!r}): was it saved by nnU-Net 2.8?") from error


def _layers(weights: Mapping[str, Tensor], file: Path) -> dict[str, MaskableLayer]:
    """The maskable layers of any network, whatever it computes with them."""
    masks: dict[int, tuple[str, Tensor]] = {}
    for key, values in weights.items():
        if key.endswith(".mask") and values.dim() == 2:
            masks.setdefault(values.data_ptr(), (key.removesuffix(".mask"), values))  # a layer may be held under several names
    if not masks:
        raise E2ENetError(f"{file} has no connections to look at: it is of a network without DSFF")
    with torch.device("meta"):
        return {name: MaskedConv3d(mask.shape[1], mask.shape[0], 1) for name, mask in masks.values()}


def _take_weights(layers: Mapping[str, MaskableLayer], weights: Mapping[str, Tensor], file: Path) -> None:
    """Their kernels may be of any size."""
    for name, layer in layers.items():
        given = [weights.get(f"{name}.{key}") for key in ("weight", "mask", "explored")]
        if any(values is None or values.shape[:2] != layer.mask.shape for values in given):
            raise E2ENetError(f"{file} has no connections of {name}, or others than its plans say: was it changed?")
        weight, mask, explored = (cast(Tensor, values) for values in given)
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        layer.mask, layer.explored = mask.bool(), explored.bool()


def _take_offsets(network: E2ENet, weights: Mapping[str, Tensor], file: Path) -> None:
    """Of a learned depth shift."""
    for name, module in network.named_modules():
        if isinstance(module, LearnedDepthShift):
            offsets = weights.get(f"{name}.offsets")
            if offsets is None or offsets.shape != module.offsets.shape:
                raise E2ENetError(f"{file} has no offsets of {name}, or others than its plans say: was it changed?")
            module.offsets = nn.Parameter(offsets.float(), requires_grad=False)


def _history(folder: Path | None, connections: TopologyHistory, epoch: int) -> tuple[History, str]:
    present = connections.record(epoch)
    alone = History(connections.importance_name, connections.parts, (present,))
    if folder is None:
        return alone, "a checkpoint alone does not hold the history of its topology"
    if not (folder / HISTORY_FILE).is_file():
        return alone, f"{folder / HISTORY_FILE} is not there"
    history = read_history(folder / HISTORY_FILE)
    if not any(part.flow for part in connections.parts):  # of another network than E2ENet, whose fusion nodes are not known
        history = history.without_flows()
    records = history.up_to(epoch)
    if history.parts != connections.parts or not records or records[-1].active != present.active:
        return alone, f"{folder / HISTORY_FILE} is not the history of the checkpoint beside it"
    return History(history.importance, history.parts, records), ""
