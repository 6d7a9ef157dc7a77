"""`prosparse bench`: what every benchmark shares, and the verb.

In: a `Bench` config. Out: out/result.json and a plot. Rivals take turns in one run, and what is compared are ratios,
since the speed of a machine changes; nothing is timed before the rivals' outputs were found to agree.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from prosparse.plotting import DOTS_PER_INCH
from prosparse.telemetry import command, strict_json, versions, write_atomically
from prosparse.verb_configs import Bench, Benchmark


def bench(config: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """What `prosparse bench` does; the result is that in out/result.json."""
    from prosparse import decoding_benchmark, training_benchmark

    out = Path(config.out)
    measure, draw = {
        Benchmark.train: (training_benchmark.train, training_benchmark.draw),
        Benchmark.decode: (decoding_benchmark.decode, decoding_benchmark.draw),
    }[config.what]
    result = {"what": str(config.what), "command": command(), "versions": versions(), **measure(config, progress)}
    draw(result).savefig(out / f"{config.what}.png", dpi=DOTS_PER_INCH)
    write_atomically(out / "result.json", strict_json(result, indent=1) + "\n")
    return result


def in_turns(
    arms: dict[str, Callable[[], float]], rounds: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[float]]:
    """The seconds of every arm in each of `rounds` rounds, in which each has one turn; the order rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(arms[name]())
        if progress is not None:
            progress(number + 1, rounds)
    return seconds


def ratio(ours: list[float], rival: list[float]) -> dict[str, float]:
    """ours / rival of each round: its median, smallest and largest."""
    ratios = [a / b for a, b in zip(ours, rival, strict=True)]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}


def lines(result: dict[str, Any]) -> list[str]:
    """The result in words."""
    if result["what"] == Benchmark.train:
        return _train_lines(result)
    operators = [
        f"{row['batch']} x {row['sparsity']:7.2%}  "
        + "  ".join(f"{name} {_spread(row[name]['speedup'])}" for name in ("up", "down", "both", "ffn"))
        for row in result.get("operators", [])
    ]
    model = result.get("model")
    if model is not None:
        way = model["tokens_per_second"]
        speeds = f"{way['sparse']:.1f} tokens/s sparse, {way['dense']:.1f} dense"
        operators.append(f"end to end {_spread(model['speedup'])}: {speeds}, sparsity {model['sparsity']:.2%}")
    return [f"{result['implementation']} against the faster dense way, tokens x sparsity:", *operators]


def _train_lines(result: dict[str, Any]) -> list[str]:
    arms = [
        f"{name:<6} {arm['step_seconds']:8.3f} s a step  {arm['tokens_per_second']:10,.0f} tokens/s  "
        f"{arm['memory_bytes'] / 1e9:6.2f} GB"
        for name, arm in result["arms"].items()
    ]
    against = [
        f"vs_{name:<8} step time {_spread(vs['step_time'])}, tokens/s {_spread(vs['tokens_per_second'])}, "
        f"peak memory {vs['peak_memory']:.2f}"
        for name in result["arms"]
        if (vs := result.get(f"vs_{name}"))
    ]
    parts = ", ".join(f"{part} {share:.1%}" for part, share in result["arms"]["ours"]["parts"].items())
    mfu = "not known for this device" if result["mfu"] is None else f"{result['mfu']:.1%}"
    return [
        f"{result['batch']}, {result['dtype']}, {result['device']}: {result['arms']['ours']['how']}",
        *[f"options of hooks: {arm['options']}" for name, arm in result["arms"].items() if name == "hooks"],
        *arms,
        *against,
        f"of our step: {parts}; MFU {mfu}",
    ]


def _spread(of: dict[str, float]) -> str:
    return f"{of['median']:.2f} ({of['low']:.2f} to {of['high']:.2f})"
