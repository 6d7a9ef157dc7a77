"""The figures of a report, drawn with the colors of Okabe and Ito, which color-blind readers tell apart.

In: records of runs, results of `prosparse measure`. Out: matplotlib figures; None where there is no data for one.
With one run colors tell its models apart, with several they tell the runs apart and markers the models.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from math import isfinite, nan
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prosparse.records import Record
from prosparse.records import number as number_of
from prosparse.telemetry import AFTER_TRAINING

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
GRAY = "#666666"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
LINES = ("-", "--", ":", "-.")  # after seven series the colors begin again with another line
COLORS = {
    "base": "#999999", "substituted": ORANGE, "training": BLUE, "trained": BLUE,
    "shifted": VERMILION, "recovered": GREEN, "exported": BLACK,
}  # fmt: skip
MARKERS = {
    "base": "s", "substituted": "^", "training": "v", "trained": "o", "shifted": "D", "recovered": "P", "exported": "x",
}  # fmt: skip
SIZES = {
    "base": 9,
    "training": 10,
    "trained": 10,
    "shifted": 14,
    "recovered": 12,
    "exported": 7,
}  # of equal points all show
GRANULARITIES = {"model": (SKY, "o"), "layer": (ORANGE, "v"), "neuron": (PURPLE, "*")}
DOTS_PER_INCH = 130

# --- over the steps ---------------------------------------------------------------------------------------------------


def training(records: Sequence[Record]) -> Figure | None:
    """Loss, λ, sparsity and, of one run, the learning rate over the steps."""
    shown = [record for record in records if record.train_rows]
    if not shown:
        return None
    return _one_training(shown[0]) if len(shown) == 1 else _several_trainings(shown, records)


def _one_training(record: Record) -> Figure:
    train, held_out = record.train_rows, _held_out(record)
    figure = Figure(figsize=(9, 8.5), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[3, 2, 3, 1.4])
    dot = "." if len(train) < 50 else ""
    lines = (("loss", 1, BLUE), ("l1_factor", 1, GREEN), ("sparsity", 100, BLUE), ("lr", 1, GRAY))
    for axes, (key, scale, color) in zip(panels, lines, strict=True):
        axes.plot(_column(train, "step"), _column(train, key, scale), dot + "-", color=color, lw=1.3, label="training")
        if key == "sparsity" and any(row.get("target") is not None for row in train):
            axes.plot(_column(train, "step"), _column(train, "target", scale), "--", color=GRAY, lw=1.3)
            axes.lines[-1].set_label("set-point")
        if held_out and key in ("loss", "sparsity"):
            axes.plot(_column(held_out, "step"), _column(held_out, key, scale), "D", color=VERMILION, ms=5)
            axes.lines[-1].set_label("held out")
        frame(axes)
    labels = ("loss (nats per token)", "L1 factor λ\n(unit of the recipe)", "sparsity (%)", "learning\nrate")
    for axes, name in zip(panels, labels, strict=True):
        axes.set_ylabel(name)
    for axes, place in ((panels[0], "upper right"), (panels[2], "lower right")):
        axes.legend(loc=place)
    panels[2].set_ylim(-3, 103)
    panels[3].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _steps(panels[3])
    mark_stages(figure, panels, train)
    figure.align_ylabels()
    return figure


def _several_trainings(shown: Sequence[Record], records: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(9, 8.5), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 3])
    handles = []
    span = max(1, max(len(record.train_rows) for record in shown) // 20)  # steps of the running mean of the loss
    for record in shown:
        train, held_out = record.train_rows, _held_out(record)
        color, style = _series(records.index(record))
        handles.append(Line2D([], [], color=color, ls=style, lw=2, label=record.name))
        for axes, (key, scale) in zip(panels, (("loss", 1), ("l1_factor_mean", 1), ("sparsity", 100)), strict=True):
            values = _column(train, key, scale)
            axes.plot(
                _column(train, "step"), _smooth(values, span) if key == "loss" else values, style, color=color, lw=1.3
            )
            if key != "l1_factor_mean":
                axes.plot(_column(held_out, "step"), _column(held_out, key, scale), color=color, lw=0.8, ls=":")
                axes.plot(
                    _column(held_out, "step"), _column(held_out, key, scale), "D", color=color, ms=5.5, mec="white"
                )
            if key == "sparsity":
                axes.plot(_column(train, "step"), _column(train, "target", scale), "--", color=color, lw=0.9, alpha=0.6)
    names = (f"loss (nats per token,\nmean of {span} steps)", "L1 factor λ\n(x mean |x1|)", "sparsity (%)")
    for axes, name in zip(panels, names, strict=True):
        axes.set_ylabel(name)
        frame(axes)
    handles.append(Line2D([], [], color=GRAY, marker="D", ls=":", ms=5.5, label="held out"))
    if any(row.get("target") is not None for record in shown for row in record.train_rows):
        handles.append(Line2D([], [], color=GRAY, ls="--", lw=0.9, label="set-point"))
    panels[2].set_ylim(-3, 103)
    _steps(panels[2])
    _legend_above(figure, handles)
    figure.align_ylabels()
    return figure


def _held_out(record: Record) -> list[dict[str, Any]]:
    """Evaluations of the training's own curve; at step 0 substituted, which comes after base."""
    rows = [row for row in record.rows if row["kind"] == "evaluation" and row.get("model") not in AFTER_TRAINING]
    return list({row["step"]: row for row in rows}.values())


def mark_stages(figure: Figure, panels: Any, train: list[dict[str, Any]]) -> None:
    """A line where a stage ends, its name above its middle: upright where the names would not fit side by side."""
    low, high = panels[0].get_xlim()
    per_point = (high - low) / (72 * 0.88 * figure.get_size_inches()[0])  # steps
    stages = [(name, [row["step"] for row in group]) for name, group in groupby(train, key=lambda row: row["stage"])]
    middles = [(steps[0] + steps[-1]) / 2 for _, steps in stages]
    for _, steps in stages[1:]:
        for axes in panels:
            axes.axvline(steps[0] - 0.5, color="#BBBBBB", lw=0.9, zorder=0)
    halves = [0.5 * 5.5 * (len(name) + 2) * per_point for name, _ in stages]
    gaps = [right - left for left, right in pairwise(middles)]
    upright = any(gap < a + b for gap, a, b in zip(gaps, halves, halves[1:], strict=False))
    position = low
    for (name, _), middle in zip(stages, middles, strict=True):
        position = max(middle, position + 12 * per_point) if upright else middle
        panels[0].annotate(
            name,
            (position, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=GRAY,
            rotation=90 if upright else 0,
        )


# --- models side by side ----------------------------------------------------------------------------------------------


def frontier(records: Sequence[Record]) -> Figure | None:
    """Perplexity against sparsity: a point a model on held-out text, a line a sweep of the shift on its own rows.

    Without the substituted model: nothing has been trained at that point, and its perplexity would hide the others.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    handles, kinds, seen, base = [], {}, [], set()
    for number, record in enumerate(records):
        color, style = _series(number)
        points = {name: model for name, model in record.models.items() if name != "substituted"}
        points = {name: model for name, model in points.items() if _point(model) is not None}
        own = [name for name in points if name != "base"]
        if own and len(records) > 1:
            handles.append(Line2D([], [], color=color, ls=style, lw=2, label=record.name))
        for name, model in points.items():
            x, y = _point(model) or (nan, nan)
            if name == "base" and (x, y) in base:
                continue
            base |= {(x, y)} if name == "base" else set()
            color_of = COLORS["base"] if name == "base" else COLORS[name] if len(records) == 1 else color
            how: dict = {"marker": MARKERS[name], "ls": "none", "mfc": "none", "ms": SIZES[name], "mew": 2}
            axes.plot(x, y, color=color_of, zorder=3, **how)
            kinds[name] = Line2D([], [], color=color_of if len(records) == 1 else GRAY, label=name, **how)
            seen.append(y)
        for granularity, tried in _sweeps(record.report.get("shift")):
            line = sorted(point for row in tried if (point := _point(row)) is not None)
            if len(line) > 1:
                hue, mark = GRANULARITIES[granularity]
                how = {"marker": mark, "lw": 1.1, "ms": 4, "alpha": 0.7}
                axes.plot(*zip(*line, strict=True), color=hue if len(records) == 1 else color, zorder=2, **how)
                name = f"shift by {granularity}"
                kinds[name] = Line2D([], [], color=hue if len(records) == 1 else GRAY, label=name, **how)
                seen += [y for _, y in line]
    if not seen:
        return None
    if max(seen) > 10 * min(seen):
        _logarithmic(axes)
    axes.set(xlabel="sparsity (%)", ylabel="perplexity" + " (log scale)" * (max(seen) > 10 * min(seen)))
    axes.margins(0.06)
    frame(axes, both=True)
    order = [*MARKERS, *(name for name in kinds if name not in MARKERS)]
    _legend_above(figure, handles + [kinds[name] for name in order if name in kinds])
    return figure


def _sweeps(shift: dict[str, Any] | None) -> list[tuple[str, list[dict[str, Any]]]]:
    """(granularity, what was tried) of a shift."""
    found = shift or {}
    tried = found.get("allocations") or []
    return [("model", found.get("sweep") or []), *([(str(found["granularity"]), tried)] if tried else [])]


def _point(model: dict[str, Any]) -> tuple[float, float] | None:
    """(sparsity in %, perplexity), if both were measured."""
    x, y = model.get("sparsity"), model.get("perplexity")
    return None if x is None or y is None or not isfinite(y) else (100 * x, y)


def layers(records: Sequence[Record]) -> Figure | None:
    """Sparsity by layer: of every model of one run, or of the newest model of each of several."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    lines: list[tuple[str, dict[str, Any], str, str, str]] = []
    if len(records) == 1:
        lines = [(name, model, COLORS[name], "-", MARKERS[name]) for name, model in records[0].models.items()]
    else:
        for number, record in enumerate(records):
            if record.models:
                name = record.last or list(record.models)[-1]
                lines.append((f"{record.name}, {name}", record.models[name], *_series(number), MARKERS[name]))
    lines = [line for line in lines if line[1].get("sparsity_by_layer")]
    for number, (name, model, color, style, mark) in enumerate(lines):  # each thinner than the one below it
        shares = [_scaled(share) for share in model["sparsity_by_layer"]]
        thin = min(number, 4) if len(records) == 1 else 2.5
        axes.plot(
            range(len(shares)),
            shares,
            marker=mark,
            color=color,
            ls=style,
            lw=4.2 - 0.8 * thin,
            ms=10 - 1.2 * thin,
            mfc="none",
            alpha=0.9,
            label=f"{name} ({number_of(_scaled(model['sparsity']), '.1f', ' %')})",
        )
    if not lines:
        return None
    axes.set(xlabel="layer", ylabel="sparsity (%)", ylim=(-4, 104))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    frame(axes)
    _legend_above(figure, axes.lines)
    return figure


def shift(records: Sequence[Record]) -> Figure | None:
    """What each threshold of the sweeps gave on the calibration rows."""
    shown = [
        (n, record.report["shift"]) for n, record in enumerate(records) if _sweeps(record.report.get("shift"))[0][1]
    ]
    if not shown:
        return None
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    handles, perplexities = [], []
    for number, found in shown:
        sweep = sorted(found["sweep"], key=lambda point: point["threshold"])
        color, style = _series(number)
        for axes, key, scale in zip(panels, ("sparsity", "perplexity"), (100, 1), strict=True):
            axes.plot(_column(sweep, "threshold"), _column(sweep, key, scale), "o", ls=style, color=color, lw=1.5, ms=5)
            mark = VERMILION if len(shown) == 1 else color
            axes.axvline(found["threshold"], color=mark, lw=1.3, ls="--")
        budget = found.get("budget")
        told = "" if budget is None else f", budget {100 * budget:.3g} %"
        whole = "for the whole model" if found.get("granularity", "model") != "model" else "chosen"
        name = whole if len(shown) == 1 else records[number].name
        handles.append(Line2D([], [], color=mark, ls="--", marker="o" if len(shown) > 1 else "", lw=1.3, ms=5))
        handles[-1].set_label(f"{name}: {found['threshold']:.4g}{told}")
        perplexities += [value for value in _column(sweep, "perplexity") if isfinite(value)]
    if perplexities and max(perplexities) > 10 * min(perplexities):
        _logarithmic(panels[1])
    for axes, name in zip(panels, ("sparsity (%)", "perplexity"), strict=True):
        axes.set_ylabel(name)
        frame(axes)
    panels[1].set_xlabel("threshold (of the gate)")
    _legend_above(figure, handles)
    figure.align_ylabels()
    return figure


def thresholds(records: Sequence[Record], measured: Sequence[dict[str, Any]]) -> Figure | None:
    """The rise of the perplexity against sparsity by granularity, of the shifts of runs and of `prosparse shift`."""
    named = [(record.name, record.report.get("shift")) for record in records]
    named += [(title(result), result.get("shift")) for result in measured]
    found = [(name, shift) for name, shift in named if shift and any(_rises(shift).values())]
    if not found:
        return None
    figure = Figure(figsize=(9, 5.8), layout="constrained")
    axes, handles, seen, shown = figure.subplots(), [], [], []
    budgets = sorted({100 * shift["budget"] for _, shift in found if shift.get("budget")})
    limit = 4 * budgets[-1] if budgets else float("inf")
    for number, (name, shift) in enumerate(found):
        for granularity, line in _rises(shift).items():
            if not line or line in seen:  # the same sweep of the whole model, once
                continue
            seen.append(line)
            color, mark = GRANULARITIES[granularity]
            how: dict = {"color": color, "marker": mark, "ls": LINES[number % len(LINES)], "lw": 1.6, "ms": 7}
            axes.plot(*zip(*line, strict=True), **how)
            what = "of the whole model" if granularity == "model" else f"by {granularity}"
            label = what if len(found) == 1 else f"{name}, {what}"
            handles.append(Line2D([], [], label=label, **how))
            shown += [point for point in line if point[1] <= limit]
            within = [point for point in line if point[1] <= 100 * (shift.get("budget") or 0)]
            if within and shift.get("budget"):
                axes.plot(*max(within), "o", color=BLACK, mfc="none", ms=13, mew=1.3, zorder=3)
    for budget in budgets:
        axes.axhline(budget, color=GRAY, ls="--", lw=1.2)
        handles.append(Line2D([], [], color=GRAY, ls="--", lw=1.2, label=f"budget {budget:.3g} %"))
    xlim, ylim = (_with_margin(values) for values in zip(*shown, strict=True))
    axes.set(xlim=xlim, ylim=ylim)
    axes.set(xlabel="sparsity (%)", ylabel="rise of the perplexity (%)")
    frame(axes, both=True)
    _legend_above(figure, handles)
    return figure


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.05 * (max(values) - min(values)) + 1e-9
    return min(values) - margin, max(values) + margin


def _rises(shift: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """By granularity (sparsity, rise of the perplexity) in %, over the perplexity at the lowest threshold."""
    sweep = sorted(shift.get("sweep") or [], key=lambda row: row["threshold"])
    dense = _point(sweep[0]) if sweep else None
    if dense is None:
        return {}
    points = {name: [point for row in tried if (point := _point(row))] for name, tried in _sweeps(shift)}
    return {name: sorted((x, 100 * (y / dense[1] - 1)) for x, y in line) for name, line in points.items()}


# --- measurements -----------------------------------------------------------------------------------------------------


def texts(measured: Sequence[dict[str, Any]]) -> Figure | None:
    """Sparsity by text, as bars, and of each model by layer and text."""
    shown = [result for result in measured if result.get("texts")]
    names = list(dict.fromkeys(name for result in shown for name in result["texts"]))
    if not names:
        return None
    # A dense model has no curve worth a panel, and one text has its curve in the figure by layer.
    curves = [result for result in shown if len(names) > 1 and (result["sparsity"] or 0) > 0.01]
    figure = Figure(figsize=(9, 3.4 + 2.7 * len(curves)), layout="constrained")
    panels = figure.subplots(1 + len(curves), 1, squeeze=False)[:, 0]
    width = 0.8 / len(shown)
    for number, result in enumerate(shown):
        places, heights = [], []
        for place, name in enumerate(names):
            if name in result["texts"]:
                places.append(place + (number - (len(shown) - 1) / 2) * width)
                heights.append(_scaled(result["texts"][name]["sparsity"]))
        bars = panels[0].bar(places, heights, 0.92 * width, color=SERIES[number % len(SERIES)], label=title(result))
        panels[0].bar_label(bars, fmt="%.1f", fontsize=8 if len(shown) * len(names) < 16 else 6, padding=2)
    panels[0].set(ylabel="sparsity (%)", ylim=(0, 109), xticks=range(len(names)), xticklabels=names)
    frame(panels[0])
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)
    for axes, result in zip(panels[1:], curves, strict=True):
        for number, name in enumerate(names):
            shares = (result["texts"].get(name) or {}).get("sparsity_by_layer") or []
            color, style = _series(number)
            axes.plot([_scaled(share) for share in shares], marker=".", color=color, ls=style, lw=1.3, label=name)
        axes.set(ylabel="sparsity (%)", xlabel="layer", ylim=(-4, 104))
        axes.set_title(title(result), fontsize=10, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
        frame(axes)
    return figure


def top_k(measured: Sequence[dict[str, Any]]) -> Figure | None:
    """Perplexity when only the largest share of each token's neurons is kept, and the sparsity of CETT-PPL."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes, handles, values = figure.subplots(), [], []
    for number, result in enumerate(measured):
        color, style = _series(number)
        curve = [row for row in result.get("top_k") or [] if row["perplexity"] is not None]
        if curve:
            text = f"{title(result)}, on {curve[0]['text']}"
            axes.plot(_column(curve, "percent"), _column(curve, "perplexity"), "o", ls=style, color=color, lw=1.5, ms=5)
            handles.append(Line2D([], [], color=color, ls=style, marker="o", ms=5, label=text))
            values += _column(curve, "perplexity")
        cett = result.get("cett")
        if cett and None not in (cett["sparsity"], cett["perplexity"]):
            axes.plot(100 * (1 - cett["sparsity"]), cett["perplexity"], "*", color=color, ms=15, mec="white", zorder=3)
            text = f"{title(result)}: CETT, perplexity + {cett['percent']:g} %"
            handles.append(Line2D([], [], color=color, ls="none", marker="*", ms=12, label=text))
            values.append(cett["perplexity"])
    if not handles:
        return None
    if max(values) > 10 * min(values):
        _logarithmic(axes)
    axes.set(xlabel="neurons of a layer kept for a token (%)", ylabel="perplexity")
    axes.invert_xaxis()
    frame(axes, both=True)
    _legend_above(figure, handles)
    return figure


def union(measured: Sequence[dict[str, Any]]) -> Figure | None:
    """The share of a layer's neurons that a batch of tokens needs together."""
    shown = [result for result in measured if result.get("union")]
    if not shown:
        return None
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({int(size) for result in shown for size in result["union"]})
    for number, result in enumerate(shown):
        color, style = _series(number)
        points = sorted((int(size), _scaled(share)) for size, share in result["union"].items())
        axes.plot(*zip(*points, strict=True), "o", ls=style, color=color, lw=1.5, ms=5, label=title(result))
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in the batch", ylabel="neurons active in the batch\n(% of a layer)", ylim=(0, 104))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    frame(axes, both=True)
    _legend_above(figure, axes.lines)
    return figure


def title(result: dict[str, Any]) -> str:
    """What a result of another verb is of: run and model, or the checkpoint's own name."""
    model = result["model"]
    return f"{model['run']}, {model['model']}" if model["run"] else str(model["model"]).rstrip("/").split("/")[-1]


# --- what they share --------------------------------------------------------------------------------------------------


def _series(number: int) -> tuple[str, str]:
    """(color, line) of the series of this number."""
    return SERIES[number % len(SERIES)], LINES[number // len(SERIES) % len(LINES)]


def _column(rows: Sequence[dict[str, Any]], key: str, scale: float = 1) -> list[float]:
    return [_scaled(row.get(key), scale) for row in rows]


def _scaled(value: float | None, scale: float = 100) -> float:
    return nan if value is None else scale * value


def _smooth(values: list[float], span: int) -> list[float]:
    """The mean of each value and those before it, `span` at most, as far as they are finite."""
    windows = ([v for v in values[max(0, i + 1 - span) : i + 1] if isfinite(v)] for i in range(len(values)))
    return [sum(window) / len(window) if window else nan for window in windows]


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(FuncFormatter(lambda value, _: f"{value:,.4g}" if f"{value:e}"[0] in "1235" else ""))


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend_above(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend above the axes with as many columns, which are filled from the top, as fit into the figure."""
    widths = [6.2 * len(str(handle.get_label())) + 48 for handle in handles]  # points
    for columns in range(len(widths), 0, -1):
        lines, longer = divmod(len(widths), columns)  # the first columns have one more
        ends = [0, *accumulate(lines + (i < longer) for i in range(columns))]
        if sum(max(widths[a:b]) for a, b in pairwise(ends)) < 70 * figure.get_size_inches()[0]:
            break
    figure.legend(handles=list(handles), loc="outside upper center", ncols=columns, frameon=False, fontsize=10)


def frame(axes: Axes, both: bool = False) -> None:
    axes.grid(axis="both" if both else "y", color="#E5E5E5", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
