"""Numerical faults: loss spikes, and where a value that is not finite comes from.

In: losses; the modules of a model whose loss or gradient is not finite. Out: how far a loss lies out; words.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch.nn as nn
from torch import Tensor

from prosparse.config import Guard


def deviations(memory: dict[str, float], loss: float, how: Guard) -> float | None:
    """How many standard deviations `loss` lies above the running mean; None before `how.after` losses were seen."""
    if memory.get("count", 0) < how.after:
        return None
    return (loss - memory["mean"]) / max(sqrt(memory["variance"]), 1e-6 * abs(memory["mean"]) + 1e-12)


def remember(memory: dict[str, float], loss: float, how: Guard) -> None:
    """Take a loss into the running mean and variance (exponential, over about `how.memory` steps), in place."""
    count = memory.get("count", 0) + 1
    weight = max(1 / count, 1 / how.memory)  # the plain mean until there is enough to forget
    distance = loss - memory.get("mean", 0.0)
    memory["variance"] = (1 - weight) * (memory.get("variance", 0.0) + weight * distance**2)
    memory["mean"] = memory.get("mean", 0.0) + weight * distance
    memory["count"] = count


@contextmanager
def watching(model: nn.Module) -> Iterator[list[str]]:
    """Within, the list gathers where values stop to be finite, in the order of computation, at most 3 a direction.

    Looks at every module's output and its gradient; works under activation checkpointing and ZeRO-3.
    """
    found: list[str] = []

    def note(what: str) -> None:
        if sum(entry.startswith(what.split(" of ")[0]) for entry in found) < 3 and what not in found:
            found.append(what)

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                if not bool(tensor.isfinite().all()):
                    note(f"output of {name}")
                elif tensor.requires_grad:
                    tensor.register_hook(lambda g: None if bool(g.isfinite().all()) else note(f"gradient of {name}"))

        return hook

    hooks = [module.register_forward_hook(look(name or "the model")) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()
