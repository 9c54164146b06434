"""Small vector charts that take their colours from the page's style, so they are dark in the dark and print well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from nnunetv2_e2enet.evaluation.overlay import OKABE_ITO

MODEL_COLOURS = tuple(OKABE_ITO[i] for i in (5, 6, 2, 3, 1, 0, 4))
MODEL_COLOURS_IN_THE_DARK = tuple(OKABE_ITO[i] for i in (1, 6, 2, 3, 5, 0, 4))
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0, -1.1), (1.05, 0.8), (-1.05, 0.8)),
    "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
    "right": ((1, 0), (-1, 1), (-1, -1)),
}
MARKERS = ("circle", "square", "triangle", "diamond")
WIDTH = 400
TICKS = 5
CHARACTER = 6.2
"""Width of a character of the small font, to keep labels inside."""


def model_style(index: int) -> tuple[str, str]:
    """Colour and marker of a model; both differ, so that neither is needed alone."""
    return f"var(--model-{index % len(MODEL_COLOURS)})", MARKERS[index % len(MARKERS)]


def colour_variables() -> str:
    """The style that says what the models' colours are."""
    light, dark = (
        "".join(f"--model-{i}: {colour}; " for i, colour in enumerate(colours))
        for colours in (MODEL_COLOURS, MODEL_COLOURS_IN_THE_DARK)
    )
    return f":root {{ {light}}} @media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"


@dataclass(frozen=True)
class Axis:
    """Values to pixels.

    Attributes:
        low, high: values at the two ends.
        start, end: pixels at the two ends.
        logarithmic: both ends are above 0 then.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        position = (self._scaled(value) - self._scaled(self.low)) / (self._scaled(self.high) - self._scaled(self.low))
        return self.start + position * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    @property
    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if not self.logarithmic:
            return self._even_ticks
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 3 else (1,)
        ticks = [f * 10.0**d for d in decades for f in factors if self.low * 0.999 <= f * 10.0**d <= self.high * 1.001]
        return ticks if len(ticks) > 1 else self._even_ticks

    @property
    def _even_ticks(self) -> list[float]:
        step = _round_step((self.high - self.low) / TICKS)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)


def fitting_axis(values: Sequence[float], start: float, end: float, logarithmic: bool = False, margin: float = 0.06) -> Axis:
    """An axis around all values that can be shown, a little wider."""
    shown = [v for v in values if math.isfinite(v) and (v > 0 or not logarithmic)] or [1.0]
    low, high = min(shown), max(shown)
    if logarithmic:
        factor = (high / low) ** margin if high > low else 1.5
        return Axis(low / factor, high * factor, start, end, True)
    room = (high - low) * margin or max(abs(high) * 0.1, 0.01)
    return Axis(low - room, high + room, start, end)


@dataclass
class Chart:
    """An SVG that grows element by element.

    Attributes:
        title: for people who hear the page, with ``description``.
        height: of the drawing; its width is ``WIDTH``.
    """

    title: str
    description: str
    height: float
    elements: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "axis", colour: str | None = None) -> None:
        stroke = f' style="stroke:{colour}"' if colour else ""
        self.elements.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{stroke}/>')

    def text(self, x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> None:
        self.elements.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def vertical_text(self, x: float, y: float, words: str) -> None:
        place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle"'
        self.elements.append(f'<text class="label" {place}>{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, colour: str, kind: str = "box", tip: str = "") -> None:
        style = f"fill:{colour};stroke:{colour}"
        shape = f'class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" style="{style}"'
        self.elements.append(f"<rect {shape}>{_tip(tip)}</rect>" if tip else f"<rect {shape}/>")

    def path(self, points: Sequence[tuple[float, float]], colour: str, kind: str = "curve") -> None:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.elements.append(f'<polyline class="{kind}" points="{joined}" style="stroke:{colour}"/>')

    def mark(self, x: float, y: float, colour: str, marker: str, size: float = 5, kind: str = "mark", tip: str = "") -> None:
        outline = _OUTLINES[marker]
        if outline:
            points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in outline)
            tag, shape = "polygon", f'points="{points}"'
        else:
            tag, shape = "circle", f'cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"'
        opening = f'<{tag} {shape} class="{kind}" style="fill:{colour};stroke:{colour}"'
        self.elements.append(f"{opening}>{_tip(tip)}</{tag}>" if tip else f"{opening}/>")

    def frame(self, x: Axis, y: Axis, x_title: str, y_title: str, tick: Callable[[float], str] = "{:g}".format) -> None:
        """Grid, ticks and titles of a chart with two axes of numbers."""
        for value in x.ticks:
            self.line(x(value), y.start, x(value), y.end, "grid")
            self.text(x(value), y.start + 15, tick(value), kind="tick")
        for value in y.ticks:
            self.line(x.start, y(value), x.end, y(value), "grid")
            self.text(x.start - 6, y(value) + 4, f"{value:g}" if abs(value) < 1e6 else f"{value:.0e}", "end", "tick")
        self.line(x.start, y.start, x.end, y.start)
        self.line(x.start, y.start, x.start, y.end)
        self.text((x.start + x.end) / 2, y.start + 34, x_title, kind="label")
        self.vertical_text(13, (y.start + y.end) / 2, y_title)

    def render(self) -> str:
        """The ``svg`` element. Its title and description are what a screen reader says."""
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height:.0f}" role="img" aria-label="{escape(self.title)}. '
            f'{escape(self.description)}">{"".join(self.elements)}</svg>'
        )


def shortened(words: str, pixels: float) -> str:
    """``words``, cut to about so many pixels."""
    fitting = int(pixels / CHARACTER)
    return words if len(words) <= fitting else words[: max(fitting - 1, 1)] + "…"


def _tip(words: str) -> str:
    return f"<title>{escape(words)}</title>"
