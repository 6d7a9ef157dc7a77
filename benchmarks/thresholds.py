"""One threshold against thresholds by layer and neuron: `python benchmarks/thresholds.py CHECKPOINT OUT [threads]`.

In: a run's checkpoint from before the shift (ReLU). Costs are estimated on 32 rows of the standard library's documents
that train; everything is measured on 48 rows of those that are held out. Out: a table on stdout, OUT/curve.json and
OUT/thresholds.png: sparsity against perplexity for each granularity, what each has within +0.5 %, +1 % and +3 %, read
off between the points, and the neurons' thresholds once folded and cast to bf16.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from prosparse import load_model, load_tokenizer, measure, substitute, text_rows
from prosparse.allocation import cut_apart, fisher_costs, fold, thresholds_at
from prosparse.config import Auto, Granularity, Source
from prosparse.data import batch
from prosparse.sparsity import spread

THRESHOLDS = (0.03125, 0.0625, 0.09375, 0.125, 0.15625, 0.1875)
PRICES = (-18, -17.5, -17, -16.5, -16, -15.5, -15)  # as powers of 2
BUDGETS = (0.005, 0.01, 0.03)
COLORS = {"model": "#0072B2", "layer": "#E69F00", "neuron": "#D55E00"}


def main(checkpoint: str, out: str, threads: str = "2") -> None:
    torch.set_num_threads(int(threads))
    tokenizer = load_tokenizer(checkpoint)
    how: dict = {"bos": Auto.auto, "cache": "~/.cache/prosparse/data"}
    train = text_rows(Source(path="stdlib"), tokenizer, 256, **how, held_out=None)
    held_out = text_rows(Source(path="stdlib"), tokenizer, 256, **how, held_out=0.02)
    calibration = [train[i] for i in spread(len(train), 32)]
    rows = [held_out[i] for i in spread(len(held_out), 48)]

    def seen(model) -> tuple[float, float]:
        result = measure(model, rows, batch=8)
        return result.sparsity, result.perplexity

    model = load_model(checkpoint, dtype=torch.bfloat16)
    substitute(model, "relu")
    before = seen(model)
    curves: dict[str, list[tuple[float, float, float]]] = {name: [(0.0, before[0], 0.0)] for name in COLORS}

    def add(name: str, at: float, found: tuple[float, float]) -> None:
        curves[name].append((at, found[0], found[1] / before[1] - 1))
        print(f"{name:<7} {at:<10.5g} sparsity {found[0]:.2%}  perplexity {found[1] / before[1] - 1:+.2%}", flush=True)

    print(f"before          sparsity {before[0]:.2%}  perplexity {before[1]:.3f} on {48 * 255:,} tokens", flush=True)
    for threshold in THRESHOLDS:
        substitute(model, "fatrelu", threshold)
        add("model", threshold, seen(model))
    substitute(model, "relu")
    costs = fisher_costs(model, calibration)
    for granularity in (Granularity.layer, Granularity.neuron):
        for exponent in PRICES:
            with cut_apart(model, thresholds_at(costs, 2.0**exponent, granularity)):
                add(str(granularity), exponent, seen(model))

    print("\n| perplexity | one threshold | by layer | by neuron |\n|---|---|---|---|")
    for budget in BUDGETS:
        read = {name: np.interp(budget, [c[2] for c in curve], [c[1] for c in curve]) for name, curve in curves.items()}
        cells = [f"{read[name]:.2%} ({100 * (read[name] - read['model']):+.2f})" for name in ("layer", "neuron")]
        print(f"| +{budget:.1%} | {read['model']:.2%} | {' | '.join(cells)} |")

    exact = load_model(checkpoint, dtype=torch.float32)
    substitute(exact, "relu")
    chosen = thresholds_at(costs, 2.0**-16, Granularity.neuron)
    told = fold(exact, chosen, token_ids=batch(rows, [0]).input_ids)
    folded = seen(exact.to(torch.bfloat16))
    print(f"\nneurons at price 2^-16, folded into one threshold of {told.threshold:g} and cast to bf16: ", end="")
    print(f"sparsity {folded[0]:.2%}  perplexity {folded[1] / before[1] - 1:+.2%}; ", end="")
    print(f"logits moved by {told.difference_fp32:.1e} in fp32, {told.difference:.1e} in bf16")
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "curve.json").write_text(json.dumps({"before": before, "curves": curves, "folded": folded}, indent=1))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, curve), marker in zip(curves.items(), "osD", strict=True):
        label = "one threshold" if name == "model" else f"by {name}"
        axes.plot(
            [100 * s for _, s, _ in curve],
            [100 * p for _, _, p in curve],
            f"{marker}-",
            color=COLORS[name],
            label=label,
        )
    axes.set(xlabel="sparsity (%)", ylabel="rise of perplexity (%)")
    axes.grid(color="#E5E5E5")
    axes.legend(frameon=False)
    figure.savefig(Path(out) / "thresholds.png", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
