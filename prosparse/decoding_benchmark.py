"""`prosparse bench what=decode`: the operators over sparsities, and a model end to end.

In: a `Bench` config with shapes or a checkpoint. Out: a dict that JSON takes, and its plot.
Everything is compared with what it should be before it is timed: a mismatch is a RuntimeError.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prosparse.activations import intermediate
from prosparse.benchmarking import in_turns, ratio
from prosparse.config import Implementation
from prosparse.decoding import disable_sparse_decoding, enable_sparse_decoding, gate_and_up, sparse_layers
from prosparse.ffn import find_ffns, observing, sparse_ffns, substitute
from prosparse.kernels.decode import choose, dense, sparse_down, sparse_up
from prosparse.models.load import load_model, load_tokenizer
from prosparse.plotting import BLUE, GRAY, GREEN, ORANGE, VERMILION
from prosparse.verb_configs import Bench

OPERATORS = ("up", "down", "both", "ffn")  # up: step 2 of a sparse FFN; down: step 3; ffn: with the dense gate
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest value
CASES = 12  # hidden states, each with neurons of its own that fire
CALLS = 2  # of an arm in one round, each on the next case
COPIED = 512 * 2**20  # bytes that the copies of one FFN's weights fill at least: caches hold none of them
Weights = Sequence[tuple[Tensor, Tensor, Tensor]]  # gate, up and down of every copy
PROMPT = "def area(radius):"


def decode(config: Bench, progress: Callable[[int, int], None] | None = None) -> dict:
    """`operators`, by batch and sparsity, and with a checkpoint or layers `model`; seconds are medians over the rounds.

    Raises RuntimeError if an output is not what it should be, ValueError for an implementation that cannot run here.
    """
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.dtype]
    chosen = choose(config.implementation, device)
    result: dict[str, Any] = {"implementation": str(chosen), "device": str(device), "dtype": str(config.dtype)}
    result |= {"rounds": config.rounds, "threads": torch.get_num_threads(), "checkpoint": config.checkpoint}
    if config.checkpoint is not None:
        model = load_model(config.checkpoint, dtype=dtype, device=device)
        ids = load_tokenizer(config.checkpoint)(PROMPT, return_tensors="pt").input_ids.to(device)
        result["model"] = {"prompt": PROMPT} | end_to_end(model, ids, config.tokens, config.rounds, chosen)
        return result
    result |= {"hidden": config.hidden, "neurons": config.neurons, "calls": CALLS, "cases": CASES}
    result |= operators(config, device, dtype, chosen, progress)
    if config.layers > 0:
        shape = (config.hidden, config.neurons, config.layers)
        model = random_llama(*shape, config.sparsities[-1], dtype, device)
        ids = torch.arange(16, device=device)[None]
        result["model"] = {"layers": config.layers} | end_to_end(model, ids, config.tokens, config.rounds, chosen)
    return result


# --- operators --------------------------------------------------------------------------------------------------------


def operators(
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    chosen: Implementation,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """`operators`: a row a batch and sparsity; `break_even` by batch and operator; `copy_bytes_per_second`."""
    draw = torch.Generator(device).manual_seed(0)
    shape = (config.neurons, config.hidden)
    one = 3 * config.neurons * config.hidden * dtype.itemsize
    copies = CASES if device.type == "cuda" else max(2, math.ceil(COPIED / one))

    def weight() -> Tensor:  # scaled so that a projection keeps the size of what enters it
        return (torch.randn(shape, generator=draw, device=device) / config.hidden**0.5).to(dtype)

    weights = [(weight(), weight(), weight()) for _ in range(copies)]  # gate, up, down by neuron
    rivals = {
        other: [(gate.to(other), up.to(other), down.t().contiguous().to(other)) for gate, up, down in weights]
        for other in (dtype, torch.float32)
    }
    rows = []
    for batch in config.batches:
        states = torch.randn(CASES, batch, config.hidden, generator=draw, device=device).to(dtype)
        gates = torch.stack([F.linear(state, weights[k % copies][0]) for k, state in enumerate(states)])
        for sparsity in config.sparsities:
            rows.append(_operators_at(weights, rivals, states, gates, sparsity, chosen, config.rounds))
            if progress is not None:
                progress(len(rows), len(config.batches) * len(config.sparsities))
    break_even = {
        str(batch): {
            name: break_even_of(
                [(row["sparsity"], row[name]["speedup"]["median"]) for row in rows if row["batch"] == batch]
            )
            for name in OPERATORS
        }
        for batch in config.batches
    }
    return {"operators": rows, "break_even": break_even, "copies": copies}


def _operators_at(
    weights: Weights,
    rivals: Mapping[torch.dtype, Weights],
    states: Tensor,
    gates: Tensor,
    sparsity: float,
    chosen: Implementation,
    rounds: int,
) -> dict:
    """One row: the seconds of every way to compute every operator, at the threshold that gives `sparsity`."""
    sample = gates.flatten()[: 2**24].float().cpu().numpy().copy()
    rank = min(int(sparsity * len(sample)), len(sample) - 1)
    sample.partition(rank)
    threshold = torch.tensor(sample[rank] if sparsity > 0 else -math.inf).to(gates.dtype).item()
    copies = len(weights)
    x1s = torch.stack([intermediate("fatrelu", threshold, gate) for gate in gates])

    def ffn(k: int, implementation: Implementation) -> Tensor:
        gate_weight, up_weight, down_rows = weights[k % copies]
        gate = dense(states[k], gate_weight, None, implementation)
        x1 = sparse_up(gate, states[k], up_weight, "fatrelu", threshold, implementation=implementation)
        return sparse_down(x1, down_rows, implementation=implementation)

    def up(k: int, implementation: Implementation) -> Tensor:
        return sparse_up(
            gates[k], states[k], weights[k % copies][1], "fatrelu", threshold, implementation=implementation
        )

    def down(k: int, implementation: Implementation) -> Tensor:
        return sparse_down(x1s[k], weights[k % copies][2], implementation=implementation)

    wide = rivals[torch.float32]

    def every_neuron(k: int, gate: Tensor) -> Tensor:  # by that gate: one near the threshold may be on either side
        up = F.linear(states[k].float(), wide[k][1])
        return F.linear(intermediate("fatrelu", threshold, gate.float(), up), wide[k][2])

    sparse: dict[str, Callable] = {"up": up, "down": down, "ffn": ffn}
    dense_of = {
        dtype: dense_arms(cast, states.to(dtype), gates.to(dtype), x1s.to(dtype), threshold)
        for dtype, cast in rivals.items()
    }
    for k in range(min(copies, CASES)):
        found: dict[str, tuple[Tensor, Mapping[str, Callable]]] = {}  # by way its own gate, and its operators
        for own in (chosen, Implementation.eager):
            gate = dense(states[k], weights[k][0], None, own)
            found[str(own)] = gate, {name: partial(run, implementation=own) for name, run in sparse.items()}
        for dtype, cast in rivals.items():
            found[f"dense {dtype}"] = F.linear(states[k].to(dtype), cast[k][0]), dense_of[dtype]
        right = {name: dense_of[torch.float32][name](k) for name in ("up", "down")}
        for what, (gate, runs) in found.items():
            require_equal(f"{what} gate", gate, F.linear(states[k].float(), wide[k][0]))
            for name, expected in {**right, "ffn": every_neuron(k, gate)}.items():
                require_equal(f"{what} {name}", runs[name](k), expected)
    arms: dict[str, Callable[[], float]] = {}
    for name, run in sparse.items():
        arms[f"ours {name}"] = timed(partial(run, implementation=chosen), states.device)
        arms[f"eager {name}"] = timed(partial(run, implementation=Implementation.eager), states.device, graph=False)
    for dtype, rival in dense_of.items():
        for name, run in rival.items():
            arms[f"dense_{str(dtype).removeprefix('torch.')} {name}"] = timed(run, states.device)
    source = weights[0][0]
    target = torch.empty_like(source)
    arms["copy"] = timed(lambda k: target.copy_(weights[k % copies][0]), states.device)
    seconds = in_turns(arms, rounds)
    ways = list(dict.fromkeys(arm.partition(" ")[0] for arm in arms if arm != "copy"))
    for way in ways:
        seconds[f"{way} both"] = [
            sum(pair) for pair in zip(*(seconds[f"{way} {n}"] for n in ("up", "down")), strict=True)
        ]
    zeros = x1s == 0
    row: dict = {"batch": states.shape[1], "sparsity": sparsity, "measured_sparsity": zeros.float().mean().item()}
    row["skipped"] = zeros.all(1).float().mean().item()  # neurons that no token of the batch needs
    for name in OPERATORS:
        fastest = min((w for w in ways if w.startswith("dense")), key=lambda way: median(seconds[f"{way} {name}"]))
        row[name] = {"microseconds": {way: 1e6 * median(seconds[f"{way} {name}"]) for way in ways}, "rival": fastest}
        row[name]["speedup"] = ratio(seconds[f"{fastest} {name}"], seconds[f"ours {name}"])
    size = source.numel() * source.element_size()
    copied = 2 * size / median(seconds["copy"])
    row["copy_bytes_per_second"] = copied
    row["dense_share_of_copy"] = size / (1e-6 * row["up"]["microseconds"][ways[2]]) / copied
    return row


def dense_arms(
    weights: Weights, states: Tensor, gates: Tensor, x1s: Tensor, threshold: float
) -> dict[str, Callable[[int], Tensor]]:
    """The operators on every neuron through torch: functions of the case. weights: as nn.Linear has them."""
    copies = len(weights)

    def up(k: int) -> Tensor:
        return intermediate("fatrelu", threshold, gates[k], F.linear(states[k], weights[k % copies][1]))

    def down(k: int) -> Tensor:
        return F.linear(x1s[k], weights[k % copies][2])

    def ffn(k: int) -> Tensor:
        gate, up, down = weights[k % copies]
        x1 = intermediate("fatrelu", threshold, F.linear(states[k], gate), F.linear(states[k], up))
        return F.linear(x1, down)

    return {"up": up, "down": down, "ffn": ffn}


def require_equal(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise RuntimeError unless `found` is `expected` within its dtype's TOLERANCE of the largest value."""
    far = (found.to(expected.dtype) - expected).abs().max()
    error = (far / expected.abs().max().clamp(min=1e-30)).item()
    if not error <= TOLERANCE[found.dtype]:
        raise RuntimeError(f"{what} is off by {error:.2e} of the largest value: nothing is timed")


def timed(run: Callable[[int], Any], device: torch.device, graph: bool = True) -> Callable[[], float]:
    """An arm: mean seconds of `run` on its next CALLS cases; on a GPU on all cases, replayed as a CUDA graph."""
    if device.type == "cuda":
        return _timed_on_gpu(run, graph)
    at = 0

    def arm() -> float:
        nonlocal at
        start = time.perf_counter()
        for k in range(at, at + CALLS):
            run(k % CASES)
        at += CALLS
        return (time.perf_counter() - start) / CALLS

    run(0)
    return arm


def _timed_on_gpu(run: Callable[[int], Any], graph: bool) -> Callable[[], float]:
    def every_case() -> None:
        for k in range(CASES):
            run(k)

    every_case()
    torch.cuda.synchronize()
    replay: Callable[[], Any] = every_case
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            every_case()
        replay = captured.replay
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def arm() -> float:
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / CASES

    return arm


def break_even_of(points: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity above which all measured speedups are at least 1, between two points by a line; None: nowhere.

    points: (sparsity, speedup). 0 if even the least sparse point is no slower.
    """
    points = sorted(points)
    slower = [i for i, (_, speedup) in enumerate(points) if speedup < 1]
    if not slower:
        return 0.0
    if slower[-1] == len(points) - 1:
        return None
    (low, before), (high, after) = points[slower[-1]], points[slower[-1] + 1]
    return low + (high - low) * (1 - before) / (after - before)


# --- models -----------------------------------------------------------------------------------------------------------


def random_llama(
    hidden: int, neurons: int, layers: int, sparsity: float, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A Llama of random weights, heads of 64, with FATReLU at the threshold that gives all layers about `sparsity`."""
    torch.manual_seed(0)
    heads: dict = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    sizes: dict = {
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
    }
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads, hidden_act="relu")).eval().to(dtype)
    scores: list[Tensor] = []
    ffns: Any = find_ffns(model).values()
    hooks = [
        ffn.gate_proj.register_forward_hook(lambda module, inputs, out: scores.append(out.flatten().float().cpu()))
        for ffn in ffns
    ]
    with torch.no_grad():
        model(torch.arange(64, device=device)[None])
    for hook in hooks:
        hook.remove()
    every = torch.cat(scores)
    substitute(model, "fatrelu", every.kthvalue(max(1, int(sparsity * len(every)))).values.item())
    return model


@torch.no_grad()
def end_to_end(model: PreTrainedModel, ids: Tensor, tokens: int, rounds: int, implementation: Implementation) -> dict:
    """Greedy generation of `tokens` tokens after ids [1, context] with and without sparse decoding, in turns.

    The same tokens go through both: those of dense decoding. Each layer's FFN is compared first. `logit_error`, of the
    norm, is not judged: a gate that rounding puts on the other side of the threshold changes all layers above it.
    """
    disable_sparse_decoding(model)
    chosen = _greedy(model, ids, tokens)
    zeros: list[Tensor] = []
    states = _listen(model, ids, chosen)
    with observing(model, lambda layer, x1: zeros.append((x1 == 0).float().mean())) as layers:
        expected, _ = _steps(model, ids, chosen)
    by_layer = torch.stack(zeros[layers:]).unflatten(0, (-1, layers)).mean(0).tolist()  # without the prompt's
    enable_sparse_decoding(model, implementation, break_even=0)  # every layer is compared
    _compare_ffns(model, states, implementation)
    enable_sparse_decoding(model, implementation)
    found, _ = _steps(model, ids, chosen)
    on = sparse_layers(model)
    error = ((found - expected).norm() / expected.norm()).item()
    per_layer: dict[str, list[list[float]]] = {"dense": [], "sparse": []}
    per_token: dict[str, list[float]] = {"dense": [], "sparse": []}
    for number in range(rounds):
        for way in ("dense", "sparse") if number % 2 else ("sparse", "dense"):
            if way == "dense":
                disable_sparse_decoding(model)
            else:
                enable_sparse_decoding(model, implementation)
            _steps(model, ids, chosen[:, :2])  # warm
            per_token[way].append(_steps(model, ids, chosen)[1])
            per_layer[way].append(_ffn_seconds(model, states))
    disable_sparse_decoding(model)
    ffn = {way: [sum(layer) for layer in seconds] for way, seconds in per_layer.items()}
    columns = {way: [1e6 * median(c) for c in zip(*seconds, strict=True)] for way, seconds in per_layer.items()}
    return {
        "generated_tokens": tokens,
        "logit_error": error,
        "same_greedy_tokens": bool(torch.equal(found.argmax(-1), expected.argmax(-1))),
        "sparsity": mean(by_layer),
        "sparsity_by_layer": by_layer,
        "sparse_layers": on,
        "ffn_microseconds_by_layer": columns,
        "ffn_speedup": ratio(ffn["dense"], ffn["sparse"]),
        "tokens_per_second": {way: 1 / median(seconds) for way, seconds in per_token.items()},
        "speedup": ratio(per_token["dense"], per_token["sparse"]),
    }


def _greedy(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """The likeliest tokens after ids, [1, tokens]."""
    out = model(ids, use_cache=True)
    chosen = [out.logits[:, -1:].argmax(-1)]
    while len(chosen) < tokens:
        out = model(chosen[-1], past_key_values=out.past_key_values, use_cache=True)
        chosen.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(chosen, dim=1)


def _steps(model: Any, ids: Tensor, given: Tensor) -> tuple[Tensor, float]:
    """The logits [tokens, vocabulary], fp32, of `given` one by one after ids, and the mean seconds of one."""
    past = model(ids, use_cache=True).past_key_values
    logits = []
    _wait(ids.device)
    start = time.perf_counter()
    for token in given.split(1, dim=1):
        logits.append(model(token, past_key_values=past, use_cache=True).logits[0, -1])
    _wait(ids.device)
    seconds = (time.perf_counter() - start) / given.shape[1]
    return torch.stack(logits).float(), seconds


def _listen(model: PreTrainedModel, ids: Tensor, given: Tensor) -> list[list[Tensor]]:
    """By layer the hidden states that enter its FFN for each token of `given`, each [1, 1, hidden]."""
    heard: list[list[Tensor]] = [[] for _ in find_ffns(model)]

    def hear(module: Any, inputs: tuple, layer: int) -> None:
        heard[layer].append(inputs[0].clone())

    hooks = [
        ffn.register_forward_pre_hook(partial(hear, layer=layer)) for layer, ffn in enumerate(find_ffns(model).values())
    ]
    _steps(model, ids, given)
    for hook in hooks:
        hook.remove()
    return [states[1:] for states in heard]


def _compare_ffns(model: PreTrainedModel, states: list[list[Tensor]], implementation: Implementation) -> None:
    """Each layer's gate and FFN, for each token and by its own gate, against every neuron in fp32."""

    def wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())

    for layer, (ffn, heard) in enumerate(zip(sparse_ffns(model), states, strict=True)):
        down: Any = ffn.down_proj
        gate_weight, up_weight, gate_bias, up_bias = gate_and_up(ffn)
        rows = torch.cat(heard)[:, 0]
        gate = torch.cat([dense(row, gate_weight, gate_bias, implementation) for row in rows.split(1)])
        threshold = torch.tensor(ffn.param, dtype=gate.dtype).item()  # as torch compares
        x1 = intermediate(ffn.activation, threshold, gate.float(), wide(rows, up_weight, up_bias))
        found = {
            "gate": (gate, wide(rows, gate_weight, gate_bias)),
            "FFN": (torch.cat([ffn(state) for state in heard])[:, 0], wide(x1, down.weight, down.bias)),
        }
        for part, tokens in found.items():
            for ours, expected in zip(*tokens, strict=True):
                require_equal(f"layer {layer}: its {part}", ours, expected)


def _ffn_seconds(model: PreTrainedModel, states: list[list[Tensor]]) -> list[float]:
    """Mean seconds of each layer's FFN on its own hidden states; layers follow each other as when decoding."""
    spent = [0.0] * len(states)
    ffns = list(find_ffns(model).values())
    for each in zip(*states, strict=True):
        for layer, (ffn, state) in enumerate(zip(ffns, each, strict=True)):
            start = time.perf_counter()
            ffn(state)
            _wait(state.device)
            spent[layer] += time.perf_counter() - start
    return [seconds / len(states[0]) for seconds in spent]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- plot -------------------------------------------------------------------------------------------------------------


def draw(result: dict) -> Figure:
    """Of shapes the speedup against sparsity, of a checkpoint the time of each layer's FFN."""
    return _draw_operators(result) if "operators" in result else _draw_layers(result["model"])


def _draw_layers(model: dict) -> Figure:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for way, color in (("dense", GRAY), ("sparse", BLUE)):
        axes.plot(model["ffn_microseconds_by_layer"][way], "o-", color=color, ms=4, lw=1.3, label=way)
    axes.set(xlabel="layer", ylabel="FFN of one token (µs)", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", lw=0.7)
    axes.legend(frameon=False)
    return figure


def _draw_operators(result: dict) -> Figure:
    """A panel a batch, a line an operator, with its spread and a mark at the break-even."""
    rows = result["operators"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure = Figure(figsize=(1.5 + 4 * len(batches), 4.8), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    labels = {"up": "up (S2)", "down": "down (S3)", "both": "up and down", "ffn": "whole FFN, dense gate"}
    for axes, batch in zip(panels, batches, strict=True):
        own = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["sparsity"])
        x = [100 * row["sparsity"] for row in own]
        for (name, label), color in zip(labels.items(), (BLUE, ORANGE, GREEN, VERMILION), strict=True):
            low, middle, high = ([row[name]["speedup"][key] for row in own] for key in ("low", "median", "high"))
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
            axes.plot(x, middle, "o-", color=color, ms=4, lw=1.3, label=label)
            crossing = result["break_even"][str(batch)][name]
            if crossing:
                axes.plot(100 * crossing, 1, "D", color=color, ms=8, mec="white", zorder=4)
        axes.axhline(1, color=GRAY, lw=0.9, zorder=0)
        axes.set(xlabel="sparsity of a token (%)", title=f"{batch} token{'s' * (batch > 1)} at once", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E5E5E5", lw=0.7)
        axes.set_axisbelow(True)
    ticks = [0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]
    panels[0].set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    panels[0].minorticks_off()
    speedups = [row[name]["speedup"][key] for row in rows for name in OPERATORS for key in ("low", "high")]
    panels[0].set_ylim(min(speedups) / 1.2, max(speedups) * 1.2)
    panels[0].set_ylabel("speedup over the faster dense way")
    panels[0].legend(frameon=False, loc="upper left")
    return figure
