"""Recall and predicted sparsity of predictors: `python benchmarks/predictors.py RESULT.json IMAGE.png`.

In: the result.json of a `prosparse predict`. Out: a table, a row a cutoff, and a plot: recall by predicted sparsity,
beside the sparsity that is there, and both layer by layer at the cutoff that was written down.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, VERMILION, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#666666"  # as in a run's report
RECALL, WITHIN = 0.85, 0.15  # asked of predictors here: recall, and points between predicted and true sparsity


def main(result: str, image: str) -> None:
    found = json.loads(Path(result).read_text())
    print("| cutoff | recall | predicted sparsity | perplexity |\n|---|---|---|---|")
    for row in found["sweep"]:
        print(
            f"| {row['cutoff']:g} | {row['recall']:.1%} | {row['predicted_sparsity']:.1%} | {row['perplexity']:.3f} |"
        )
    print(f"| all neurons | 100.0% | {found['sparsity']:.1%} (true) | {found['perplexity_all_neurons']:.3f} |")
    ranks = sorted({layer["rank"] for layer in found["by_layer"]})
    print(
        f"\nranks {ranks}, {found['training_tokens']:,} tokens learned from, {found['held_out_tokens']:,} held out, "
        f"{found['dtype']}, {found['device']}",
    )
    plot(found).savefig(image, dpi=130)


def plot(found: dict) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    curve, layers = figure.subplots(1, 2)
    sweep = found["sweep"]
    curve.plot(
        *([100 * row[key] for row in sweep] for key in ("predicted_sparsity", "recall")), "o-", color=BLUE, lw=1.5, ms=5
    )
    for row in sweep:
        curve.annotate(
            f"{row['cutoff']:g}: {row['perplexity']:.2f}",
            (100 * row["predicted_sparsity"], 100 * row["recall"]),
            (-6, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=GRAY,
            bbox={"color": "white", "alpha": 0.8, "pad": 0.5},
        )
    curve.axvline(100 * found["sparsity"], color=GREEN, lw=1.3, ls="--", label=f"true: {100 * found['sparsity']:.1f} %")
    corner = 100 * (found["sparsity"] - WITHIN), 100 * RECALL
    curve.plot(
        [corner[0], corner[0], 102],
        [102, corner[1], corner[1]],
        color=VERMILION,
        lw=1,
        label=f"recall {RECALL:.0%}, {100 * WITHIN:g} points",
    )
    low, left = (min(100 * row[key] for row in sweep) for key in ("recall", "predicted_sparsity"))
    curve.set(xlabel="predicted sparsity (%)", ylabel="recall (%)", xlim=(left - 14, 101), ylim=(low - 8, 101.5))
    curve.set_title(f"cutoff: perplexity (all neurons: {found['perplexity_all_neurons']:.2f})", fontsize=9, color=GRAY)
    curve.legend(loc="lower left", frameon=False, fontsize=8)
    for key, label, color, marker in (
        ("recall", "recall", BLUE, "o"),
        ("predicted_sparsity", "predicted sparsity", VERMILION, "D"),
        ("sparsity", "true sparsity", GREEN, "s"),
    ):
        layers.plot(
            [100 * row[key] for row in found["by_layer"]],
            marker + "-",
            color=color,
            lw=1.3,
            ms=4,
            mfc="none",
            label=label,
        )
    layers.set(xlabel="layer", ylabel="%", ylim=(None, 101))
    layers.set_title(f"at cutoff {found['cutoff']:g}", fontsize=9, color=GRAY)
    layers.xaxis.set_major_locator(MaxNLocator(integer=True))
    layers.legend(frameon=False, fontsize=8)
    for axes in (curve, layers):
        axes.grid(axis="y", color="#E5E5E5", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:])
