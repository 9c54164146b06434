"""What the pages have in common: the frame, figures, and how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any


def document(title: str, heading: str, lead: str, sections: Mapping[str, str], style: str = "", legend: str = "") -> str:
    """A whole page as text. It loads nothing: style and pictures are in it.

    Args:
        title: of the window.
        heading, lead: what the page begins with.
        sections: HTML by title; those without content are left out.
        style: CSS beside the common one.
        legend: HTML that follows the links to the sections.
    """
    present = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in present)
    bodies = "".join(f'<section id="{_anchor(name)}"><h2>{name}</h2>{body}</section>' for name, body in present.items())
    common = files("nnunetv2_e2enet.evaluation.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{common}{style}</style></head><body>"
        f'<header><h1>{escape(heading)}</h1><p class="lead">{escape(lead)}</p><nav aria-label="Sections">{links}</nav>'
        f"{legend}</header>"
        f"<main>{bodies}</main></body></html>\n"
    )


def figure(title: str, drawing: str, note: str = "") -> str:
    """A framed drawing (HTML or SVG) with its title above and a note below."""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{drawing}{caption}</figure>"


def figures(parts: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="charts">{"".join(parts)}</div>'


def provenance_list(provenance: Mapping[str, Any]) -> str:
    """Command, machine and versions."""
    machine = provenance["machine"]
    words = [machine["processor"], f"{machine['cores']} cores", machine["gpu"], machine["system"]]
    facts = {
        "command": f"<code>{escape(str(provenance['command']))}</code>",
        "machine": escape(", ".join(str(word) for word in words if word)),
        "versions": escape(", ".join(f"{name} {version}" for name, version in provenance["versions"].items())),
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{text}</dd>' for name, text in facts.items())}</dl>"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
