"""A figure for each view of a topology."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nnunetv2_e2enet.evaluation.report.drawing import INK, MUTED, PAPER, Chart, legend_above, new_figure, style
from nnunetv2_e2enet.evaluation.topology import measures
from nnunetv2_e2enet.evaluation.topology.architecture import architecture
from nnunetv2_e2enet.evaluation.topology.measures import FLOWS, MissingError
from nnunetv2_e2enet.evaluation.topology.sources import Fold
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
    stages, levels = max(n.stage for n in nodes), max(n.level for n in nodes) + 1
    epochs: list[int | None] = list(measures.common_epochs(folds)) or [None]
    figure, grid = new_figure(0.8 + max(0.72 * levels, 1.2), levels, stages)
    for row in grid:
        for axes in row:
            axes.set_axis_off()
    for node in nodes:
        axes = grid[node.level][node.stage - 1]
        axes.set_axis_on()
        for x, epoch in enumerate(epochs):
            shares = [node.shares(measures.records_at(fold, epoch)) for fold in folds]
            bottom = 0.0
            for flow, share in measures.mean_by_flow(shares).items():
                axes.bar(x, share, 0.86, bottom, color=FLOW_COLOURS[flow], edgecolor=PAPER, linewidth=0.8)
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
    legend_above(figure, {flow: Patch(color=FLOW_COLOURS[flow]) for flow in _present(folds[0])})
    return figure


def _thinned(labels: Sequence[str], characters: int) -> list[str]:
    """First and last alone, where all would run into each other."""
    if sum(len(label) for label in labels) <= characters:
        return list(labels)
    return [label if i in (0, len(labels) - 1) else "" for i, label in enumerate(labels)]


def _present(fold: Fold) -> list[str]:
    return [flow for flow in FLOWS if any(part.flow == flow for part in fold.history.parts)]


def _flow_lines(axes: Axes, fold: Fold, epochs: Sequence[int], values: Sequence[dict[str, float]], weight: float) -> None:
    for flow in _present(fold):
        axes.plot(
            epochs,
            [value[flow] for value in values],
            linestyle=FLOW_LINES[flow],
            color=FLOW_COLOURS[flow],
            linewidth=weight,
            marker=FLOW_MARKERS[flow],
            markersize=3 if len(epochs) < 30 else 0,
        )


def _line_legend(figure: Figure, fold: Fold) -> None:
    def handle(flow: str) -> Line2D:
        return Line2D([], [], color=FLOW_COLOURS[flow], linestyle=FLOW_LINES[flow], marker=FLOW_MARKERS[flow], markersize=4)

    legend_above(figure, {flow: handle(flow) for flow in _present(fold)})


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
        records = fold.history.records
        epochs = [record.epoch for record in records]
        weight = 1.8 if len(shown) == 1 else 1.0
        _flow_lines(density, fold, epochs, [measures.densities(fold, record) for record in records], weight)
        _flow_lines(importance, fold, epochs, [measures.importances(fold, record) for record in records], weight)
    density.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    density.set_ylabel("active connections")
    importance.set_ylabel(f"mean importance:\n{shown[0].history.importance}", wrap=True)
    importance.set_ylim(bottom=0)
    _epoch_axis(density, label=False)
    _epoch_axis(importance)
    _line_legend(figure, shown[0])
    return figure


def change(folds: Sequence[Fold]) -> Figure:
    """Connections that each update replaced, and the share that has been active so far."""
    shown = [fold for fold in folds if fold.logged("dsff_connections_changed")]
    if not shown:
        raise MissingError("the checkpoint's log has no values of DSFF; it was written by an earlier release")
    _check_changed(shown)
    figure, [[replaced], [explored]] = new_figure(4.0, 2)
    for fold in shown:
        active = sum(int(layer.mask.sum()) for layer in fold.connections.layers.values())
        changed = fold.logged("dsff_connections_changed")
        updates = [(epoch, value / active) for epoch, value in enumerate(changed) if value > 0]  # before this epoch's training
        replaced.vlines([x for x, _ in updates], 0, [y for _, y in updates], color=FIRST, linewidth=1.6, alpha=0.75)
        replaced.plot([x for x, _ in updates], [y for _, y in updates], "o", color=FIRST, markersize=3)
        values = fold.logged("dsff_explored")
        explored.plot(range(len(values)), values, color=FIRST)
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
        epochs = [record.epoch for record in fold.history.records]
        survivors = measures.survival(fold)
        values = [{kind: survivors[kind][i] for kind in survivors} for i in range(len(epochs))]
        _flow_lines(start, fold, epochs, values, 1.8 if len(shown) == 1 else 1.0)
        if "all layers" in survivors:
            start.plot(epochs, survivors["all layers"], "-o", color=INK, markersize=3, linewidth=1)
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
    if _present(shown[0]):
        _line_legend(figure, shown[0])
    return figure


def depth(folds: Sequence[Fold]) -> Figure:
    """Norm and density of each node's connections by the offset of the depth shift."""
    measures.fusion_network(folds)
    groups = [measures.depth_groups(fold) for fold in folds]
    if not groups[0]:
        raise MissingError("the maps of this network are not shifted along the depth (2D, or shift size 1)")
    rows = sorted({(group.stage, group.level) for group in groups[0]})
    offsets = sorted({group.offset for group in groups[0]})
    figure, [[norm, density]] = new_figure(1.4 + 0.23 * len(rows), 1, 2)
    handles = []
    for index, offset in enumerate(offsets):
        marker = "<" if offset < 0 else ">" if offset > 0 else "o"
        colour = OFFSET_COLOURS[offset] if OFFSET_COLOURS.keys() >= set(offsets) else _ramp(index, len(offsets))
        for axes, value in ((norm, "norm"), (density, "density")):
            points = [(x, y) for y, row in enumerate(rows) for x in _mean_of_group(groups, row, offset, value)]
            (handle,) = axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5.5)
        handles.append(handle)
    for axes in (norm, density):
        axes.grid(visible=True, axis="y")
        axes.set(ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        axes.xaxis.set_major_locator(MaxNLocator(3))
    norm.axvline(1, color=MUTED, linewidth=0.8)
    norm.set_yticklabels([f"stage {stage}, level {level}" for stage, level in rows])
    density.set_yticklabels([])
    norm.set_xlabel("kernel norm,\nmean of the node = 1")
    density.set_xlabel("active\nconnections")
    density.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    labels = [f"{offset:+d}" if offset else "0" for offset in offsets]
    columns = ceil(len(offsets) / ceil(len(offsets) / 5))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, title="moved by (slices)", handletextpad=0.1)
    return figure


def _ramp(index: int, count: int) -> str:
    """Offsets are in an order, and so are their colours, which can be seen on white and on black."""
    return to_hex(LinearSegmentedColormap.from_list("offsets", [FIRST, "#8a929c", SECOND])(index / max(count - 1, 1)))


def _mean_of_group(groups: Sequence[list[measures.DepthGroup]], row: tuple[int, int], offset: int, value: str) -> list[float]:
    """Over folds; none where no map of the node is moved by so much."""
    found = [getattr(g, value) for fold in groups for g in fold if (g.stage, g.level) == row and g.offset == offset]
    return [sum(found) / len(found)] if found else []


def agreement(folds: Sequence[Fold]) -> Figure:
    """Connections that two folds have in common, against chance."""
    if len(folds) < 2:
        raise MissingError(
            "there is one training here, and agreement takes two; give the model folder, once two folds are trained"
        )
    found = measures.agreements(folds)
    kinds = list(dict.fromkeys(item.kind for item in found))
    figure, [[axes]] = new_figure(1.0 + 0.36 * len(kinds))
    for y, kind in enumerate(kinds):
        items = [item for item in found if item.kind == kind]
        colour = FLOW_COLOURS.get(kind, MUTED)
        spread = [y + 0.22 * ((i + 0.5) / len(items) - 0.5) for i in range(len(items))]
        axes.plot([i.overlap for i in items], spread, FLOW_MARKERS.get(kind, "D"), color=colour, markersize=5, alpha=0.8)
        chance = sum(item.chance for item in items) / len(items)
        axes.plot([chance, chance], [y - 0.32, y + 0.32], color=INK, linewidth=2)
    axes.set(yticks=range(len(kinds)), yticklabels=kinds, ylim=(len(kinds) - 0.5, -0.5), xlim=(0, None))
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("connections in common")
    handles = [
        Line2D([], [], color=MUTED, marker="o", markersize=5, linestyle="none"),
        Line2D([], [], color=INK, linewidth=2),
    ]
    figure.legend(handles, ["a pair of folds", "chance"], loc="outside upper center", ncols=2)
    return figure


def losses(folds: Sequence[Fold]) -> Figure:
    """nnU-Net's training and validation loss, with the epochs at which the topology changed."""
    shown = [fold for fold in folds if fold.logged("train_losses")]
    if not shown:
        raise MissingError("the checkpoint has no log of losses")
    figure, [[axes]] = new_figure(2.7)
    for fold in shown:
        for key, colour, line in (("val_losses", SECOND, "--"), ("train_losses", FIRST, "-")):
            values = fold.logged(key)
            axes.plot(range(1, len(values) + 1), values, line, color=colour, linewidth=1.5 if len(shown) == 1 else 0.9)
    updates = measures.update_epochs(shown[0])
    for epoch in updates:
        axes.axvline(epoch, 0, 0.05, color=INK, linewidth=1.2 if len(updates) < 60 else 0.5)
    _epoch_axis(axes)
    axes.set_ylabel("loss")
    handles = [Line2D([], [], color=FIRST), Line2D([], [], color=SECOND, linestyle="--")]
    handles += [Line2D([], [], color=INK, marker="|", markersize=8, linestyle="none")]
    figure.legend(handles, ["training", "validation", "update"], loc="outside upper center", ncols=3)
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
        "For each pair of folds, connections that are active in both, over those that are active in one of them. The bar is "
        "the expected value for independent random topologies of the same densities.",
        agreement,
    ),
    "losses": (
        "Losses and updates",
        "nnU-Net's losses (Dice counts negative). Ticks at the bottom are updates of the topology. A line for each fold.",
        losses,
    ),
}
