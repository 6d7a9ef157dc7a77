"""The element-wise part of a training FFN, forward and backward: the fused kernel, with penalty and statistics, against
eager SwiGLU without them.

    python benchmarks/ffn.py [TOKENS NEURONS ROUNDS]          default 8192 11008 20

On a GPU in bf16 by Triton; on a CPU the eager twin, in fp32 under TRITON_INTERPRET=1 the Triton kernel itself (small
sizes: the interpreter is slow, and its times mean nothing). Outputs are compared in fp64 before anything is timed.
Prints JSON: seconds, ratios with their spread, bandwidth as a share of a copy's, and on a GPU the bytes that stay
allocated for backward (on a CPU tests/test_glu.py counts them).
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
from prosparse.kernels.glu import gated, kernels, recompute_x1
from prosparse.penalty import PenaltyContext, inject_l1, new_statistics

SCALE = 0.1  # of a neuron's |x1|: as large as the gradients
ROWS = 1024  # compared at a time
Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # from gate and up to x1
MOVED = {"silu_eager": 14, "save_x1": 8, "recompute_x1": 11}  # tensors of [tokens, neurons] read and written


def main(tokens: int = 8192, neurons: int = 11008, rounds: int = 20) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    kernel = "triton" if device.type == "cuda" or interprets else "eager"
    dtype = torch.float32 if interprets else torch.bfloat16
    torch.manual_seed(0)
    gate, up, gradient = (torch.randn(tokens, neurons, device=device).to(dtype) for _ in range(3))
    context = PenaltyContext(torch.tensor(SCALE * neurons, device=device), new_statistics(1, device))
    compare(kernel, gate, up, gradient, context)

    def run(forward: Way, again: bool = False) -> Callable[[], float]:
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
    ways: dict[str, Way] = {"silu_eager": lambda g, u: F.silu(g) * u, "save_x1": fused, "recompute_x1": fused}
    arms = {name: run(way, name == "recompute_x1") for name, way in ways.items()}
    seconds = in_turns(arms | {"copy": copy}, rounds)
    one = gate.numel() * gate.element_size()
    copied = 2 * one / median(seconds["copy"])
    kept = {n: stays(way, gate, up, n == "recompute_x1") for n, way in ways.items()} if device.type == "cuda" else None
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
                "kept_bytes": kept,
                "kept_vs_silu_eager": kept and {name: size / kept["silu_eager"] for name, size in kept.items()},
                "bandwidth_share_of_copy": {n: MOVED[n] * one / median(seconds[n]) / copied for n in MOVED},
            },
            indent=1,
        )
    )


def stays(forward: Way, gate: torch.Tensor, up: torch.Tensor, again: bool) -> int:
    """Bytes on the GPU between forward and backward of x1 and the projection that reads it, with gate and up."""
    down = torch.nn.Linear(gate.shape[1], 1, bias=False, device=gate.device, dtype=gate.dtype)
    if again:
        recompute_x1(down)
    before = torch.cuda.memory_allocated()
    out = down(
        forward(gate.detach().requires_grad_() * 1, up.detach().requires_grad_() * 1)
    )  # whose copies are counted
    size = torch.cuda.memory_allocated() - before - out.nbytes
    out.sum().backward()
    return size


def compare(kernel: str, gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, told: PenaltyContext) -> None:
    """RuntimeError unless x1, its gradients and statistics are those of the formula in fp64."""
    ours = [part.detach().requires_grad_() for part in (gate, up)]
    wide = PenaltyContext(told.scale.double(), new_statistics(1, gate.device))
    x1 = gated(*ours, "relu", 0.0, kernel, told, 0)
    x1.backward(gradient)
    for start in range(0, len(gate), ROWS):
        rows = slice(start, start + ROWS)
        exact = [part[rows].detach().double().requires_grad_() for part in (gate, up)]
        right_x1 = inject_l1(F.relu(exact[0]) * exact[1], wide, 0)
        right_x1.backward(gradient[rows].double())
        for mine, right in ((x1, right_x1), (ours[0].grad, exact[0].grad), (ours[1].grad, exact[1].grad)):
            assert mine is not None and right is not None
            far = ((mine[rows].double() - right).norm() / right.norm()).item()
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
