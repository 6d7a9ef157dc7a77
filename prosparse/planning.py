"""`prosparse plan`: what a training would take of memory, time, disk and power, and how to split it over the GPUs.

In: a `Plan` config; no weights, no text, and where model.shape is given no config of the model. Out: plain numbers, the
picture of λ and learning rate, lines for people. docs/planning.md says where each term comes from.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from math import ceil, floor, log10, nan
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prosparse import schedule
from prosparse.checkpoint import checkpoints_kept
from prosparse.config import Checkpointing, Dtype, FfnMemory, Loss, Offload, Recipe, Train
from prosparse.engine import BUCKET
from prosparse.kernels.loss import CHUNK_BYTES
from prosparse.offload import SUB_GROUP, swap_bytes
from prosparse.plotting import GRAY, GREEN, frame, mark_stages
from prosparse.sizes import Sizes, sizes
from prosparse.telemetry import PEAK_FLOPS, duration
from prosparse.verb_configs import GpuKind, Plan

GB, GIB = 1e9, 2**30
BF16, FP32, STATES = 2, 4, 12  # bytes; the last of the fp32 weights and both moments of a parameter
# What DeepSpeed does where this project leaves it its own way, in elements.
ZERO1_BUCKET = 500_000_000  # gradients reduced together under ZeRO-1
ZERO3_BUCKET = 500_000_000  # under ZeRO-3, allocated at the start
ZERO3_LIVE = 1_000_000_000  # gathered weights at a time; also what the optimizer steps together
ZERO3_PREFETCH = 50_000_000
GPU_PROCESS = 1.5e9  # bytes of the CUDA context and of NCCL: assumed
CPU_PROCESS = 0.66e9  # resident bytes of a CPU rank with all libraries and the text before it loads a model: measured
CPU_HOLES = 0.13e9  # in its heap, of what was freed: chosen (docs/planning.md)
RECOMPUTED = {  # work of a step with activation checkpointing beside one without it
    Checkpointing.none: 1.0,
    Checkpointing.selective: 1.05,  # element-wise only: assumed
    Checkpointing.non_reentrant: 4 / 3,
    Checkpointing.reentrant: 4 / 3,
}


@dataclass(frozen=True)
class Gpu:
    """One GPU and its place in a node."""

    peak_flops: float  # dense bf16
    memory: float  # bytes that torch can have
    link: float  # bytes/s to the GPUs of its node, one way
    watts: float
    mfu: float  # of the computing alone: assumed, see docs/planning.md


GPUS = {
    GpuKind.a100_80g: Gpu(PEAK_FLOPS["A100"], 79 * GIB, 300e9, 400, 0.45),
    GpuKind.a800_80g: Gpu(PEAK_FLOPS["A800"], 79 * GIB, 200e9, 400, 0.45),
    GpuKind.h100: Gpu(PEAK_FLOPS["H100"], 79 * GIB, 450e9, 700, 0.38),
    GpuKind.h200: Gpu(PEAK_FLOPS["H200"], 139 * GIB, 450e9, 700, 0.38),
}


@dataclass(frozen=True)
class Choice:
    """What a user can choose without changing what is trained."""

    zero: int
    micro_batch: int
    checkpointing: Checkpointing

    @property
    def overrides(self) -> str:
        return f"zero=zero{self.zero} micro_batch={self.micro_batch} checkpointing={self.checkpointing}"


def cluster(config: Plan) -> Gpu:
    """The GPU that config.gpu names, with what the keys say otherwise."""
    units = {"peak_flops": ("peak_tflops", 1e12), "memory": ("memory_gb", GB), "link": ("link_gb_s", GB)}
    units |= {"watts": ("watts", 1), "mfu": ("mfu", 1)}
    own = {name: getattr(config, key) * unit for name, (key, unit) in units.items() if getattr(config, key) is not None}
    return Gpu(**own) if config.gpu is GpuKind.custom else replace(GPUS[config.gpu], **own)


# --- memory -----------------------------------------------------------------------------------------------------------


def activations(size: Sizes, ffn_tensors: int, how: Checkpointing) -> tuple[float, float]:
    """Bytes a token and layer that wait for backward, and bytes a token that the layer at work has beside them.

    Without checkpointing: both norms' inputs and outputs, q, k, v, what attention gives with its normalizers, q and k
    before norms of their own, and two (gate, up) or three (x1) tensors of the FFN.
    """
    hidden, neurons, normalizers = BF16 * size.hidden, BF16 * size.neurons, FP32 * (size.heads + 2)
    attention = 2 * BF16 * (size.queries + size.keys)  # q, k, v and the result
    normed = (BF16 * (size.queries + size.keys) + FP32 * (size.heads + size.kv_heads)) * size.head_norms
    whole = 4 * hidden + attention + normed + normalizers + ffn_tensors * neurons
    at_work = 3 * neurons + 4 * hidden  # gradients of x1, gate and up, and of the hidden states
    if how is Checkpointing.none:
        return whole, at_work
    if how is Checkpointing.selective:  # the layer's input, the results of matrix products and of attention
        return 3 * hidden + attention + normalizers + 2 * neurons, at_work + 3 * hidden + normed + neurons
    return hidden, at_work + whole


def memory(size: Sizes, config: Plan, ranks: int, choice: Choice, cuda: bool = True) -> dict[str, float]:
    """Bytes of one rank by what they are for; `peak` is their sum.

    `gradients` are those that wait between two micro-batches, `buffers` what is needed beside the other terms at the
    worst moment of a window or of the optimizer's step. What zero.offload moves away is `host`, no part of the peak, or
    `disk`, which only zero.offload=nvme has.
    """
    n, recipe = size.parameters, config.recipe
    tokens = choice.micro_batch * schedule.contexts(config.recipe)[-1] / config.sequence_parallel
    embedding = size.vocabulary * size.hidden
    recomputes = choice.checkpointing is Checkpointing.none and (
        config.speed.ffn is FfnMemory.recompute_x1 or (config.speed.ffn is FfnMemory.auto and not cuda)
    )
    ffn_tensors = {True: 2, False: 4 if config.speed.ffn is FfnMemory.stock else 3}[recomputes]
    layer, at_work = activations(size, ffn_tensors, choice.checkpointing)
    kept = tokens * (size.layers * layer + 2 * BF16 * size.hidden)
    logits = BF16 * tokens * size.vocabulary
    loss = min(3 * CHUNK_BYTES["cuda" if cuda else "cpu"], 2 * FP32 * tokens * size.vocabulary)
    if config.speed.loss is Loss.stock:
        loss = 2 * FP32 * tokens * size.vocabulary
    distills = schedule.distills(recipe, 1, schedule.total_steps(recipe))
    share = ranks if choice.zero == 3 else 1
    parts = {
        "weights": BF16 * n / share,
        "optimizer": STATES * n / ranks,
        "gradients": FP32 * n / (1 if choice.zero == 1 else ranks),
        "activations": kept,
        "logits": logits * (3 if distills else 1),  # gradients of loss and of the KL, where the logits have to stay
        "teacher": BF16 * n / share if distills else 0.0,
        "process": GPU_PROCESS,
    }
    if not cuda:  # a heap that keeps what loading freed; gloo's copies of gathered weights and of scattered gradients
        copies = 1 + (ranks > 1) * (2 if choice.zero == 3 else 1)
        parts["process"] = CPU_PROCESS + CPU_HOLES + BF16 * n * copies
    backward = max(loss, tokens * at_work + BF16 * embedding)  # when it begins, all activations are there
    if choice.zero == 1:
        flat = min(n, ZERO1_BUCKET)
        buffers = BF16 * n + max(backward, (FP32 + BF16) * flat - kept)  # bf16 gradients; those that are reduced
    elif choice.zero == 2:
        flat = min(n, BUCKET)
        freed = kept * min(1.0, flat / max(1, n - embedding))  # when the first bucket is full
        buffers = BF16 * (BUCKET if cuda else flat) + max(backward, BF16 * flat + FP32 * embedding - freed)
    else:
        gathered = BF16 * (min(n, ZERO3_LIVE) + min(n, ZERO3_PREFETCH))
        step = FP32 * min(n / ranks, ZERO3_LIVE) - kept - logits
        buffers = BF16 * (ZERO3_BUCKET if cuda else min(n, ZERO3_BUCKET)) + max(gathered + backward, step)
    parts["buffers"] = buffers
    moved = ["optimizer", "gradients"] * (config.zero.offload is not Offload.none and cuda)
    moved += ["weights"] * (config.zero.offload_weights and choice.zero == 3 and cuda)
    host = sum(parts[part] * (2 if part == "gradients" else 1) for part in moved)  # DeepSpeed has two buffers of these
    swaps = config.zero.offload is Offload.nvme and cuda
    if swaps:
        host -= parts["optimizer"] + parts["gradients"]  # one buffer of them, and those through which states go
        host += 4 * FP32 * min(n / ranks, SUB_GROUP)
    parts |= dict.fromkeys(moved, 0.0)
    parts |= {"peak": sum(parts.values()), "host": host}
    return parts | ({"disk": swap_bytes(recipe, n) / ranks} if swaps else {})


# --- time -------------------------------------------------------------------------------------------------------------


def work(size: Sizes, recipe: Recipe, step: int) -> float:
    """FLOPs of the window of `step`, without recomputation; a teacher's forward pass is a third more."""
    sequences, context = schedule.batch_at(recipe, step)
    distills = schedule.distills(recipe, step, step)
    return sequences * context * size.flops(context) * (4 / 3 if distills else 1)


def seconds(size: Sizes, config: Plan, choice: Choice, step: int) -> tuple[float, float]:
    """(computing, communication) of `step`, in seconds; a step takes both, none is counted as hidden.

    Bytes that a rank sends in a window, with N parameters, a micro-batches and w ranks, times (w - 1) / w: ZeRO-1
    2 · 2N of gradients and 2N of weights; ZeRO-2 a · 2 · 2N and 2N; ZeRO-3 a · (2 · 2N of weights and 2N of gradients).
    Ranks that share rows send q, k, v and what attention gives of their tokens, forward and backward, beside that.
    """
    gpu, ranks, n = cluster(config), config.gpus or 1, size.parameters
    computing = work(size, config.recipe, step) * RECOMPUTED[choice.checkpointing] / (ranks * gpu.peak_flops * gpu.mfu)
    rows, context = schedule.batch_at(config.recipe, step)
    sharing = config.sequence_parallel
    times = schedule.accumulation(rows, choice.micro_batch, ranks // sharing)
    elements = {1: 3 * n, 2: (2 * times + 1) * n, 3: 3 * times * n}[choice.zero] * (ranks - 1) / ranks
    exchanged = 4 * size.layers * (size.queries + size.keys) * rows * context / ranks
    elements += exchanged * (sharing - 1) / sharing
    speed = gpu.link if config.nodes == 1 else min(gpu.link, config.network_gb_s * GB)
    return computing, BF16 * elements / (speed * config.link_share)


def hours(size: Sizes, config: Plan, choice: Choice) -> float:
    """Of all stages, by the formula."""
    spans = schedule.spans(config.recipe)
    return sum(span.stage.steps * sum(seconds(size, config, choice, span.first)) for span in spans) / 3600


# --- the plan ---------------------------------------------------------------------------------------------------------


def choices(config: Plan) -> list[Choice]:
    """Every split whose micro-batches divide the windows of all stages."""
    recipe, groups = config.recipe, (config.gpus or 1) // config.sequence_parallel
    batches = [schedule.batch_at(recipe, span.first)[0] for span in schedule.spans(recipe)]
    for batch in batches:
        schedule.accumulation(batch, 1, groups)
    micro = [m for m in range(1, min(batches) // groups + 1) if all(batch % (m * groups) == 0 for batch in batches)]
    ways = [Checkpointing.none, Checkpointing.selective, Checkpointing.non_reentrant]
    sharded = config.zero.offload_weights or config.zero.offload is Offload.nvme
    stages = (3,) if sharded else (1, 2, 3) if config.zero.offload is Offload.none else (2, 3)
    return [Choice(zero, m, how) for zero in stages for how in ways for m in micro]


def not_reckoned(config: Train) -> list[str]:
    """The keys of a training that would change its memory or time and are not in the formulas."""
    found = {
        "dtype=fp32": config.dtype is not Dtype.bf16,
        "attention=eager": config.attention == "eager",
        "zero.overlap_comm=true": config.zero.overlap_comm is True,
        "zero.extra": bool(config.zero.extra),
    }
    return [key for key, given in found.items() if given]


def plan(config: Plan) -> dict[str, Any]:
    """What `prosparse plan` tells; ValueError if nothing fits, a window does not divide, or a key is not in it."""
    if keys := not_reckoned(config):
        raise ValueError(f"plan does not reckon with {', '.join(keys)}: leave that out here")
    config = replace(config, recipe=schedule.scaled(config.recipe))
    size, gpu, ranks, recipe = sizes(config.model), cluster(config), config.gpus or 1, config.recipe
    sharing, heads = config.sequence_parallel, (size.heads, size.kv_heads)
    if size.heads % sharing or (size.kv_heads % sharing and sharing % size.kv_heads):
        raise ValueError(f"sequence_parallel is {sharing}, which does not divide {heads} heads of queries and keys")
    room = gpu.memory * (1 - config.margin)
    tried = [(choice, memory(size, config, ranks, choice)) for choice in choices(config)]
    kept = f" zero.offload={config.zero.offload}" * (config.zero.offload is not Offload.none)
    kept += f" zero.offload_path={config.zero.offload_path}" * (config.zero.offload is Offload.nvme)
    kept += " zero.offload_weights=true" * config.zero.offload_weights
    kept += f" sequence_parallel={config.sequence_parallel}" * (config.sequence_parallel > 1)
    rows = [
        {"overrides": choice.overrides + kept, **asdict(choice), "hours": hours(size, config, choice), "bytes": parts}
        for choice, parts in tried
        if parts["peak"] <= room
    ]
    if not rows:
        least, parts = min(tried, key=lambda pair: pair[1]["peak"])
        raise ValueError(
            f"nothing fits: even {least.overrides} takes {parts['peak'] / GB:.1f} GB of a rank's {room / GB:.1f} GB "
            f"({gpu.memory / GB:.1f} GB less margin={config.margin}): raise gpus (now {ranks}), choose a GPU with more "
            f"memory, or lower recipe.batch.context (now {schedule.contexts(recipe)[-1]})"
        )
    best = min(rows, key=lambda row: (row["hours"], row["bytes"]["peak"]))
    chosen = Choice(best["zero"], best["micro_batch"], best["checkpointing"])
    told = Choice(config.zero.stage, config.micro_batch, config.checkpointing)
    given: dict[str, Any] = {"overrides": told.overrides, "bytes": memory(size, config, ranks, told)}
    given["divides"] = told.micro_batch in {choice.micro_batch for choice, _ in tried}
    stages = _stages(config, size, chosen)
    total = {key: sum(stage[key] for stage in stages) for key in ("steps", "tokens", "hours")}
    gpu_hours = total["hours"] * ranks
    energy = gpu_hours * gpu.watts * config.pue / 1000
    price = config.price_per_gpu_hour
    return {
        "model": config.model.source,
        "sizes": asdict(size),
        "ffn_share": size.ffn_parameters / size.parameters,
        "cluster": {"gpus": ranks, "gpu": str(config.gpu), "nodes": config.nodes, **asdict(gpu), "room": room}
        | {key: getattr(config, key) for key in ("network_gb_s", "link_share", "margin", "pue", "disk_gb_s")},
        "memory": rows,
        "recommended": best,
        "given": given | {"fits": given["bytes"]["peak"] <= room},
        "speed_from": "tokens_per_second" if config.tokens_per_second else "FLOPs and links",
        "stages": stages,
        "total": total
        | {
            "tokens_per_second": total["tokens"] / total["hours"] / 3600,
            "mfu": sum(work(size, recipe, s.first) * s.stage.steps for s in schedule.spans(recipe))
            / (total["hours"] * 3600 * ranks * gpu.peak_flops),
            "gpu_hours": gpu_hours,
            "end": stages[-1]["end"],
            "energy_kwh": energy,
            "price": None if price is None else price * gpu_hours,
        },
        "checkpoints": _checkpoints(config, size, stages),
    }


def _stages(config: Plan, size: Sizes, choice: Choice) -> list[dict[str, Any]]:
    recipe, table, passed = config.recipe, [], 0.0
    for span in schedule.spans(recipe):
        rows, context = schedule.batch_at(recipe, span.first)
        computing, waiting = seconds(size, config, choice, span.first)
        measured = config.tokens_per_second
        step = computing + waiting if measured is None else rows * context / measured
        passed += span.stage.steps * step / 3600
        steered = schedule.steered(recipe, span.first) is not None
        ends = (span.first, span.last)
        table.append(
            {
                "stage": span.name,
                "steps": span.stage.steps,
                "tokens": span.stage.steps * rows * context,
                "l1_factor": None if steered else [schedule.l1_factor(recipe, step) for step in ends],
                "target": span.stage.l1.sparsity if steered else None,
                "lr": [schedule.learning_rate(recipe, step) for step in ends],
                "flops_a_token": size.flops(context),
                "step_seconds": step,
                "computing_seconds": computing if measured is None else None,
                "communication_seconds": waiting if measured is None else None,
                "hours": span.stage.steps * step / 3600,
                "end": _end(config.start, passed),
            }
        )
    return table


def _end(start: str | None, passed: float) -> str | None:
    """The date `passed` hours after midnight of `start`."""
    if start is None:
        return None
    return (datetime.fromisoformat(start) + timedelta(hours=passed)).date().isoformat()


def _checkpoints(config: Plan, size: Sizes, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Their size, how often to save, and what is kept beside the space that is free."""
    recipe, one = config.recipe, STATES * size.parameters
    writing, steps = one / (config.disk_gb_s * GB), schedule.total_steps(recipe)
    least = max(1, ceil(writing / (config.save_share * min(stage["step_seconds"] for stage in stages))))
    digits = 10 ** max(0, floor(log10(least)) - 1)
    every = min(steps, ceil(least / digits) * digits)
    ends = [span.last for span in schedule.spans(recipe)]
    folder = Path(config.run_dir).expanduser().resolve()
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())
    kept = checkpoints_kept(steps, ends, replace(config.save, every=every))
    free = shutil.disk_usage(disk).free
    return {
        "bytes": one,
        "write_seconds": writing,
        "every": every,
        "hours_between": every * max(stage["step_seconds"] for stage in stages) / 3600,
        "kept": kept,
        "kept_bytes": kept * one,
        "free_bytes": free,
        "disk": str(disk),
        "fits": kept * one <= free,
    }


# --- for people -------------------------------------------------------------------------------------------------------


def lines(config: Plan, result: dict[str, Any]) -> list[str]:
    """The plan in words."""
    size, of, best, total, saved = (result[key] for key in ("sizes", "cluster", "recommended", "total", "checkpoints"))
    nodes = f" on {of['nodes']} nodes" if of["nodes"] > 1 else ""
    told = [
        f"model    {result['model']}: {size['parameters'] / 1e6:,.1f} M parameters, {result['ffn_share']:.1%} in FFNs",
        f"cluster  {of['gpus']} x {of['gpu']}{nodes}: {of['peak_flops'] / 1e12:,.0f} TFLOP/s, "
        f"{of['memory'] / GB:.1f} GB ({of['room'] / GB:.1f} GB with margin {of['margin']:.0%} free), links "
        f"{of['link'] / GB:.0f} GB/s, assumed MFU of the computing {of['mfu']:.0%}",
        "",
        "GB of a rank; of each ZeRO stage and checkpointing the largest micro-batch that fits (* recommended)",
        f"  {'zero':>5} {'checkpointing':>14} {'micro':>6} "
        + " ".join(f"{part:>11}" for part in best["bytes"])
        + f" {'hours' if config.tokens_per_second is None else 'formula':>8}",
    ]
    largest = {(row["zero"], row["checkpointing"]): row for row in result["memory"]}
    for row in [row for row in result["memory"] if row == best or row in largest.values()]:
        numbers = " ".join(f"{part / GB:>11.2f}" for part in row["bytes"].values())
        split = f"{row['zero']:>5} {row['checkpointing']!s:>14} {row['micro_batch']:>6}"
        told.append(f"{'*' if row == best else ' '} {split} {numbers} {row['hours']:>8,.1f}")
    given = result["given"]
    fits = "fits" if given["fits"] else "does not fit"
    fits += "" if given["divides"] else f", but a window does not divide by {config.micro_batch} x {of['gpus']}"
    told += [
        f"  the experiment's own {given['overrides']}: {given['bytes']['peak'] / GB:.1f} GB, {fits}",
        "",
        f"paste    {best['overrides']} save.every={saved['every']}",
        "",
        f"{'stage':<14} {'steps':>8} {'tokens':>10} {'λ':>20} {'learning rate':>20} {'s/step':>8} {'hours':>9}  end",
    ]
    for stage in result["stages"]:
        pair = stage["l1_factor"]
        factors = f"{pair[0]:.3g} -> {pair[1]:.3g}" if pair else f"to {stage['target']:.2%} zeros"
        rates = f"{stage['lr'][0]:.2g} -> {stage['lr'][1]:.2g}"
        told.append(
            f"{stage['stage']:<14} {stage['steps']:>8,} {stage['tokens'] / 1e9:>8.3f} B {factors:>20} {rates:>20} "
            f"{stage['step_seconds']:>8.2f} {stage['hours']:>9,.1f}  {stage['end'] or '-'}"
        )
    told.append(
        f"{'all':<14} {total['steps']:>8,} {total['tokens'] / 1e9:>8.3f} B {'':>20} {'':>20} {'':>8} "
        f"{total['hours']:>9,.1f}  {total['end'] or '-'}"
    )
    now, first, how = datetime.now() + timedelta(hours=total["hours"]), result["stages"][0], "as tokens_per_second says"
    if (computing := first["computing_seconds"]) is not None:
        how = f"a step of {first['stage']}: computing {computing:.2f} s, links {first['communication_seconds']:.2f} s"
    price = "price_per_gpu_hour not given" if total["price"] is None else f"price {total['price']:,.0f}"
    enough = "" if saved["fits"] else ": TOO LITTLE, see save.keep and save.keep_stages"
    told += [
        "",
        f"time     {duration(3600 * total['hours'])}, {total['gpu_hours']:,.0f} GPU hours, "
        f"{total['tokens_per_second']:,.0f} tokens/s, MFU {total['mfu']:.1%}; {how}",
        f"         started now it ends {now:%Y-%m-%d}; evaluations and saves are not counted",
        f"energy   {total['energy_kwh']:,.0f} kWh ({of['watts']:.0f} W a GPU, PUE {of['pue']}); {price}",
        f"disk     a checkpoint {saved['bytes'] / GB:.1f} GB, {saved['write_seconds']:.0f} s at {of['disk_gb_s']:g} "
        f"GB/s; every {saved['every']} steps, {duration(3600 * saved['hours_between'])}, it takes "
        f"{config.save_share:.1%} of the time",
        f"         {saved['kept']} are kept: {saved['kept_bytes'] / GB:,.1f} GB, {saved['free_bytes'] / GB:,.1f} "
        f"GB are free at {saved['disk']}{enough}",
    ]
    return told


def picture(config: Plan, result: dict[str, Any]) -> Figure:
    """λ and learning rate over the steps, with the stages."""
    recipe = schedule.scaled(config.recipe)
    total = schedule.total_steps(recipe)
    spans = schedule.spans(recipe)
    steps = sorted({1 + i * (total - 1) // 999 for i in range(1000)} | {s for x in spans for s in (x.first, x.last)})
    train = [{"step": step, "stage": schedule.stage_at(recipe, step).name} for step in steps]
    factors = [nan if schedule.steered(recipe, step) else schedule.l1_factor(recipe, step) for step in steps]
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    panels[0].plot(steps, factors, color=GREEN, lw=1.5)
    panels[1].plot(steps, [schedule.learning_rate(recipe, step) for step in steps], color=GRAY, lw=1.5)
    for span in spans:
        if schedule.steered(recipe, span.first):
            middle, words = (span.first + span.last) / 2, f"steered to\n{span.stage.l1.sparsity:.0%} zeros"
            panels[0].text(middle, 0.5, words, ha="center", transform=panels[0].get_xaxis_transform(), color=GRAY)
    for axes, name in zip(panels, ("L1 factor λ\n(unit of the recipe)", "learning rate"), strict=True):
        axes.set_ylabel(name)
        axes.set_ylim(0, None)
        frame(axes)
    panels[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    panels[1].set_xlabel(
        f"step ({result['total']['hours']:,.1f} hours predicted, {result['total']['tokens'] / 1e9:.4g} B tokens)"
    )
    panels[1].set_xlim(1, total)
    mark_stages(figure, panels, train)
    figure.align_ylabels()
    return figure
