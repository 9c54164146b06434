"""Tables of text, the same in the terminal and on pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

GAP = 2
"""Characters that a table needs for each column beside those in it."""
FOLDED = 12
"""Characters at which words, and names above numbers, may be folded on a narrow terminal."""


@dataclass(frozen=True)
class Table:
    """A DataFrame of text.

    Attributes:
        title: for people; may be empty.
        frame: cells and heads as people read them; a line break divides a cell into a number and what belongs to it.
        words: how many columns from the left hold words, not numbers.
        total: whether the first row is set off from the others.
    """

    title: str
    frame: pd.DataFrame
    words: int = 1
    total: bool = False

    @classmethod
    def of(cls, title: str, head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, total: bool = False) -> Table:
        """From rows of text, in the order of ``head``, which may name two columns alike."""
        return cls(title, pd.DataFrame(list(rows), columns=list(head), dtype=object), words, total)

    @property
    def head(self) -> list[str]:
        """Names of the columns."""
        return [str(name) for name in self.frame.columns]

    @property
    def rows(self) -> list[list[str]]:
        """Cells, row by row."""
        cells: list[list[str]] = self.frame.to_numpy().tolist()
        return cells

    def print(self, console: Console) -> None:
        """Words fold where the terminal is narrow. Numbers do not: what has no room follows below, beside the words again."""
        every = range(len(self.head))
        heads = [_lengths([head]) for head in self.head]
        cells = [_lengths([row[i] for row in self.rows]) for i in every]
        if sum(max(heads[i].line, cells[i].line) + GAP for i in every) <= console.width:
            console.print(self._drawn(every, self.title))
            return
        words, numbers = every[: self.words], every[self.words :]
        widths = {i: max(cells[i].line, min(heads[i].word, FOLDED)) for i in numbers}
        room = console.width - sum(min(max(heads[i].word, cells[i].word), FOLDED) + GAP for i in words)
        for nth, part in enumerate(_parts(widths, room)):
            console.print(self._drawn([*words, *part], "" if nth else self.title, widths))

    def _drawn(self, columns: Sequence[int], title: str, widths: Mapping[int, int] | None = None) -> RichTable:
        """Some of the columns; those without a width are as wide as there is room."""
        heading = Text(title, style="table.title") if title else None
        table = RichTable(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.padding = (0, 1, 0, 0)
        for i in columns:
            width = (widths or {}).get(i)
            justify: JustifyMethod = "left" if i < self.words else "right"
            table.add_column(Text(self.head[i]), justify=justify, overflow="fold", width=width)
        for row in self.rows:
            parts = [row[i].partition("\n") for i in columns]
            table.add_row(*(Text.assemble(first, (line_break + rest, "dim")) for first, line_break, rest in parts))
        return table


class _Lengths(NamedTuple):
    """Characters of the longest line, and of the longest word."""

    line: int
    word: int


def _lengths(texts: Iterable[str]) -> _Lengths:
    lines = [line for text in texts for line in text.split("\n")]
    words = [word for line in lines for word in line.split()]
    return _Lengths(max(map(cell_len, lines), default=0), max(map(cell_len, words), default=0))


def _parts(widths: Mapping[int, int], room: int) -> list[list[int]]:
    """Columns in their order, as many in each part as there is room for, and at least one."""
    parts: list[list[int]] = [[]]
    for i, width in widths.items():
        if parts[-1] and sum(widths[j] + GAP for j in parts[-1]) + width + GAP > room:
            parts.append([])
        parts[-1].append(i)
    return parts
