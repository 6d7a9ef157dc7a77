"""What a run says when it ends: a table, a report.json and three plots.

In: the run folder with its metrics.jsonl, and the report, a plain dict that names models, numbers and conditions.
Out: RUN/report/report.json, training.png, layers.png, shift.png; the table as text.
"""

from itertools import groupby, pairwise
from math import isfinite, nan
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prosparse.config import Control
from prosparse.telemetry import AFTER_TRAINING, duration, read_metrics, redact, strict_json, write_atomically

# The models of a report in the order of their making, in colors that color-blind readers tell apart (Okabe and Ito).
COLORS = {
    "base": "#999999",
    "substituted": "#E69F00",
    "trained": "#0072B2",
    "shifted": "#D55E00",
    "recovered": "#009E73",
    "exported": "#000000",
}
MARKERS = {"base": "s", "substituted": "^", "trained": "o", "shifted": "D", "recovered": "v", "exported": "x"}
BLUE, VERMILION, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#666666"
DOTS_PER_INCH = 130

# --- the table --------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The models of a report as plain text: a caption with the conditions, one row a model, the notes."""
    models = _models(report)
    measured = sorted({model["tokens"] for model in models.values()})
    tokens = " to ".join(f"{count:,}" for count in dict.fromkeys([measured[0], measured[-1]]))
    caption = f"{report['text']}, {tokens} tokens measured, {report['dtype']}, {report['device']}"
    trained = f"trained on {report['tokens_trained']:,} tokens in {duration(report['seconds'])}"
    control = "" if report["control"] == "none" else f", control: {report['control']}"
    header = f"{'model':<12} {'perplexity':>11} {'x base':>8} {'sparsity':>9} {'threshold':>10}"
    lines = [caption, trained + control, "", header, "-" * len(header)]
    base = models.get("base", {}).get("perplexity")
    for name, model in models.items():
        perplexity = model["perplexity"]
        ratio = perplexity / base if perplexity is not None and base else None
        sparsity = None if model["sparsity"] is None else 100 * model["sparsity"]
        threshold = report["shift"]["threshold"] if name in AFTER_TRAINING and report.get("shift") else None
        lines.append(
            f"{name:<12} {_cell(perplexity, '.3f'):>11} {_cell(ratio, '.4f'):>8} "
            f"{_cell(sparsity, '.2f', ' %'):>9} {_cell(threshold, '.4g'):>10}"
        )
    lines += _task_lines(report.get("tasks", {}))
    return "\n".join(lines + [""] * bool(report["notes"]) + [f"note: {note}" for note in report["notes"]])


def task_results(run_dir: Path) -> dict[str, dict[str, dict]]:
    """By model (base, a stage's name, shifted) and task what the rows of kind `task` say; the newest counts."""
    found: dict[str, dict[str, dict]] = {}
    for row in read_metrics(run_dir):
        if row["kind"] == "task":
            found.setdefault(row["evaluated"], {})[row["task"]] = row["result"]
    return found


def _task_lines(tasks: dict[str, dict[str, dict]]) -> list[str]:
    """A row a model and task: metrics and sparsity."""
    lines = [""] * bool(tasks)
    for model, results in tasks.items():
        for task, result in results.items():
            scores = [
                f"{key} {_cell(value, '.4f')}" for key, value in result["metrics"].items() if "_stderr" not in key
            ]
            lines.append(f"{model:<12} {task:<24} {'  '.join(scores)}  sparsity {result['sparsity']:.2%}")
    return lines


def fairness(control: Control) -> str:
    """What to compare a run's perplexities with."""
    if control is Control.silu_continued:
        return (
            "control silu_continued: the base's own activation, λ 0, the same rows and learning rate; the row that a "
            "sparse model's cost is measured against"
        )
    return (
        "the base model has not been trained on this text and the others have: a ratio to it is no measure of what "
        "sparsity costs; recipe.control=silu_continued trains the fair row on the same tokens"
    )


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None or not isfinite(value) else f"{value:{form}}{unit}"


def _models(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report["models"][name] for name in COLORS if report["models"].get(name)}


# --- the files --------------------------------------------------------------------------------------------------------


def write_report(run_dir: Path, report: dict[str, Any]) -> Path:
    """Write report.json and the plots for which there is data; returns the folder RUN/report."""
    folder = Path(run_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_metrics(run_dir)
    figures = {
        "training.png": _training(rows) if any(row["kind"] == "train" for row in rows) else None,
        "layers.png": _layers(report) if any(m.get("sparsity_by_layer") for m in _models(report).values()) else None,
        "shift.png": _shift(report["shift"]) if (report.get("shift") or {}).get("sweep") else None,
    }
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier report
        else:
            figure.savefig(folder / name, dpi=DOTS_PER_INCH)
    write_atomically(folder / "report.json", redact(strict_json(report, indent=2)) + "\n")
    return folder


# --- the plots --------------------------------------------------------------------------------------------------------


def _training(rows: list[dict[str, Any]]) -> Figure:
    train = [row for row in rows if row["kind"] == "train"]
    curve = [row for row in rows if row["kind"] == "evaluation" and row.get("model") not in AFTER_TRAINING]
    held_out = list({row["step"]: row for row in curve}.values())  # at step 0: substituted, which comes after base
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
        _frame(axes)
    labels = ("loss (nats per token)", "L1 factor λ\n(unit of the recipe)", "sparsity (%)", "learning\nrate")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
    for axes, place in ((panels[0], "upper right"), (panels[2], "lower right")):
        axes.legend(loc=place)
    panels[2].set_ylim(-3, 103)
    panels[3].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    panels[3].set_xlabel("step")
    panels[3].xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_stages(figure, panels, train)
    figure.align_ylabels()
    return figure


def _mark_stages(figure: Figure, panels: Any, train: list[dict[str, Any]]) -> None:
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


def _layers(report: dict[str, Any]) -> Figure:
    models = {name: model for name, model in _models(report).items() if model.get("sparsity_by_layer")}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for index, (name, model) in enumerate(models.items()):  # each thinner than the one below it: equal curves all show
        shares = [nan if share is None else 100 * share for share in model["sparsity_by_layer"]]
        axes.plot(
            range(len(shares)),
            shares,
            marker=MARKERS[name],
            color=COLORS[name],
            lw=4.2 - 0.8 * index,
            ms=10 - 1.2 * index,
            mfc="none",
            alpha=0.9,
            label=f"{name} ({_cell(100 * model['sparsity'], '.1f', ' %')})",
        )
    axes.set(xlabel="layer", ylabel="sparsity (%)", ylim=(-4, 104))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _frame(axes)
    figure.legend(loc="outside upper center", ncols=len(models), frameon=False)
    return figure


def _shift(shift: dict[str, Any]) -> Figure:
    sweep = sorted(shift["sweep"], key=lambda point: point["threshold"])
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (key, scale, label, color) in zip(
        panels, (("sparsity", 100, "sparsity (%)", BLUE), ("perplexity", 1, "perplexity", GREEN)), strict=True
    ):
        axes.plot(_column(sweep, "threshold"), _column(sweep, key, scale), "o-", color=color, lw=1.5, ms=5)
        axes.axvline(shift["threshold"], color=VERMILION, lw=1.3, ls="--", label=f"chosen: {shift['threshold']:.4g}")
        axes.set_ylabel(label)
        _frame(axes)
    perplexities = [value for value in _column(sweep, "perplexity") if isfinite(value)]
    if perplexities and max(perplexities) > 10 * min(perplexities):
        panels[1].set_yscale("log")
    panels[1].set_xlabel("threshold (of the gate)")
    budget = shift.get("budget")
    title = None if budget is None else f"budget: perplexity may rise by {100 * budget:.3g} %"
    figure.legend(handles=panels[0].lines[-1:], loc="outside upper center", frameon=False, title=title)
    figure.align_ylabels()
    return figure


def _column(rows: list[dict[str, Any]], key: str, scale: float = 1) -> list[float]:
    return [nan if row.get(key) is None else scale * row[key] for row in rows]


def _frame(axes: Axes) -> None:
    axes.grid(axis="y", color="#E5E5E5", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
