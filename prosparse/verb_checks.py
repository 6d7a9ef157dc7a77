"""What must be true across the keys of the verbs beside `train`; `validate` checks the config of any verb.

In: a config object of any verb. Out: nothing, or ValueError that names the key and the remedy.
"""

import re
from datetime import date
from math import isfinite
from pathlib import Path
from typing import Any

from prosparse.checks import require, validate_device, validate_recipe, validate_shift, validate_tasks, validate_train
from prosparse.config import ExportFormat, Train
from prosparse.verb_configs import (
    Bench,
    Benchmark,
    Eval,
    Export,
    Generate,
    GpuKind,
    Measure,
    Plan,
    Predict,
    Prepare,
    Report,
    ShiftCheckpoint,
)


def validate(config: Any) -> None:
    """Check one verb's config across fields; raises ValueError that names the key and the remedy."""
    if isinstance(config, Train):
        validate_recipe(config.recipe)
        validate_train(config)
    if isinstance(config, Prepare) and config.shard is not None:
        parse_shard(config.shard)
    if isinstance(config, ShiftCheckpoint):
        require(
            (config.threshold is None) != (config.budget is None),
            "give either threshold=T or budget=B, for one of them",
        )
        validate_shift(config, "")
    if isinstance(config, Measure | ShiftCheckpoint | Predict):
        require(config.context >= 2, f"context is {config.context}: a row needs at least 2 tokens")
        require(config.batch >= 1, f"batch is {config.batch}: give at least 1")
        validate_device(config.device)
    if isinstance(config, Measure):
        _validate_measure(config)
    if isinstance(config, Predict):
        _validate_predict(config)
    if isinstance(config, Generate):
        _validate_generate(config)
    if isinstance(config, Eval):
        require(len(config.tasks) > 0, "tasks is empty: name at least one, e.g. tasks=[piqa]")
        validate_tasks(config, "")
        require(config.threads is None or config.threads >= 1, f"threads is {config.threads}: give at least 1, or null")
        validate_device(config.device)
    if isinstance(config, Bench):
        _validate_bench(config)
    if isinstance(config, Plan):
        _validate_plan(config)
    if isinstance(config, Report):
        require(len(config.runs) > 0, "runs is empty: give runs=[RUN,...], the run_dir of one or more trainings")
        require(
            len(config.runs) == 1 or config.out is not None,
            f"out is missing: a report of {len(config.runs)} runs belongs to none of their folders, give out=DIR",
        )
    if isinstance(config, Export | ShiftCheckpoint):
        _validate_own_place(config)
    if isinstance(config, Export):
        _validate_export(config)


def parse_shard(shard: str) -> tuple[int, int]:
    """(i, n) of "i/n"; ValueError unless i is one of 1 to n."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
    require(
        found is not None and int(found[1]) <= int(found[2]),
        f"shard is {shard}: give I/N with I from 1 to N, e.g. shard=3/64",
    )
    assert found is not None
    return int(found[1]), int(found[2])


def _validate_plan(config: Plan) -> None:
    require(
        config.gpus is not None or config.check is not None,
        "gpus is missing: give gpus=N, the ranks over all nodes, or check=RUN, a finished run",
    )
    require(config.gpus is None or config.gpus >= 1, f"gpus is {config.gpus}: give at least 1")
    require(config.nodes >= 1, f"nodes is {config.nodes}: give at least 1")
    require(
        (config.gpus or config.nodes) % config.nodes == 0,
        f"gpus is {config.gpus}, which {config.nodes} nodes cannot share evenly: gpus counts those of all nodes",
    )
    sharing = config.sequence_parallel
    require(
        config.gpus is None or config.gpus % sharing == 0,
        f"sequence_parallel is {sharing}, which does not divide gpus={config.gpus}: change one of them",
    )
    own = ("peak_tflops", "memory_gb", "link_gb_s", "watts", "mfu")
    missing = [key for key in own if config.gpu is GpuKind.custom and getattr(config, key) is None]
    given = " ".join(f"{key}=VALUE" for key in missing)
    require(not missing or config.check is not None, f"gpu is custom, which says nothing of itself: give {given}")
    for key in (*own, "network_gb_s", "link_share", "tokens_per_second", "disk_gb_s", "save_share"):
        value = getattr(config, key)
        require(value is None or (isfinite(value) and value > 0), f"{key} is {value}: give a positive number")
    for key in ("mfu", "link_share", "save_share"):
        value = getattr(config, key)
        require(value is None or value <= 1, f"{key} is {value}: give a share, up to 1")
    require(0 <= config.margin < 1, f"margin is {config.margin}: give a share from 0 to below 1")
    require(isfinite(config.pue) and config.pue >= 1, f"pue is {config.pue}: give at least 1")
    price = config.price_per_gpu_hour
    require(price is None or (isfinite(price) and price >= 0), f"price_per_gpu_hour is {price}: give 0 or more")
    if config.start is not None:
        try:
            date.fromisoformat(config.start)
        except ValueError as error:
            raise ValueError(f"start is {config.start}: give a date as 2026-01-31") from error


def _validate_bench(config: Bench) -> None:
    for key, least in (("rounds", 1), ("warmup", 1), ("ranks", 1), ("layers", 0), ("tokens", 3)):
        value = getattr(config, key)
        require(value >= least, f"{key} is {value}: give at least {least}")
    require(config.zero.offload_path is None, "zero.offload=nvme is not what bench compares: set zero.offload=none")
    require(config.sequence_parallel == 1, "sequence_parallel is not what bench compares: set sequence_parallel=1")
    for rival in config.rivals:
        require(rival in ("silu", "control", "hooks"), f"rivals has {rival}: choose of silu, control, hooks")
    for sparsity in config.sparsities:
        require(0 <= sparsity < 1, f"sparsities has {sparsity}: give shares from 0 to below 1")
    for batch in config.batches:
        require(1 <= batch <= 8, f"batches has {batch}: sparse decoding takes 1 to 8 tokens")
    require(len(config.sparsities) * len(config.batches) > 0, "sparsities or batches is empty: give at least one")
    missing = [key for key, value in vars(config.model.shape).items() if value is None]
    require(
        config.what is Benchmark.decode or not missing,
        f"model.shape.{', '.join(missing)} is not known: choose a model with a shape, or give the sizes",
    )


def _validate_generate(config: Generate) -> None:
    require(config.prompt is None or bool(config.prompt.strip()), "prompt is empty: give text")
    require(config.max_new_tokens >= 1, f"max_new_tokens is {config.max_new_tokens}: give at least 1")
    temperature, top_p = config.temperature, config.top_p
    require(isfinite(temperature) and temperature >= 0, f"temperature is {temperature}: give a number, 0 or larger")
    require(0 < top_p <= 1, f"top_p is {top_p}: give a share above 0, up to 1")
    require(top_p == 1 or temperature > 0, f"top_p is {top_p}, but temperature 0 does not sample: give a temperature")
    require(config.threads is None or config.threads >= 1, f"threads is {config.threads}: give at least 1, or null")
    validate_device(config.device)


def _validate_measure(config: Measure) -> None:
    require((config.text is None) != (not config.texts), "give either text=PATH or texts={NAME: {path: PATH}, ...}")
    for key, default in (("held_out", None), ("rows", None), ("column", "text")):
        own = not config.texts or getattr(config, key) == default
        require(own, f"{key} belongs to text: give texts.NAME.{key} instead")
    shares = {"held_out": config.held_out} | {f"texts.{name}.held_out": t.held_out for name, t in config.texts.items()}
    for key, share in shares.items():
        require(share is None or 0 < share < 1, f"{key} is {share}: give a share between 0 and 1, or null")
    counts = {"rows": config.rows, "curve_rows": config.curve_rows}
    counts |= {f"texts.{name}.rows": t.rows for name, t in config.texts.items()}
    for key, rows in counts.items():
        require(rows is None or rows >= 1, f"{key} is {rows}: give at least 1, or null for all")
    require(not config.neurons or config.out is not None, "neurons=true writes a file: give out=DIR")
    percent = config.cett_percent
    require(percent is None or (isfinite(percent) and percent > 0), f"cett_percent is {percent}: give e.g. 1, or null")
    for percent in config.top_k:
        require(0 < percent <= 100, f"top_k has {percent}: give percents above 0 and up to 100")


def _validate_own_place(config: Export | ShiftCheckpoint) -> None:
    out, checkpoint = (Path(path).expanduser().resolve() for path in (config.out, config.checkpoint))
    require(
        checkpoint not in (out, out.parent if out.suffix == ".gguf" else out) or not checkpoint.exists(),
        f"out={config.out} is the checkpoint itself, which would be replaced: choose another folder",
    )


def _validate_export(config: Export) -> None:
    require(
        config.format != ExportFormat.llama_cpp,
        "format=llama_cpp: llama.cpp computes SiLU for this architecture, whatever the file says, and would print "
        "fluent nonsense; use format=powerinfer for PowerInfer, vllm for vLLM, or hf for transformers",
    )
    for form, keys in {
        ExportFormat.powerinfer: ("predictors", "quantization", "drop_threshold", "text"),
        ExportFormat.vllm: ("plug_in",),
    }.items():
        for key in keys:
            value = getattr(config, key)
            require(
                config.format is form or value == getattr(Export, key),
                f"{key} is {value}, which format={config.format} does not use: leave it out, or set format={form}",
            )
    if config.format is ExportFormat.powerinfer:
        require(config.predictors is not None, "predictors is missing: give predictors=DIR, made by prosparse predict")
        require(
            config.text is None or config.drop_threshold,
            "text is measured only with drop_threshold=true: leave it out, or set that",
        )
        require(
            config.text is not None or not config.drop_threshold,
            "text is missing: drop_threshold=true changes the model, and what that does is measured on text=",
        )


def _validate_predict(config: Predict) -> None:
    for name in ("held_out", "recall", "top"):
        share = getattr(config, name)
        require(share is None or 0 < share < 1, f"{name} is {share}: give a share between 0 and 1")
    for name in ("rows", "evaluate_rows", "rank", "epochs", "patience", "tokens"):
        number = getattr(config, name)
        require(number is None or number >= 1, f"{name} is {number}: give at least 1")
    require(isfinite(config.lr) and config.lr > 0, f"lr is {config.lr}: give a positive learning rate")
    require(isfinite(config.cutoff), f"cutoff is {config.cutoff}: give a finite number")
    require(config.threads is None or config.threads >= 1, f"threads is {config.threads}: give at least 1, or null")
