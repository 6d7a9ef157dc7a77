"""Steering λ so that the sparsity of training follows a set-point: proportional and integral control of log λ.

In: the sparsity of each window and what it should be. Out: λ of the next window, in this project's unit (the factor of
Σ_layers mean |x1|). The memory between the steps is a plain dict, which lies in the manifest.

    log λ += gain · (e - e_before) + gain · e / (INTEGRAL · T),   gain = 1 / (slope · T),   e = set-point - sparsity

A change of log λ makes sparsity rise faster, not at once: so an error e is gone in T steps if log λ is off by
e / (slope · T), where slope, the rise of sparsity a step for each unit of log λ, comes from the sweep before the stage.
T, the smoothing and the integral time are shares of the stage's length: long stages are steered as short ones are.
"""

from itertools import pairwise
from math import exp, log
from typing import Any

LOWEST, HIGHEST = 1e-4, 10.0  # of λ
FASTEST = log(1.5)  # change of log λ in a step
INTEGRAL = 3  # integral time by T
SWEEP = (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16)  # λ tried before the first step, ascending, until one suffices
SWEEP_STEPS = 4  # with each of them


def estimate(before: float, probes: list[tuple[float, float]], needed: float, steps: int) -> tuple[float, float]:
    """(λ, slope) from a sweep: the λ with which its steps raise the sparsity by `needed`, and the largest slope.

    `probes` are at least two of (λ, sparsity after `steps` steps), λ ascending; in between log λ is interpolated.
    The first or the last one's λ where all or none suffice. The slope is sparsity a step for each unit of log λ.
    """
    points = [(log(factor), after - before) for factor, after in probes]
    slope = max((b - a) / (y - x) / steps for (x, a), (y, b) in pairwise(points))
    chosen = points[0][0]
    for (x, a), (y, b) in pairwise(points):
        if a < needed:
            chosen = y if b <= needed else x + (needed - a) / (b - a) * (y - x)
    return exp(chosen), slope


def begin(stage: str, sparsity: float, factor: float, slope: float) -> dict[str, Any]:
    """The memory before a stage's first step: the `sparsity` that the set-point starts from, λ and slope of a sweep."""
    return {"stage": stage, "from": sparsity, "smoothed": sparsity, "error": 0.0, "log": log(factor), "slope": slope}


def factor(memory: dict[str, Any]) -> float:
    """λ of the next window."""
    return exp(memory["log"])


def observe(memory: dict[str, Any], sparsity: float, set_point: float, steps: int) -> None:
    """Take in what an applied step of a stage of `steps` steps was like, in place."""
    time = max(15, steps // 4)
    gain = 1 / (max(memory["slope"], 1e-4) * time)
    memory["smoothed"] += (sparsity - memory["smoothed"]) / max(4, steps // 16)
    error = set_point - memory["smoothed"]
    change = gain * (error - memory["error"]) + gain * error / (INTEGRAL * time)
    memory["log"] += min(max(change, -FASTEST), FASTEST)
    memory["log"] = min(max(memory["log"], log(LOWEST)), log(HIGHEST))
    memory["error"] = error


def told(memory: dict[str, Any]) -> str:
    """What a report says of the end: the sparsity asked for and reached, λ, and whether it could go further."""
    value, reached = factor(memory), memory["smoothed"]
    bound = ", its bound" if not LOWEST * 1.001 < value < HIGHEST * 0.999 else ""
    asked = f"steered to a sparsity of {reached + memory['error']:.2%}: the last steps of training had {reached:.2%}"
    return f"{asked}, with λ {value:.4g} x mean |x1|{bound}"
