"""A figure for each view of a topology."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nnunetv2_e2enet.evaluation.report.drawing import INK, MUTED, PAPER, Chart, legend_above, new_figure, style
from nnunetv2_e2enet.evaluation.topology import measures
from nnunetv2_e2enet.evaluation.topology.architecture import architecture
from nnunetv2_e2enet.evaluation.topology.measures import MissingError
from nnunetv2_e2enet.evaluation.topology.sources import FLOWS, Fold
from nnunetv2_e2enet.evaluation.topology.style import FIRST, FLOW_COLOURS, FLOW_LINES, FLOW_MARKERS, SECOND

OFFSET_COLOURS = {-1: FLOW_COLOURS["forward"], 0: FLOW_COLOURS["upward"], 1: FLOW_COLOURS["downward"]}


def views(folds: Sequence[Fold]) -> list[Chart]:
    """All of them, in the order of the page."""
    with style():
        return [_view(key, title, caption, draw, folds) for key, (title, caption, draw) in VIEWS.items()]


def _view(key: str, title: str, caption: str, draw: Callable[[Sequence[Fold]], Figure], folds: Sequence[Fold]) -> Chart:
    try:
        return Chart(key, title, caption, draw(folds))
    except MissingError as missing:
        return Chart(key, title, f"Not shown: {missing}.", None)


def _with_history(folds: Sequence[Fold]) -> list[Fold]:
    found = [fold for fold in folds if fold.has_history]
    if not found:
        raise MissingError(folds[0].why_no_history)
    return found


def _check_changed(folds: Sequence[Fold]) -> None:
    if not any(measures.update_epochs(fold) for fold in folds):
        raise MissingError("the topology has not changed")


def flow_shares(folds: Sequence[Fold]) -> Figure:
    """The paper's picture: a triangle of nodes, in each a stacked bar for each of several epochs."""
    measures.fusion_network(folds)
    nodes = measures.nodes(folds[0])
    stages, levels = max(n.stage for n in nodes.values()), max(n.level for n in nodes.values()) + 1
    epochs: list[int | None] = list(measures.common_epochs(folds)) or [None]
    shares = pd.concat({epoch: measures.node_flows(folds, epoch)["share"] for epoch in epochs}, axis=1)
    figure, grid = new_figure(0.8 + max(0.72 * levels, 1.2), levels, stages)
    for row in grid:
        for axes in row:
            axes.set_axis_off()
    for layer, node in nodes.items():
        axes = grid[node.level][node.stage - 1]
        axes.set_axis_on()
        bottom = np.zeros(len(epochs))
        for flow, share in shares.loc[layer].iterrows():
            style = {"color": FLOW_COLOURS[flow], "edgecolor": PAPER, "linewidth": 0.8, "label": flow}
            axes.bar(range(len(epochs)), share, 0.86, bottom, **style)
            bottom += share
        axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], xticks=range(len(epochs)), xlim=(-0.55, len(epochs) - 0.45))
        axes.tick_params(length=2, pad=2)
        axes.set_yticklabels(["0", "50", "100"] if node.stage == 1 else [])
        lowest = node.level + node.stage == stages
        labels = ["end" if epoch is None else str(epoch) for epoch in epochs]
        axes.set_xticklabels(_thinned(labels, 6 if stages < 4 else 4) if lowest else [])
        if node.level == 0:
            axes.set_title(f"stage {node.stage}", fontsize=9)
        if node.stage == 1:
            axes.set_ylabel(f"level {node.level}")
    figure.supylabel("share (%)", fontsize=9)
    figure.supxlabel("epoch", fontsize=9)
    legend_above(figure)
    return figure


def _thinned(labels: Sequence[str], characters: int) -> list[str]:
    """First and last alone, where all would run into each other."""
    if sum(len(label) for label in labels) <= characters:
        return list(labels)
    return [label if i in (0, len(labels) - 1) else "" for i, label in enumerate(labels)]


def _flow_lines(axes: Axes, values: pd.DataFrame, weight: float) -> None:
    """A line for each flow of which there are values, by epoch."""
    for flow in FLOWS:
        if flow in values:
            axes.plot(
                values[flow],
                linestyle=FLOW_LINES[flow],
                color=FLOW_COLOURS[flow],
                linewidth=weight,
                marker=FLOW_MARKERS[flow],
                markersize=3 if len(values) < 30 else 0,
                label=flow,
            )


def _epoch_axis(axes: Axes, label: bool = True) -> None:
    axes.grid(visible=True, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)
    if label:
        axes.set_xlabel("epochs trained")


def evolution(folds: Sequence[Fold]) -> Figure:
    """Density of each flow over the epochs, and mean importance of its connections."""
    measures.fusion_network(folds)
    shown = _with_history(folds)
    _check_changed(shown)
    figure, [[density], [importance]] = new_figure(4.2, 2)
    for fold in shown:
        curves, weight = measures.curves(fold), 1.8 if len(shown) == 1 else 1.0
        _flow_lines(density, curves["density"], weight)
        _flow_lines(importance, curves["importance"], weight)
    density.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    density.set_ylabel("active connections")
    importance.set_ylabel(f"mean importance:\n{shown[0].history.importance}", wrap=True)
    importance.set_ylim(bottom=0)
    _epoch_axis(density, label=False)
    _epoch_axis(importance)
    legend_above(figure)
    return figure


def change(folds: Sequence[Fold]) -> Figure:
    """Connections that each update replaced, and the share that has been active so far."""
    shown = [fold for fold in folds if fold.logged("dsff_connections_changed")]
    if not shown:
        raise MissingError("the checkpoint's log has no values of DSFF; it was written by an earlier release")
    _check_changed(shown)
    figure, [[replaced], [explored]] = new_figure(4.0, 2)
    for fold in shown:
        changed = pd.Series(fold.logged("dsff_connections_changed"))  # before this epoch's training
        updates = changed[changed > 0] / fold.at()["active"].sum()
        replaced.vlines(updates.index, 0, updates, color=FIRST, linewidth=1.6, alpha=0.75)
        replaced.plot(updates, "o", color=FIRST, markersize=3)
        explored.plot(fold.logged("dsff_explored"), color=FIRST)
    for axes, label in ((replaced, "connections replaced"), (explored, "explored so far")):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        _epoch_axis(axes, label=axes is explored)
    replaced.sharex(explored)
    return figure


def survival(folds: Sequence[Fold]) -> Figure:
    """Survival of the connections of the start, and of those of each update."""
    shown = [fold for fold in _with_history(folds) if fold.history.records[0].epoch == 0]
    if not shown:
        raise MissingError("the history does not go back to the start of the training")
    _check_changed(shown)
    figure, [[start], [each]] = new_figure(4.4, 2)
    for fold in shown:
        survivors = measures.curves(fold)["survival"]
        _flow_lines(start, survivors, 1.8 if len(shown) == 1 else 1.0)
        if "all layers" in survivors:
            start.plot(survivors["all layers"], "-o", color=INK, markersize=3, linewidth=1)
        cohorts = measures.cohorts(fold)
        each.plot(list(cohorts), list(cohorts.values()), "-o", color=INK, markersize=3, linewidth=1)
    start.set_ylabel("of the start,\nstill active")
    each.set_ylabel("active at the end")
    each.set_xlabel("switched on after so many epochs")
    for axes in (start, each):
        _epoch_axis(axes, label=False)
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    start.set_xlabel("epochs trained")
    if shown[0].network is not None:
        legend_above(figure)
    return figure


def depth(folds: Sequence[Fold]) -> Figure:
    """Norm and density of each node's connections by the offset of the depth shift."""
    measures.fusion_network(folds)
    groups = pd.concat([measures.depth_groups(fold) for fold in folds])
    if groups.empty:
        raise MissingError("the maps of this network are not shifted along the depth (2D, or shift size 1)")
    means = groups.groupby(["stage", "level", "offset"])[["norm", "density"]].mean().unstack()
    offsets = list(means["norm"])
    figure, [[norm, density]] = new_figure(1.4 + 0.23 * len(means), 1, 2)
    for index, offset in enumerate(offsets):
        marker = "<" if offset < 0 else ">" if offset > 0 else "o"
        colour = OFFSET_COLOURS[offset] if OFFSET_COLOURS.keys() >= set(offsets) else _ramp(index, len(offsets))
        label = f"{offset:+d}" if offset else "0"
        for axes, value in ((norm, "norm"), (density, "density")):
            axes.plot(means[value, offset], range(len(means)), marker, color=colour, markersize=5.5, label=label)
    for axes in (norm, density):
        axes.grid(visible=True, axis="y")
        axes.set(ylim=(len(means) - 0.4, -0.6), yticks=range(len(means)))
        axes.xaxis.set_major_locator(MaxNLocator(3))
    norm.axvline(1, color=MUTED, linewidth=0.8)
    norm.set_yticklabels([f"stage {stage}, level {level}" for stage, level in means.index])
    density.set_yticklabels([])
    norm.set_xlabel("kernel norm,\nmean of the node = 1")
    density.set_xlabel("active\nconnections")
    density.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    legend_above(figure, "moved by (slices)")
    return figure


def _ramp(index: int, count: int) -> str:
    """Offsets are in an order, and so are their colours, which can be seen on white and on black."""
    return to_hex(LinearSegmentedColormap.from_list("offsets", [FIRST, "#8a929c", SECOND])(index / max(count - 1, 1)))


def agreement(folds: Sequence[Fold]) -> Figure:
    """Connections that two folds have in common, against chance."""
    if len(folds) < 2:
        raise MissingError(
            "there is one training here, and agreement takes two; give the model folder, once two folds are trained"
        )
    found = measures.agreements(folds)
    kinds = list(found["kind"].unique())
    figure, [[axes]] = new_figure(1.0 + 0.36 * len(kinds))
    axes.plot([], [], "o", color=MUTED, markersize=5, label="a pair of folds")
    for y, (kind, pairs) in enumerate(found.groupby("kind", observed=True)):
        spread = y + 0.22 * ((np.arange(len(pairs)) + 0.5) / len(pairs) - 0.5)
        colour = FLOW_COLOURS.get(kind, MUTED)
        axes.plot(pairs["overlap"], spread, FLOW_MARKERS.get(kind, "D"), color=colour, markersize=5, alpha=0.8)
        chance = pairs["chance"].mean()
        axes.plot([chance, chance], [y - 0.32, y + 0.32], color=INK, linewidth=2, label="chance")
    axes.set(yticks=range(len(kinds)), yticklabels=kinds, ylim=(len(kinds) - 0.5, -0.5), xlim=(0, None))
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("connections in common")
    legend_above(figure)
    return figure


def losses(folds: Sequence[Fold]) -> Figure:
    """nnU-Net's training and validation loss, with the epochs at which the topology changed."""
    shown = [fold for fold in folds if fold.logged("train_losses")]
    if not shown:
        raise MissingError("the checkpoint has no log of losses")
    figure, [[axes]] = new_figure(2.7)
    for fold in shown:
        for key, label, colour, line in (
            ("train_losses", "training", FIRST, "-"),
            ("val_losses", "validation", SECOND, "--"),
        ):
            values, width = fold.logged(key), 1.5 if len(shown) == 1 else 0.9
            axes.plot(range(1, len(values) + 1), values, line, color=colour, linewidth=width, label=label)
    updates = measures.update_epochs(shown[0])
    for epoch in updates:
        axes.axvline(epoch, 0, 0.05, color=INK, linewidth=1.2 if len(updates) < 60 else 0.5)
    axes.plot([], [], "|", color=INK, markersize=8, label="update")
    _epoch_axis(axes)
    axes.set_ylabel("loss")
    legend_above(figure)
    return figure


VIEWS: dict[str, tuple[str, str, Callable[[Sequence[Fold]], Figure]]] = {
    "architecture": (
        "The network that was learned",
        "Columns are stages (0 is the encoder), rows are levels, numbers are channels. The width of a line is the share "
        "of its flow's connections that are active: thick flows have kept or gained connections. Double circles have an "
        "output.",
        architecture,
    ),
    "flow_shares": (
        "Where the connections of each node come from",
        "Share of each direction in the active connections of a fusion node, at several epochs of the history (0 is the "
        "random start, with the shares of the channels). Without a history: in the checkpoint (end).",
        flow_shares,
    ),
    "evolution": (
        "Flows over the training",
        "Above: active connections of each flow over all its connections, in all nodes together. Below: mean "
        "importance of the connections that stayed active, by the criterion of the training. A line for each fold.",
        evolution,
    ),
    "change": (
        "What the updates changed",
        "Above: connections that each update replaced, over the active ones. Below: connections that have been active at any "
        "time, over all connections.",
        change,
    ),
    "survival": (
        "How long connections live",
        "Above: share of the connections of the random start that have been active ever since. Below: share of the "
        "connections switched on after so many epochs (0 is the start) that are active in the checkpoint.",
        survival,
    ),
    "depth": (
        "Importance by depth group",
        "The depth shift moves the input maps of a node in groups, each by a number of slices. Left: mean L1 norm of the "
        "active kernels of each group, over that of the whole node. Right: its active connections over all of them.",
        depth,
    ),
    "agreement": (
        "Agreement of the folds",
        "For each pair of folds, connections that are active in both, over the mean number of active ones. The bar is the "
        "expected value for independent random topologies of the same densities.",
        agreement,
    ),
    "losses": (
        "Losses and updates",
        "nnU-Net's losses (Dice counts negative). Ticks at the bottom are updates of the topology. A line for each fold.",
        losses,
    ),
}
