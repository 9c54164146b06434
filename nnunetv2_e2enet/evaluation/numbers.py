"""Numbers formatted for people."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nnunetv2_e2enet.evaluation.metrics import Metric
from nnunetv2_e2enet.evaluation.statistics import Interval

NOTHING = "–"  # noqa: RUF001 (an en dash)


def value(number: float, metric: Metric) -> str:
    """A number, with the digits of its metric."""
    return NOTHING if math.isnan(number) else f"{number:.{metric.digits}f}"


def limits(interval: Interval, metric: Metric, fewer_digits: int = 1) -> str:
    """The confidence interval alone, with fewer digits than the mean."""
    if math.isnan(interval.low):
        return f"n = {interval.n}"
    digits = max(metric.digits - fewer_digits, 1)
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def signed(number: float, metric: Metric) -> str:
    """A difference."""
    return NOTHING if math.isnan(number) else f"{number:+.{metric.digits}f}"


def p_value(p: float) -> str:
    """In a table."""
    if math.isnan(p):
        return NOTHING
    return "< 0.001" if p < 1e-3 else f"{p:.3f}"


def p_statement(p: float) -> str:
    """In a sentence: ``p = 0.012``, ``p < 0.001``."""
    return f"p {p_value(p)}" if p < 1e-3 else f"p = {p_value(p)}"


def millions(number: float) -> str:
    """Parameters: ``9.43 M``, ``5.14 k``."""
    return f"{number / 1e6:.2f} M" if number >= 1e5 or number == 0 else f"{number / 1e3:.2f} k"


def giga(number: float) -> str:
    """Multiply-accumulates: ``326.30 G``, ``2.72 M``."""
    return f"{number / 1e9:.2f} G" if number >= 1e8 or number == 0 else f"{number / 1e6:.2f} M"


def gib(n_bytes: float) -> str:
    """Bytes in GiB."""
    return f"{n_bytes / 2**30:.2f} GiB"


def sizes(voxels: Iterable[int]) -> str:
    """Of a patch: ``64 × 160 × 160``."""  # noqa: RUF002
    return " × ".join(map(str, voxels))  # noqa: RUF001
