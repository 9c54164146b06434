"""The look of figures, drawn by matplotlib for paper and for pages, whose style gives them their colours."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from math import ceil
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunetv2_e2enet.evaluation.overlay import OKABE_ITO, legend_columns

WIDTH_INCHES = 4.3
FONT_SIZE = 9
DOTS_PER_INCH = 200
INK, MUTED, GRID, PAPER = "#1c2127", "#5b6570", "#e6e9ed", "#ffffff"
COLOURS = dict(zip(("orange", "sky", "green", "purple", "yellow", "blue", "vermillion"), OKABE_ITO, strict=True))
_IN_THE_DARK = {**COLOURS, "orange": "#f2b632", "sky": COLOURS["blue"], "green": "#2cc295", "blue": COLOURS["sky"]}
_VARIABLES = {
    **{colour: f"figure-{name}" for name, colour in COLOURS.items()},
    INK: "text",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "card",
    "#000000": "text",
}
"""Names of the page's variables for the colours of figures."""
_TIP = "tip:"

_SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": FONT_SIZE,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": FONT_SIZE,
    "lines.linewidth": 1.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "e2enet",
}


@dataclass(frozen=True)
class Chart:
    """A figure of a page.

    Attributes:
        key: name of its files, unlike that of any other figure of the page.
        title, caption: for people.
        figure: None where the data are missing; ``caption`` says which then.
        words: what a screen reader says in the place of the caption.
    """

    key: str
    title: str
    caption: str
    figure: Figure | None
    words: str = ""

    @property
    def svg(self) -> str:
        """An ``svg`` element; empty without a figure."""
        if self.figure is None:
            return ""
        return inline_svg(self.figure, self.key, f"{self.title}. {self.words or self.caption}")


def style() -> AbstractContextManager[None]:
    """Figures that are drawn and saved within have this look, whatever the user's own settings are."""
    return matplotlib.style.context(_SETTINGS, after_reset=True)


def new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[list[Axes]]]:
    """A figure of the common width and its axes, row by row."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def tip(artist: Artist, words: str) -> None:
    """Words that a page shows where the pointer rests on a part of a figure."""
    artist.set_gid(_TIP + words)


def png(figure: Figure) -> bytes:
    """A PNG of ``DOTS_PER_INCH``."""
    with style(), io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        return buffer.getvalue()


def svg(figure: Figure) -> str:
    """An SVG file, the same for the same figure."""
    with style(), io.StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="auto")
        return buffer.getvalue()


def inline_svg(figure: Figure, key: str, words: str) -> str:
    """An ``svg`` element for a page: its colours are the page's, so that it is dark in the dark.

    Args:
        figure: drawn with the colours of ``style``.
        key: unlike that of any other figure of the page.
        words: what a screen reader says; nothing where they are empty.
    """
    text = svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(rf"""<g id=(["']){_TIP}(.*?)\1>""", r"<g><title>\2</title>", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{key}-", text)
    for colour, variable in _VARIABLES.items():
        text = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{variable})", text, flags=re.IGNORECASE)
    opening = re.match(r"<svg[^>]*viewBox=\"([^\"]+)\"[^>]*>", text, flags=re.DOTALL)
    assert opening is not None
    role = f'role="img" aria-label="{escape(words)}"' if words else 'aria-hidden="true"'
    return f'<svg viewBox="{opening[1]}" {role}>{text[opening.end() :]}'.strip()


def colour_variables() -> str:
    """The style that says what the figures' colours are, in the light and in the dark."""
    bright, dim = (
        "".join(f"--figure-{name}: {colour}; " for name, colour in colours.items()) for colours in (COLOURS, _IN_THE_DARK)
    )
    return f":root {{ {bright}}} @media screen and (prefers-color-scheme: dark) {{ :root {{ {dim}}} }}"


def legend_above(figure: Figure, title: str | None = None) -> None:
    """The labels of all axes, each once, above everything else; rows are as few as there is room for, and equally full."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    rows = ceil(len(handles) / legend_columns(WIDTH_INCHES, handles, FONT_SIZE))
    columns = ceil(len(handles) / rows)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns, handlelength=2.4, title=title)
