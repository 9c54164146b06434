"""The history of a topology: one line of JSON an update, in a file that survives a crash.

The first line lists the *parts* of the connections: the flows of a convolution that fuses flows, otherwise whole layers. Each
following line is the topology at one moment, its numbers in the order of the parts: the start, then every update. The start is
written with the first checkpoint or update. The line of an update is on the disk before the training goes on. The incomplete
last line of a crash is not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nnunetv2_e2enet.dsff.criteria import Importance, KernelL1Norm, importance_of
from nnunetv2_e2enet.dsff.updater import TopologyUpdate
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import write_atomically
from nnunetv2_e2enet.network.connections import MaskableLayer

HISTORY_FILE = "topology_history.jsonl"
FORMAT = 2


class Part(NamedTuple):
    """Connections that are counted together.

    Attributes:
        layer: name of the maskable layer.
        flow: of the layer's input maps; empty where the layer is not divided.
        connections: active or not.
    """

    layer: str
    flow: str
    connections: int


@dataclass(frozen=True)
class TopologyRecord:
    """The topology at one moment. All lists but ``threshold`` have one number a part.

    Attributes:
        epoch: epochs trained so far, 0 at the start.
        fraction: share of the active connections that this update replaced, 0 at the start.
        active, pruned, grown: connections after the update, and those it switched off and on.
        explored: connections that have been active at any time.
        survivors: active connections that have been active since the start.
        importance: mean importance of the connections that stayed active, by the criterion of the training; None at the start
            where the criterion has to observe the network first.
        threshold: for each layer, importance of the most important connection that was pruned; None where none was.
    """

    epoch: int
    fraction: float
    active: list[int]
    pruned: list[int]
    grown: list[int]
    explored: list[int]
    survivors: list[int]
    importance: list[float | None]
    threshold: list[float | None]


@dataclass(frozen=True)
class History:
    """A history file.

    Attributes:
        importance: name of the criterion by which connections were kept.
    """

    importance: str
    parts: tuple[Part, ...]
    records: tuple[TopologyRecord, ...]

    def up_to(self, epoch: int) -> tuple[TopologyRecord, ...]:
        """The records of the time before a checkpoint of ``epoch`` epochs, which is written before the update that follows."""
        return tuple(r for i, r in enumerate(self.records) if r.epoch < epoch or (i == 0 and r.epoch == epoch))

    def without_flows(self) -> History:
        """The same history, whose parts are whole layers; the importance is the mean over the connections that stayed."""
        names = list(dict.fromkeys(part.layer for part in self.parts))
        places = [[i for i, part in enumerate(self.parts) if part.layer == name] for name in names]
        parts = (Part(name, "", sum(self.parts[i].connections for i in of)) for name, of in zip(names, places, strict=True))
        return History(self.importance, tuple(parts), tuple(_merged(record, places) for record in self.records))


class TopologyHistory:
    """Follows the connections of maskable layers through a training and writes the history.

    Args:
        layers: by name.
        flows: for layers whose input maps are of different origin, the channels of each.
        path: of the file; None follows the connections and writes nothing (all ranks but one, trainings without checkpoints).
        importance: the criterion by which connections are kept; the L1 norm of kernels unless given.

    Attributes:
        flows: for each layer the input channels of its parts, by flow.
        born: for each layer, epochs trained when a connection was last switched on; int16, like ``mask``. It has a meaning for
            active connections alone.
    """

    def __init__(
        self,
        layers: Mapping[str, MaskableLayer],
        flows: Mapping[str, Mapping[str, slice]],
        path: Path | None,
        importance: Importance | None = None,
    ) -> None:
        self.layers = layers
        self.importance = importance or KernelL1Norm()
        self.path = path
        self._beginning: list[bytes] = []  # lines that are still to be written
        self.born = {name: torch.zeros_like(layer.mask, dtype=torch.int16) for name, layer in layers.items()}
        self.flows = {name: flows.get(name, {"": slice(None)}) for name in layers}
        self.parts = tuple(
            Part(name, flow, _narrow(layer.mask, layer, channels).numel())
            for name, layer in layers.items()
            for flow, channels in self.flows[name].items()
        )

    def start(self, epoch: int = 0) -> None:
        """Begin anew with the present topology.

        ``begun``, or the first update, replaces a former file: that of a trained model stays while no checkpoint of the new
        training is there.
        """
        self._beginning = [self._header(), _line(asdict(self.record(epoch)))]

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The beginning is in the file before the body runs; where the body fails, the file is what it was.

        Raises:
            E2ENetError: the file cannot be written.
        """
        if self.path is None or not self._beginning:
            yield
            return
        former, beginning = self.path.read_bytes() if self.path.is_file() else None, self._beginning
        self._rewrite(beginning)
        self._beginning = []
        try:
            yield
        except BaseException:
            self._beginning = beginning
            if former is None:
                self.path.unlink(missing_ok=True)
            else:
                self._rewrite([former])
            raise

    def resume(self, epoch: int) -> None:
        """Go on after ``epoch`` epochs, without the file's records of later epochs and its incomplete last line.

        The update after ``epoch`` epochs is still to come: a checkpoint is written before it. A file that is missing, or
        without records of the time before, begins with the present topology.

        Raises:
            E2ENetError: the file is damaged or of another network, or cannot be written.
        """
        if self.path is None:
            return
        if not self.path.is_file():
            self.start(epoch)
            return
        history = read_history(self.path)
        if history.parts != self.parts or history.importance != self.importance_name:
            raise E2ENetError(
                f"{self.path} is the history of another network or importance than the checkpoint's: move it away, and a new "
                "one is begun"
            )
        kept = history.up_to(epoch)
        if kept:
            self._rewrite([self._header(), *(_line(asdict(record)) for record in kept)])
        else:
            self.start(epoch)

    def load_born(self, saved: Sequence[Tensor | None]) -> None:
        """Take over ``born`` of a checkpoint, in the order of the layers; missing values stand for the start."""
        for born, values in zip(self.born.values(), saved, strict=False):
            if isinstance(values, Tensor) and values.shape == born.shape:
                born.copy_(values)

    def add(self, update: TopologyUpdate) -> None:
        """Append the record of an update that has just been made.

        Raises:
            E2ENetError: the file cannot be written.
        """
        epoch = update.epoch
        for change in update.layers:
            self.born[change.name].masked_fill_(change.grown, epoch)
        if self.path is None:
            return
        line = _line(asdict(self.record(epoch, update)))
        try:
            with self.begun(), self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def record(self, epoch: int, update: TopologyUpdate | None = None) -> TopologyRecord:
        """The present topology after ``epoch`` epochs, with the changes by the update that led to it."""
        changes = {change.name: change for change in update.layers} if update else {}
        record = TopologyRecord(epoch, round(update.prune_fraction, 6) if update else 0.0, [], [], [], [], [], [], [])
        for name, layer in self.layers.items():
            change = changes.get(name)
            nothing = torch.zeros_like(layer.mask)
            pruned, grown = (change.pruned, change.grown) if change else (nothing, nothing)
            importance = change.importance if change else self._importance(name, layer)
            stayed = layer.mask & ~grown
            survivors = layer.mask & (self.born[name] == 0)
            of_stayed = None if importance is None else importance.masked_fill(~stayed, 0)
            for channels in self.flows[name].values():

                def total(values: Tensor, layer: MaskableLayer = layer, channels: slice = channels) -> float:
                    return float(_narrow(values, layer, channels).sum())

                record.active.append(int(total(layer.mask)))
                record.pruned.append(int(total(pruned)))
                record.grown.append(int(total(grown)))
                record.explored.append(int(total(layer.explored)))
                record.survivors.append(int(total(survivors)))
                mean = None if of_stayed is None else _short(total(of_stayed) / max(total(stayed), 1))
                record.importance.append(mean)
            record.threshold.append(None if change is None or change.threshold is None else _short(change.threshold))
        return record

    @property
    def importance_name(self) -> str:
        """Name of the importance in figures."""
        return getattr(self.importance, "label", type(self.importance).__name__)

    def _importance(self, name: str, layer: MaskableLayer) -> Tensor | None:
        observes = getattr(self.importance, "needs_input_deviations", False)
        return None if observes and layer.input_deviation is None else importance_of(self.importance, name, layer)

    def _header(self) -> bytes:
        return _line({"format": FORMAT, "importance": self.importance_name, "parts": self.parts})

    def _rewrite(self, lines: Sequence[bytes]) -> None:
        if self.path is None:
            return
        try:
            write_atomically(self.path, b"".join(lines))
        except OSError as error:
            raise _unwritable(self.path, error) from error


def read_history(path: Path) -> History:
    """A history file, without the line that a crash may have torn off.

    Raises:
        E2ENetError: the file is missing, damaged, not a history, or of another release.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last end of a line is nothing, or torn
        header, *records = [json.loads(line) for line in lines]
        if header["format"] != FORMAT:
            raise E2ENetError(
                f"{path} has format {header['format']}, expected {FORMAT}: read it with the release that wrote it"
            )
        parts = tuple(Part(*part) for part in header["parts"])
        return History(str(header["importance"]), parts, tuple(TopologyRecord(**record) for record in records))
    except E2ENetError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise E2ENetError(
            f"{path} cannot be read as a topology history ({error}): move it away; a training that is resumed begins a new one"
        ) from error


def _merged(record: TopologyRecord, places: Sequence[Sequence[int]]) -> TopologyRecord:
    """A record whose parts are put together as ``places`` says."""

    def total(counts: Sequence[int]) -> list[int]:
        return [sum(counts[i] for i in of) for of in places]

    importance: list[float | None] = []
    for of in places:
        means = [(record.importance[i], record.active[i] - record.grown[i]) for i in of]
        known = [(mean, stayed) for mean, stayed in means if mean is not None]
        mean = sum(mean * stayed for mean, stayed in known) / max(sum(stayed for _, stayed in known), 1)
        importance.append(_short(mean) if len(known) == len(of) else None)
    return replace(
        record,
        active=total(record.active),
        pruned=total(record.pruned),
        grown=total(record.grown),
        explored=total(record.explored),
        survivors=total(record.survivors),
        importance=importance,
    )


def _narrow(values: Tensor, layer: MaskableLayer, channels: slice) -> Tensor:
    return values[channels] if layer.input_axis == 0 else values[:, channels]


def _line(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _unwritable(path: Path, error: OSError) -> E2ENetError:
    return E2ENetError(f"{path} could not be written ({error.strerror}): make room, then resume with --c")
