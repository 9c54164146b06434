"""How the figures look, on paper and on the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_e2enet.evaluation.overlay import LINE_STYLES, OKABE_ITO
from nnunetv2_e2enet.evaluation.topology.measures import FLOWS

WIDTH_INCHES = 4.3
DOTS_PER_INCH = 200
INK, MUTED, GRID, PAPER = "#1c2127", "#5b6570", "#e6e9ed", "#ffffff"
FLOW_COLOURS = dict(zip(FLOWS, (OKABE_ITO[5], OKABE_ITO[0], OKABE_ITO[2]), strict=True))
FLOW_COLOURS_IN_THE_DARK = dict(zip(FLOWS, (OKABE_ITO[1], "#f2b632", "#2cc295"), strict=True))
FLOW_LINES = dict(zip(FLOWS, LINE_STYLES, strict=True))
"""Never told apart by colour alone."""
FLOW_MARKERS = dict(zip(FLOWS, "os^", strict=True))
FIRST, SECOND = OKABE_ITO[5], OKABE_ITO[6]
"""Of two curves that are no flows."""
_FIRST_IN_THE_DARK, _SECOND_IN_THE_DARK = OKABE_ITO[1], OKABE_ITO[6]

_SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "e2enet",
}


@contextmanager
def style() -> Iterator[None]:
    """Figures that are drawn and saved within have this look, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[list[Axes]]]:
    """A figure of the common width and its axes, row by row."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def png(figure: Figure) -> bytes:
    with style(), io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        return buffer.getvalue()


def svg(figure: Figure) -> str:
    with style(), io.StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()


def inline_svg(figure: Figure, key: str, words: str) -> str:
    """An ``svg`` element for a page: its colours are the page's, so that it is dark in the dark.

    Args:
        key: unlike that of any other figure of the page.
        words: what a screen reader says.
    """
    text = svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{key}-", text)
    for colour, variable in _variables().items():
        text = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{variable})", text, flags=re.IGNORECASE)
    opening = re.match(r"<svg[^>]*viewBox=\"([^\"]+)\"[^>]*>", text, flags=re.DOTALL)
    assert opening is not None
    return f'<svg viewBox="{opening[1]}" role="img" aria-label="{escape(words)}">{text[opening.end() :]}'.strip()


def colour_variables() -> str:
    """The style that says what the figures' colours are, in the light and in the dark."""
    light = {**FLOW_COLOURS, "first": FIRST, "second": SECOND}
    dark = {**FLOW_COLOURS_IN_THE_DARK, "first": _FIRST_IN_THE_DARK, "second": _SECOND_IN_THE_DARK}
    declared = ("".join(f"--figure-{name}: {colour}; " for name, colour in colours.items()) for colours in (light, dark))
    bright, dim = declared
    return f":root {{ {bright}}} @media screen and (prefers-color-scheme: dark) {{ :root {{ {dim}}} }}"


def _variables() -> dict[str, str]:
    named = {colour: f"figure-{flow}" for flow, colour in FLOW_COLOURS.items()}
    named |= {FIRST: "figure-forward", SECOND: "figure-second"}
    return {**named, INK: "text", MUTED: "muted", GRID: "grid", PAPER: "card", "#000000": "text"}


def flow_legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """Above everything else, the flows side by side."""
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), handlelength=2.4)
