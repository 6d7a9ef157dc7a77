"""What each verb of the command does with its checked config; cli.py composes that.

In: a config object. Out: the verb's result, a dict that JSON takes, also written to the folder that it works in.
Imports stand inside the functions: a verb loads what it needs, and a config error is told without torch.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from prosparse.config import (
    Dtype,
    Export,
    ExportFormat,
    Generate,
    Measure,
    Opens,
    Predict,
    Prepare,
    Reads,
    Shift,
    ShiftCheckpoint,
    Train,
)


def run_train(config: Train) -> dict:
    from prosparse.trainer import train

    return train(config)


def run_prepare(config: Prepare) -> dict:
    from prosparse import schedule
    from prosparse.data import prepare
    from prosparse.models.load import load_config, load_tokenizer

    model = config.model
    opening: dict = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    own = config.data.tokenizer
    tokenizer = load_tokenizer(own) if own else load_tokenizer(model.source, **opening)
    vocabulary = load_config(model.source, **opening).get_text_config().vocab_size
    prepared = prepare(config.data, tokenizer, schedule.contexts(config.recipe), vocabulary)
    return {
        str(context): {"digest": made.digest, "fingerprint": made.fingerprint, "sources": made.manifests}
        for context, made in prepared.items()
    }


def run_measure(config: Measure) -> dict:
    from prosparse.sparsity import measure, save_neurons, spread

    out = _claim(config.out)
    model, tokenizer = _open(config)
    rows = _rows(config, tokenizer, config.held_out)
    fired: list | None = [] if config.neurons else None
    result = asdict(measure(model, rows, batch=config.batch, indices=spread(len(rows), config.rows), fired=fired))
    if out is not None and fired is not None:
        result["neurons"] = save_neurons(fired, config.text, out)
    result |= {
        "checkpoint": config.checkpoint,
        "text": config.text,
        "held_out": config.held_out,
        "context": config.context,
        **_conditions(config, model),
    }
    if out is not None:
        _write_result(out, result)
    print(
        f"perplexity {result['perplexity']:.3f}  sparsity {result['sparsity']:.2%}  on {result['tokens']:,} tokens",
        file=sys.stderr,
    )
    return result


def run_predict(config: Predict) -> dict:
    from prosparse.data import text_splits
    from prosparse.predictor import predict

    model, tokenizer = _open(config)
    how: dict = {key: getattr(config, key) for key in ("bos", "column", "cache", "held_out")}
    rows: Any = text_splits(config.text, tokenizer, config.context, **how)
    asked = {key: getattr(config, key) for key in ("checkpoint", "text", "held_out", "context", "top")}
    result = predict(model, rows[0], rows[1], config) | asked | _conditions(config, model)
    _write_result(Path(config.out).expanduser(), result)
    return result


def run_shift(config: ShiftCheckpoint) -> dict:
    from prosparse.exporters.hf import export_hf_model
    from prosparse.ffn import activation_of, substitute
    from prosparse.sparsity import spread
    from prosparse.threshold import shift

    model, tokenizer = _open(config)
    substitute(model, *activation_of(model))
    rows = _rows(config, tokenizer, None)
    chosen = [rows[i] for i in spread(len(rows), config.calibration_rows)]
    how = Shift(config.threshold, config.budget, config.calibration_rows, config.start, config.refinements)
    shifted = shift(model, chosen, how, batch=config.batch, report=lambda point: print(point, file=sys.stderr))
    conditions = {"text": config.text, **_conditions(config, model)}
    result = export_hf_model(model, tokenizer, config.out, _dtype(config.dtype))
    result |= {"shift": shifted.to_dict() | conditions}
    _write_result(Path(config.out).expanduser(), result)  # over the export's own, which it contains
    return result


def run_export(config: Export) -> dict:
    from prosparse.exporters.hf import export_hf_model
    from prosparse.exporters.vllm import export_vllm

    quantized = config.format is ExportFormat.powerinfer  # what is quantized is read in fp32
    model, tokenizer = _open(config, Dtype.fp32 if quantized else None)
    if quantized:
        return _export_powerinfer(config, model, tokenizer)
    exporters: dict[ExportFormat, Callable[..., dict]] = {
        ExportFormat.hf: export_hf_model,
        ExportFormat.vllm: partial(export_vllm, plug_in=config.plug_in),
    }
    result = exporters[config.format](model, tokenizer, config.out, _dtype(config.dtype))
    if "serve" in result:
        print(result["serve"], file=sys.stderr)
    return result


def _export_powerinfer(config: Export, model: Any, tokenizer: Any) -> dict:
    from prosparse.exporters.powerinfer import export_powerinfer
    from prosparse.sparsity import spread

    assert config.predictors is not None
    rows = None if config.text is None else _rows(config, tokenizer, None)
    chosen = None if rows is None else [rows[i] for i in spread(len(rows), config.rows)]
    how: dict = {
        "quantization": config.quantization,
        "drop_threshold": config.drop_threshold,
        "rows": chosen,
        "text": config.text,
    }
    return export_powerinfer(model, tokenizer, config.predictors, config.out, **how, batch=config.batch)


def run_generate(config: Generate) -> dict:
    import torch

    from prosparse.generation import converse

    if config.prompt is None and not sys.stdin.isatty():
        raise ValueError("prompt is missing, and stdin is no terminal to type one at: give prompt=TEXT")
    out = _claim(config.out)
    model, tokenizer = _open(config)
    torch.manual_seed(config.seed)
    turns = converse(config, model, tokenizer)
    asked = {key: getattr(config, key) for key in ("checkpoint", "system", "chat", "temperature", "top_p", "seed")}
    result = ({"turns": turns} if config.prompt is None else turns[0]) | asked | _conditions(config, model)
    if out is not None:
        _write_result(out, result)
    return result


RUN: dict[str, Callable[[Any], dict]] = {
    "train": run_train,
    "prepare": run_prepare,
    "measure": run_measure,
    "predict": run_predict,
    "shift": run_shift,
    "export": run_export,
    "generate": run_generate,
}


def _open(config: Opens, dtype: Dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of config.checkpoint, on this rank's device."""
    import torch

    from prosparse.models.load import load_model, load_tokenizer

    device: Any
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        from prosparse.group import start_group

        *_, device = start_group(config.device, config.threads, seed=0)
    else:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    trust: dict = {"trust_remote_code": config.trust_remote_code}
    where: dict = {"dtype": _dtype(dtype or config.dtype), "device": device}
    model = load_model(config.checkpoint, **where, trust_pickle=config.trust_pickle, **trust)
    return model, load_tokenizer(config.checkpoint, **trust)


def _rows(config: Reads, tokenizer: Any, held_out: float | None) -> Any:
    from prosparse.data import text_rows

    assert config.text is not None
    return text_rows(
        config.text,
        tokenizer,
        config.context,
        bos=config.bos,
        column=config.column,
        cache=config.cache,
        held_out=held_out,
    )


def _dtype(dtype: Dtype) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def _conditions(config: Opens, model: Any) -> dict:
    from prosparse.telemetry import command

    return {"dtype": str(config.dtype), "device": str(model.device), "command": command()}


def _claim(out: str | None) -> Path | None:
    if out is None:
        return None
    try:
        (folder := Path(out).expanduser()).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error.strerror}): choose a folder that can") from error
    return folder


def _write_result(folder: Path, result: dict) -> None:
    from prosparse.telemetry import strict_json, write_atomically

    write_atomically(folder / "result.json", strict_json(result, indent=1) + "\n")
