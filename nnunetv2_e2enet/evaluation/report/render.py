"""Pages from the templates of this package."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nnunetv2_e2enet.evaluation.report.drawing import colour_variables


def render(template: str, **content: Any) -> str:
    """A whole page as text; words in ``content`` are escaped."""
    text: str = _environment().get_template(template).render(colour_variables=colour_variables(), **content)
    return text


@lru_cache(maxsize=1)
def _environment() -> Environment:
    loader = PackageLoader("nnunetv2_e2enet.evaluation.report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
