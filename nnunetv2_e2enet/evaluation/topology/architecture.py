"""The network as a picture, drawn from its own modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from nnunetv2_e2enet.evaluation.report.drawing import INK, MUTED, PAPER, WIDTH_INCHES, legend_above, new_figure
from nnunetv2_e2enet.evaluation.topology import measures
from nnunetv2_e2enet.evaluation.topology.sources import Fold
from nnunetv2_e2enet.evaluation.topology.style import FLOW_COLOURS
from nnunetv2_e2enet.network.fusion import SOURCES

THICKEST = 7.0
"""Points, of the densest flow."""
_RADIUS = 0.27


def architecture(folds: Sequence[Fold]) -> Figure:
    """Nodes and flows; the width of a flow is its density, the mean over folds."""
    network = measures.fusion_network(folds)
    levels = len(network.encoder.output_channels)
    figure, [[axes]] = new_figure(1.5 + min(0.9 * levels, WIDTH_INCHES - 0.5))
    nodes = measures.nodes(folds[0])
    densities = measures.node_flows(folds, None)["density"]
    widest = densities.max()
    for (layer, flow), density in densities.items():
        node = nodes[layer]
        axes.plot(
            [node.stage - 1, node.stage],
            [node.level + SOURCES[flow], node.level],
            color=FLOW_COLOURS[flow],
            linewidth=max(THICKEST * density / widest, 0.3),
            solid_capstyle="butt",
            zorder=1,
        )
    for level in range(1, levels):
        axes.plot([0, 0], [level - 1, level], color=MUTED, linewidth=1, zorder=1)
    heads = len(network.decoder.seg_layers)
    for level, channels in enumerate(network.encoder.output_channels):
        _circle(axes, 0, level, channels, encoder=True)
        for stage in range(1, levels - level):
            _circle(axes, stage, level, channels, head=level < heads and stage == levels - 1 - level)
    axes.set(xlim=(-0.5, levels - 0.5), ylim=(levels - 0.5, -0.5), xticks=range(levels), yticks=range(levels))
    axes.set_aspect("equal")
    axes.set(xlabel="stage", ylabel="level")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    _legend(figure, axes, densities.index.unique("flow"), widest)
    return figure


def _circle(axes: Axes, stage: int, level: int, channels: int, encoder: bool = False, head: bool = False) -> None:
    if head:
        axes.add_patch(Circle((stage, level), _RADIUS + 0.06, facecolor=PAPER, edgecolor=INK, linewidth=1, zorder=2))
    edge = MUTED if encoder else INK
    axes.add_patch(Circle((stage, level), _RADIUS, facecolor=PAPER, edgecolor=edge, linewidth=1.2, zorder=3))
    axes.text(stage, level, str(channels), ha="center", va="center", fontsize=8, zorder=4)


def _legend(figure: Figure, axes: Axes, flows: Iterable[str], widest: float) -> None:
    for flow in flows:
        axes.plot([], [], color=FLOW_COLOURS[flow], linewidth=4, label=flow)
    legend_above(figure)
    shares = [widest / 8, widest / 2, widest]
    widths = [Line2D([], [], color=MUTED, linewidth=THICKEST * share / widest) for share in shares]
    labels = [f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" for share in shares]
    figure.legend(
        widths, labels, loc="outside lower center", ncols=3, title="active connections of the flow", handlelength=2.4
    )
