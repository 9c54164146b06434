"""Tables of text, the same in the terminal and on pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


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
        """Words fold where the terminal is narrow, numbers do not."""
        title = Text(self.title, style="table.title") if self.title else None
        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.padding = (0, 1, 0, 0)
        for i, head in enumerate(self.head):
            table.add_column(Text(head), justify="left" if i < self.words else "right", overflow="fold")
        for row in self.rows:
            parts = [cell.partition("\n") for cell in row]
            table.add_row(*(Text.assemble(first, (line_break + rest, "dim")) for first, line_break, rest in parts))
        console.print(table)
