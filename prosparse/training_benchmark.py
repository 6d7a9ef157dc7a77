"""`prosparse bench what=train`: this trainer's step against ordinary training and against the usual way to add L1.

In: a `Bench` config; random weights of the model's shape, random rows. Out: seconds, memory, losses of each rival,
their ratios, and where our time goes. Each rival (rivals.py) is a group of processes of its own that computes when it
is its turn. What has to compute the same is compared before anything is timed, and again after it.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prosparse import benchmarking, schedule
from prosparse.plotting import BLUE, GRAY, GREEN, VERMILION
from prosparse.rivals import on_gpu
from prosparse.speed import ffn_kernel
from prosparse.verb_configs import Bench

LOSS_NOISE = 5e-3  # how far, relatively, the losses of equal mathematics in bf16 may differ; so the L1 terms
GRADIENT_NOISE = 0.05  # how far the first gradients may lie apart, of a parameter's norm, along a random direction
PAIRS = (("ours", "hooks"), ("ours", "plain"), ("control", "silu"))  # which compute the same


def train(config: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Every rival's steps, in turns. RuntimeError if two of PAIRS do not compute the same; ValueError for a batch or a
    kernel that cannot be.

    Without `hooks` ours is compared with `plain`, a first step of its own without any switch of `speed`.
    """
    schedule.accumulation(config.recipe.batch.sequences, config.micro_batch, config.ranks)
    ffn_kernel(config.speed, torch.device("cuda" if on_gpu(config) else "cpu"))  # told here, not by every process
    arms: dict[str, Arm] = {}
    compared: dict[str, Arm] = {}
    with tempfile.TemporaryDirectory(prefix="prosparse-bench-") as scratch:
        try:
            if "hooks" not in config.rivals:
                compared["plain"] = plain = Arm("plain", config, Path(scratch) / "plain")
                plain.wait()
                plain.turn()
                plain.stop()  # what it held is free for the rivals
            for name in ("ours", *config.rivals):
                arms[name] = Arm(name, config, Path(scratch) / name)
            for arm in arms.values():
                arm.wait()
            turns = {name: arm.turn for name, arm in arms.items()}
            warm = benchmarking.in_turns(turns, config.warmup)
            compare(compared | arms)
            seconds = benchmarking.in_turns(turns, config.rounds, progress)
            differences = compare(compared | arms)
            ended = {name: arm.end() for name, arm in arms.items()}
        finally:
            for arm in (compared | arms).values():
                arm.stop()
    recipe, (device, ranks) = config.recipe, (ended["ours"]["device"], config.ranks)
    tokens = recipe.batch.sequences * recipe.batch.context
    of = {
        name: {
            "step_seconds": median(seconds[name]),
            "seconds": seconds[name],
            "warmup_seconds": warm[name],
            "tokens_per_second": tokens / median(seconds[name]),
            "losses": [row["loss"] for row in arm.rows],
            **ended[name],
        }
        for name, arm in arms.items()
    }
    ours, speed = of["ours"], tokens / median(seconds["ours"])
    result = {
        "shape": asdict(config.model.shape),
        "batch": f"{recipe.batch.sequences} x {recipe.batch.context}, micro_batch {config.micro_batch}",
        "parameters": ours["parameters"],
        "flops_a_token": ours["flops_a_token"],
        "mfu": None if ours["peak_flops"] is None else ours["flops_a_token"] * speed / ranks / ours["peak_flops"],
        "device": device,
        "ranks": ranks,
        "dtype": str(config.dtype),
        "l1_factor": config.l1_factor,
        "largest_differences": differences,
        "arms": of,
    }
    for name in config.rivals:
        result[f"vs_{name}"] = {
            "step_time": benchmarking.ratio(seconds["ours"], seconds[name]),
            "tokens_per_second": benchmarking.ratio(seconds[name], seconds["ours"]),
            "peak_memory": ours["memory_bytes"] / of[name]["memory_bytes"],
        }
    return result


def draw(result: dict[str, Any]) -> Figure:
    """Step times by round and peak memory of the rivals, and the parts of our step."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    time_axes, memory_axes, part_axes = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    colors = {"ours": BLUE, "silu": GRAY, "control": GREEN, "hooks": VERMILION}
    for name, arm in result["arms"].items():
        time_axes.plot(range(1, len(arm["seconds"]) + 1), arm["seconds"], "o-", color=colors[name], ms=4, label=name)
        memory_axes.bar(name, arm["memory_bytes"] / 1e9, color=colors[name])
    time_axes.set(xlabel="round", ylabel="step (s)", ylim=(0, None))
    time_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    time_axes.legend(frameon=False)
    memory_axes.set(ylabel="peak memory of a rank (GB)")
    parts = result["arms"]["ours"]["parts"]
    part_axes.bar(list(parts), [100 * share for share in parts.values()], color=BLUE)
    part_axes.set(ylabel="share of our step (%)")
    part_axes.tick_params(axis="x", rotation=30)
    for axes in (time_axes, memory_axes, part_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E5E5E5", lw=0.7)
        axes.set_axisbelow(True)
    return figure


def compare(arms: "dict[str, Arm]") -> dict[str, dict[str, float]]:
    """`differences` of each of PAIRS that is there, by its names; RuntimeError if one is too large."""
    there = [(arms[a], arms[b]) for a, b in PAIRS if a in arms and b in arms]
    return {f"{one.name}, {other.name}": differences(one, other) for one, other in there}


def differences(one: "Arm", other: "Arm") -> dict[str, float]:
    """How far first gradients, losses and L1 terms lie apart at most, relatively; RuntimeError if too far.

    Of a gradient: |p · (g - g')| / |g| of a parameter, p a random direction. `plain` has but one step.
    """
    ours, theirs = one.rows[0]["gradient"], other.rows[0]["gradient"]
    apart = {name: abs(along - theirs[name][1]) / (norm or 1e-30) for name, (norm, along) in ours.items()}
    worst = max(apart, key=lambda name: apart[name])
    words = f"{one.name} and {other.name} do not compute the same: "
    if not apart[worst] <= GRADIENT_NOISE:
        raise RuntimeError(f"{words}the gradient of {worst} is {apart[worst]:.1%} off")
    far = {"gradient": apart[worst]}
    for key in ("loss", "l1"):
        pairs = [(a[key], b[key]) for a, b in zip(one.rows, other.rows, strict=False)]
        far[key] = max(abs(a - b) / (abs(b) or 1e-30) for a, b in pairs)
        if not far[key] <= LOSS_NOISE:
            raise RuntimeError(f"{words}their {key} differs by {far[key]:.2%}")
    return far


class Arm:
    """A rival's processes, from the outside."""

    def __init__(self, name: str, config: Bench, folder: Path):
        self.name, self.rows = name, list[dict[str, Any]]()
        folder.mkdir()
        with Listener(str(folder / "socket"), family="AF_UNIX") as listener:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.processes = [_spawn(rank, port, config, folder) for rank in range(config.ranks)]
            accepted = [self._accept(listener) for _ in self.processes]
        for connection in accepted:
            connection.send((name, config, str(folder)))
        self.connections = accepted

    def _accept(self, listener: Listener) -> Connection:
        listener._listener._socket.settimeout(120)  # type: ignore[attr-defined]
        return listener.accept()

    def wait(self) -> list[dict[str, Any] | None]:
        """What every process tells next; RuntimeError if one has ended."""
        try:
            return [connection.recv() for connection in self.connections]
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(
                f"the processes of {self.name} ended: their message stands above; if it is memory, set rivals=[] or a "
                "smaller micro_batch"
            ) from error

    def turn(self) -> float:
        """One step; its seconds on the slowest rank."""
        for connection in self.connections:
            connection.send(True)
        told = [row for row in self.wait() if row is not None]
        mean = {key: sum(row[key] for row in told) / len(told) for key in ("loss", "l1")}  # over ranks, if they differ
        self.rows.append(told[0] | mean)
        return max(row["seconds"] for row in told)

    def end(self) -> dict[str, Any]:
        """The last turn: what there is to tell after it, the most memory of a rank."""
        for connection in self.connections:
            connection.send(False)
        told = [row for row in self.wait() if row is not None]
        return told[0] | {"memory_bytes": max(row["memory_bytes"] for row in told)}

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _spawn(rank: int, port: int, config: Bench, folder: Path) -> "subprocess.Popen[bytes]":
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": config.ranks, "LOCAL_WORLD_SIZE": config.ranks}
    own = {key: str(value) for key, value in (world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items()}
    own |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if config.device != "cpu" else {}
    command = [sys.executable, "-m", "prosparse.rivals", str(folder / "socket")]
    return subprocess.Popen(command, env=os.environ | own, stdout=sys.stderr)
