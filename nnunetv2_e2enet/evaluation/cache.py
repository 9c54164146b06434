"""Metrics of cases whose files have not changed since they were computed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.labels import Labels
from nnunetv2_e2enet.evaluation.metrics import ClassMetrics
from nnunetv2_e2enet.files import write_text

VERSION = 1
"""Of what the metrics mean: to be raised when a number would come out otherwise."""


def default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nnunetv2-e2enet" / "metrics"


class MetricsCache:
    """One small file for each pair of reference and prediction.

    The name of the file is a digest of all that its numbers depend on: path, size and time of change of both files, labels,
    tolerances, and the version of the metrics.

    Args:
        folder: made when something is stored; None stores nothing.
    """

    def __init__(self, folder: Path | None, labels: Labels, tolerances: Sequence[float]) -> None:
        self.folder = folder
        classes = [(c.name, c.values) for c in labels.classes]
        self._settings = [VERSION, classes, labels.ignore, list(tolerances)]

    def entry(self, reference: Path, prediction: Path) -> Path | None:
        """Where the numbers of two files, as they are now, are or would be."""
        if self.folder is None:
            return None
        states = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in (reference, prediction)]
        digest = hashlib.sha256(json.dumps([self._settings, states]).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:40]}.json"

    @staticmethod
    def load(entry: Path | None) -> list[ClassMetrics] | None:
        """What was stored there; None if nothing was."""
        if entry is None or not entry.is_file():
            return None
        try:
            rows = json.loads(entry.read_text(encoding="utf-8"))
            return [ClassMetrics(*(math.nan if value is None else float(value) for value in row)) for row in rows]
        except (ValueError, TypeError):  # damaged: it is computed anew and replaced
            return None

    @staticmethod
    def store(entry: Path | None, metrics: Sequence[ClassMetrics]) -> None:
        if entry is None:
            return
        rows = [[None if math.isnan(value) else value for value in row] for row in metrics]
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise E2ENetError(
                f"cannot keep results in {entry.parent} ({error.strerror}): use --cache or --no-cache"
            ) from error
        write_text(entry, json.dumps(rows))
