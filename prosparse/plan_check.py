"""`prosparse plan check=RUN`: what the formulas of planning.py say of a run, beside what the run measured.

In: a run folder. Out: predicted and measured memory, FLOPs and time of a step, with their ratios.
"""

import json
import re
from dataclasses import is_dataclass, replace
from statistics import median
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch.utils.flop_counter import FlopCounterMode

from prosparse import schedule
from prosparse.planning import GB, Choice, cluster, memory, not_reckoned, seconds
from prosparse.records import Record, read_run
from prosparse.sizes import meta_model, sizes
from prosparse.verb_configs import GpuKind, Plan

WARMING_UP = 2  # steps that are no measure of the time of one
NAMES = {"A100": GpuKind.a100_80g, "A800": GpuKind.a800_80g, "H100": GpuKind.h100, "H200": GpuKind.h200}


def check(config: Plan) -> tuple[dict[str, Any], list[str]]:
    """(the comparison, the same in words); ValueError if config.check is no run that trained."""
    assert config.check is not None
    try:
        record = read_run(config.check)
    except ValueError as error:
        raise ValueError(f"check={config.check}: {str(error).removeprefix('runs: ')}") from error
    if not record.config or not record.train_rows:
        raise ValueError(f"check={config.check} has no training rows beside a config: give a run that has trained")
    ranks, name = _where(record, config)
    kind = next((kind for part, kind in NAMES.items() if part in name), None)
    cuda = name != "CPU"
    run = replace(_as_plan(record.config, config), gpus=ranks, gpu=kind or config.gpu)
    rows, last = record.train_rows, record.train_rows[-1]["step"]
    if last < schedule.total_steps(run.recipe):  # what was trained, not what was planned
        run.recipe.stages = {s.name: s.stage for s in schedule.spans(run.recipe) if s.first <= last}
    size, choice = sizes(run.model), Choice(run.zero.stage, run.micro_batch, run.checkpointing)
    parts = memory(size, run, ranks, choice, cuda)
    peak = parts["peak"] - (parts["process"] if cuda else 0)  # what torch has allocated, or what is resident
    longest = max(
        (span for span in schedule.spans(run.recipe)), key=lambda s: schedule.batch_at(run.recipe, s.first)[1]
    )
    sequences, context = schedule.batch_at(run.recipe, longest.first)
    steady = [row for row in rows if row["step"] > rows[0]["step"] + WARMING_UP - 1] or rows
    steady = [row for row in steady if longest.first <= row["step"] <= longest.last] or steady
    took = median(row["step_seconds"] for row in steady)
    flops = sequences * context * size.flops(context)
    predicted_seconds, why = None, "no peak is known for a CPU: give tokens_per_second=N, from prosparse bench"
    if config.tokens_per_second is not None:
        predicted_seconds, why = sequences * context / config.tokens_per_second, "from tokens_per_second"
    elif kind is not None or (cuda and config.peak_tflops is not None):
        predicted_seconds = sum(seconds(size, run, choice, longest.first))
        why = f"{cluster(run).mfu:.0%} of the peak assumed"
    elif cuda:
        why = f"no peak is known for {name}: give gpu=custom and its keys"
    pairs = {
        "peak memory of a rank (bytes)": (peak, max(row["memory_bytes"] for row in rows)),
        "FLOPs of a step": (flops, _counted(run, context) * sequences * context),
        "seconds of a step": (predicted_seconds, took),
    }
    compared: dict[str, dict[str, Any]] = {
        what: {"predicted": ours, "measured": theirs, "ratio": None if ours is None else ours / theirs}
        for what, (ours, theirs) in pairs.items()
    }
    result = {
        "run": str(record.folder),
        "device": f"{ranks} x {name}",
        "overrides": choice.overrides,
        "context": context,
    }
    result |= {
        "compared": compared,
        "bytes": parts,
        "not_reckoned": not_reckoned(run),
        "achieved_flops_a_rank": (achieved := flops / took / ranks),
        "time": why,
    }
    told = [f"{record.folder}: {ranks} x {name}, {choice.overrides}, context {context}, {len(rows)} steps"]
    for what, row in compared.items():
        shown = [
            "-" if value is None else f"{value:.4g}" for value in (row["predicted"], row["measured"], row["ratio"])
        ]
        told.append(f"{what:<32} predicted {shown[0]:>10}  measured {shown[1]:>10}  ratio {shown[2]:>6}")
    told.append(f"achieved {achieved / 1e12:.4g} TFLOP/s a rank; time predicted: {why}")
    if keys := not_reckoned(run):
        told.append(f"not in the formulas, so the prediction is of a run without: {', '.join(keys)}")
    told.append("predicted GB: " + ", ".join(f"{part} {value / GB:.2f}" for part, value in parts.items()))
    return result, told


def _where(record: Record, config: Plan) -> tuple[int, str]:
    """(ranks, name of the device) of the run: from its report, else its checkpoints and config.gpus."""
    if match := re.match(r"(\d+) (?:x )?(.+?)(?: ranks?)?$", record.report["device"]):
        if config.gpus not in (None, int(match[1])):
            raise ValueError(f"gpus is {config.gpus}, but check={config.check} had {match[1]} ranks: leave gpus out")
        return int(match[1]), match[2]
    for manifest in sorted(record.folder.glob("checkpoints/step-*/manifest.json"), reverse=True):
        ranks = json.loads(manifest.read_text())["ranks"]
        break
    else:
        ranks = config.gpus
    if ranks is None:
        raise ValueError(f"check={config.check} has neither report nor checkpoints: give gpus=N, its ranks")
    if any(row.get("mfu") is not None for row in record.train_rows):
        raise ValueError(
            f"check={config.check} ran on GPUs and has no report yet, which names them: check it when it ends"
        )
    return ranks, "CPU"


def _as_plan(values: dict[str, Any], config: Plan) -> Plan:
    """The run's config.yaml as the plan's, whose own keys stay."""
    own = {key: value for key, value in vars(config).items() if key not in values}
    return replace(_typed(Plan, {k: v for k, v in values.items() if k in Plan.__dataclass_fields__}), **own)


def _typed(kind: Any, value: Any) -> Any:
    """Plain values of a config.yaml as the dataclasses and enums that `kind` says; keys of older versions go."""
    if kind is Any or value is None:
        return value
    if get_origin(kind) in (Union, UnionType):
        return _typed(next(k for k in get_args(kind) if k is not type(None)), value)
    if get_origin(kind) is dict:
        return {key: _typed(get_args(kind)[1], part) for key, part in value.items()}
    if is_dataclass(kind):
        make: Any = kind
        hints = get_type_hints(kind)
        return make(**{key: _typed(hints[key], part) for key, part in value.items() if key in hints})
    return kind(value) if isinstance(kind, type) and not isinstance(value, list) else value


def _counted(run: Plan, context: int) -> float:
    """FLOPs a token that torch counts in a forward and backward pass of one row, computed without numbers."""
    model, _ = meta_model(run.model)
    ids = torch.zeros(1, context, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, context, context, device="meta")  # else transformers would look for packed documents
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    return counter.get_total_flops() / context
