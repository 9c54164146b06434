"""What the numbers of the page mean."""

from __future__ import annotations

from html import escape

from nnunetv2_e2enet.evaluation.comparison import Comparison
from nnunetv2_e2enet.evaluation.statistics import RESAMPLES

_PAIRED = "Two-sided Wilcoxon signed-rank tests over cases, corrected by Holm within each metric (the mean and the classes)."
_RANKED = "Friedman tests over cases, corrected by Holm within each metric, then Nemenyi's test of all pairs."
_TEXTS = {
    "Dice": (
        "Counted as in nnU-Net's evaluation. Where neither reference nor prediction has the class it is not defined and left "
        "out; where only one of them has, it is 0."
    ),
    "Surface Dice": "Share of both surfaces that is within {tolerance} of the other one. 0 where one of the two is empty.",
    "HD95": (
        "Larger of the two directed 95 % distances between the surfaces. Where one of the two is empty it is the diagonal of "
        "the image, so that missing an organ is not rewarded."
    ),
    "Volume error": "Absolute difference of the volumes.",
    "Intervals": (
        "95 %, percentile bootstrap over cases, {resamples} resamples. They say how the mean varies with the choice of cases, "
        "not with another training."
    ),
    "Tests": (
        "{tests} A small p-value says that a difference is not chance over cases, not that it matters; a large one does not "
        "say that the models are equal."
    ),
    "Costs": "Counted by torch.utils.flop_counter for one patch; one multiply-accumulate is two operations.",
}


def explanations(comparison: Comparison) -> str:
    """A list of terms, with the settings of this comparison."""
    tolerances = sorted(set(comparison.tolerances))
    classes = zip(comparison.results.classes, comparison.tolerances, strict=True)
    listed = ", ".join(f"{name} {mm:g} mm" for name, mm in classes)
    settings = {
        "tolerance": f"{tolerances[0]:g} mm" if len(tolerances) == 1 else f"a tolerance ({listed})",
        "resamples": str(RESAMPLES),
        "tests": _PAIRED if comparison.paired else _RANKED,
    }
    entries = (f"<dt>{term}</dt><dd>{escape(text.format(**settings))}</dd>" for term, text in _TEXTS.items())
    return f"<dl>{''.join(entries)}</dl>"
