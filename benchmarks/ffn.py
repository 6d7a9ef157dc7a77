"""The element-wise part of a training FFN, forward and backward: the fused kernel, with penalty and statistics, against
eager SwiGLU without them.

    python benchmarks/ffn.py [TOKENS NEURONS ROUNDS]          default 8192 11008 20

On a GPU in bf16 by Triton; on a CPU the eager twin, in fp32 under TRITON_INTERPRET=1 the Triton kernel itself (small
sizes: the interpreter is slow, and its times mean nothing). Outputs are compared in fp64 before anything is timed.
Prints JSON: seconds, ratios with their spread, bytes kept for backward, bandwidth as a share of a copy's.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from prosparse.benchmarking import in_turns, ratio
from prosparse.kernels.glu import gated, kernels
from prosparse.penalty import PenaltyContext, inject_l1, new_statistics

SCALE = 0.1
MOVED = {"silu_eager": 14, "save_x1": 8, "recompute_x1": 11}  # tensors of [tokens, neurons] read and written


def main(tokens: int = 8192, neurons: int = 11008, rounds: int = 20) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    kernel = "triton" if device.type == "cuda" or interprets else "eager"
    dtype = torch.float32 if interprets else torch.bfloat16
    torch.manual_seed(0)
    gate, up, gradient = (torch.randn(tokens, neurons, device=device).to(dtype) for _ in range(3))
    context = PenaltyContext(torch.tensor(SCALE, device=device), new_statistics(1, device))
    compare(kernel, gate, up, gradient, context)

    def run(forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], again: bool = False) -> Callable[[], float]:
        def arm() -> float:
            g, u = gate.detach().requires_grad_(), up.detach().requires_grad_()
            wait(device)
            began = time.perf_counter()
            x1 = forward(g, u)
            if again:  # what down_proj's backward does first
                kernels(kernel)[0]("relu", 0.0, gate, up)
            x1.backward(gradient)
            wait(device)
            return time.perf_counter() - began

        arm()
        return arm

    def copy() -> float:
        wait(device)
        began = time.perf_counter()
        gradient.clone()
        wait(device)
        return time.perf_counter() - began

    fused = lambda g, u: gated(g, u, "relu", 0.0, kernel, context, 0)  # noqa: E731
    arms = {"silu_eager": run(lambda g, u: F.silu(g) * u), "save_x1": run(fused), "recompute_x1": run(fused, True)}
    seconds = in_turns(arms | {"copy": copy}, rounds)
    one = gate.numel() * gate.element_size()
    copied = 2 * one / median(seconds["copy"])
    kept = {"silu_eager": 4, "save_x1": 3, "recompute_x1": 2}  # tests/test_glu.py counts them
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "kernel": kernel,
                "interpreted": interprets,
                "tokens": tokens,
                "neurons": neurons,
                "dtype": str(dtype),
                "seconds": {name: median(times) for name, times in seconds.items()},
                "time_vs_silu_eager": {
                    n: ratio(seconds[n], seconds["silu_eager"]) for n in ("save_x1", "recompute_x1")
                },
                "kept_bytes": {name: count * one for name, count in kept.items()},
                "kept_vs_silu_eager": {name: count / 4 for name, count in kept.items()},
                "bandwidth_share_of_copy": {n: MOVED[n] * one / median(seconds[n]) / copied for n in MOVED},
            },
            indent=1,
        )
    )


def compare(kernel: str, gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, told: PenaltyContext) -> None:
    """RuntimeError unless gradients and statistics on the first rows are those of the formula in fp64."""
    rows = torch.cat([torch.arange(32), torch.arange(len(gate) - 32, len(gate))]).to(gate.device)
    ours = [part[rows].detach().clone().requires_grad_() for part in (gate, up)]
    exact = [part[rows].detach().double().requires_grad_() for part in (gate, up)]
    wide = PenaltyContext(told.scale.double(), new_statistics(1, gate.device))
    x1, right_x1 = gated(*ours, "relu", 0.0, kernel, told, 0), inject_l1(F.relu(exact[0]) * exact[1], wide, 0)
    x1.backward(gradient[rows])
    right_x1.backward(gradient[rows].double())
    pairs = [(x1, right_x1), *((mine.grad, right.grad) for mine, right in zip(ours, exact, strict=True))]
    for mine, right in pairs:
        assert mine is not None and right is not None
        far = ((mine.double() - right).norm() / right.norm()).item()
        if not far < 1e-2:
            raise RuntimeError(f"x1 or a gradient is off by {far:.2e} of its norm: nothing is timed")
    if not torch.allclose(told.statistics, wide.statistics, rtol=1e-2) or not torch.equal(
        told.statistics[:, 1:], wide.statistics[:, 1:]
    ):
        raise RuntimeError("the statistics differ: nothing is timed")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
