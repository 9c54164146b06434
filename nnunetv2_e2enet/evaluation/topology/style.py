"""Colours, lines and marks of the flows, which are never told apart by colour alone."""

from __future__ import annotations

from nnunetv2_e2enet.evaluation.overlay import LINE_STYLES
from nnunetv2_e2enet.evaluation.report.drawing import COLOURS
from nnunetv2_e2enet.evaluation.topology.sources import FLOWS

FLOW_COLOURS = dict(zip(FLOWS, (COLOURS["blue"], COLOURS["orange"], COLOURS["green"]), strict=True))
FLOW_LINES = dict(zip(FLOWS, LINE_STYLES, strict=True))
FLOW_MARKERS = dict(zip(FLOWS, "os^", strict=True))
FIRST, SECOND = COLOURS["blue"], COLOURS["vermillion"]
"""Of two curves that are no flows."""
