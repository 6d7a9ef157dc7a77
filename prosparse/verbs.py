"""What each verb of the command does with its checked config; cli.py composes that.

In: a config object. Out: the verb's result, a dict that JSON takes, also written to the folder that it works in.
Imports stand inside the functions: a verb loads what it needs, and a config error is told without torch.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prosparse.config import Auto, Dtype, ExportFormat, Source, Train
from prosparse.verb_checks import parse_shard
from prosparse.verb_configs import (
    Bench,
    Eval,
    Export,
    Generate,
    Measure,
    Opens,
    Plan,
    Predict,
    Prepare,
    Reads,
    Report,
    ShiftCheckpoint,
    Text,
)


def run_train(config: Train) -> dict:
    from prosparse.trainer import train

    return train(config)


def run_prepare(config: Prepare) -> dict:
    from prosparse import schedule
    from prosparse.models.load import load_config, load_tokenizer
    from prosparse.preparation import prepare_all, prepare_shard

    model = config.model
    opening: dict = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    own = config.data.tokenizer
    tokenizer = load_tokenizer(own) if own else load_tokenizer(model.source, **opening)
    vocabulary = load_config(model.source, **opening).get_text_config().vocab_size
    contexts = schedule.contexts(config.recipe)
    if config.shard is not None:
        done = prepare_shard(config.data, tokenizer, contexts, parse_shard(config.shard))
        left = (
            f"of all {done.segments} segments {done.missing} are missing" if done.missing else "all segments are there"
        )
        _say(f"shard {config.shard}: {done}; {left}: prosparse prepare without shard checks them and writes the tables")
        return {"shard": config.shard} | done.to_dict()
    prepared, done = prepare_all(config.data, tokenizer, contexts, vocabulary, verify=True)
    _say(f"prepared: all {done.segments} segments hold what their manifests say")
    return {
        str(context): {"digest": made.digest, "fingerprint": made.fingerprint, "sources": made.manifests}
        for context, made in prepared.items()
    } | {"preparation": done.to_dict()}


def run_plan(config: Plan) -> dict:
    from prosparse.plan_check import check
    from prosparse.planning import lines, picture, plan
    from prosparse.plotting import DOTS_PER_INCH

    out = _claim(config.out)
    result, told = check(config) if config.check is not None else ((found := plan(config)), lines(config, found))
    if out is not None and config.check is None:
        picture(config, result).savefig(out / "plan.png", dpi=DOTS_PER_INCH)
    if out is not None:
        _write_result(out, result)
    print("\n".join(told), file=sys.stderr)
    return result


def run_measure(config: Measure) -> dict:
    """What is done stands in out/result.json after each text; `complete` is false until all is."""
    from prosparse.activity import Activity, save_neurons
    from prosparse.ffn import activation_of, down_weights, find_ffns
    from prosparse.group import from_rank_zero, rank_and_world
    from prosparse.sparsity import cett_curve, measure, pooled, spread, top_k_curve

    out = _claim(config.out)
    model, tokenizer = _open(config, together=True)
    if config.neurons or (config.curves and config.cett_percent is not None):
        try:
            down_weights(model)
        except ValueError as error:
            raise ValueError(f"{error}: set neurons=false, and with curves=true cett_percent=null") from error
    alone = Text(config.text or "", config.held_out, config.column, config.config, config.split, config.rows)
    texts = config.texts or {"text" if config.text is None else Path(config.text).stem: alone}
    rows, chosen = {}, {}
    for name, text in texts.items():
        try:
            rows[name] = from_rank_zero(partial(_rows, config, model, tokenizer, text))
        except ValueError as error:
            raise ValueError(f"{f'texts.{name}: ' * bool(config.texts)}{error}") from error
        chosen[name] = spread(len(rows[name]), text.rows)
    activation, param = activation_of(model)
    asked = {key: getattr(config, key) for key in ("checkpoint", "text", "held_out", "context", "batch")}
    rank, ranks = rank_and_world()
    result: dict = {"complete": False, **asked, "bos": str(_bos(config, model, tokenizer)), "ranks": ranks}
    result |= {**_conditions(config, model), "activation": {"name": activation, "param": param}}
    result |= {"texts": {}, "cett": None, "top_k": None}
    measured, activities = [], {}

    def keep() -> None:
        if out is not None and rank == 0:
            _write_result(out, result)

    for name, text in texts.items():
        activities[name] = Activity(len(find_ffns(model)))
        how: dict = {"batch": config.batch, "indices": chosen[name], "activity": activities[name]}
        measured.append(measure(model, rows[name], **how, progress=_bar(name)))
        seen = {"text": text.path, "held_out": text.held_out, "rows": len(chosen[name])}
        seen |= measured[-1].to_dict() | activities[name].to_dict()
        result["texts"][name] = seen
        whole = sum(list(activities.values())[1:], start=next(iter(activities.values())))
        result |= pooled(measured).to_dict() | whole.to_dict()
        found = f"perplexity {seen['perplexity']:.3f}  sparsity {seen['sparsity']:.2%}"
        _say(f"{name:<12} {found}  on {seen['tokens']:,} tokens")
        keep()
    if config.curves:
        name = next(iter(texts))
        few = [chosen[name][i] for i in spread(len(chosen[name]), config.curve_rows)]
        curve = top_k_curve(model, rows[name], config.top_k, batch=config.batch, indices=few, progress=_bar("top-k"))
        result["top_k"] = [point | {"text": name} for point in curve]
        if config.cett_percent is not None:
            how = {"batch": config.batch, "indices": few, "progress": _bar("CETT")}
            result["cett"] = {"text": name} | cett_curve(model, rows[name], config.cett_percent, **how)
    if out is not None and config.neurons and rank == 0:
        result["neurons"] = save_neurons(activities, out)
    result["complete"] = True
    keep()
    return result


def run_predict(config: Predict) -> dict:
    from prosparse.predictor import predict
    from prosparse.preparation import text_splits

    model, tokenizer = _open(config)
    how: dict = {key: getattr(config, key) for key in ("cache", "held_out")}
    how["bos"] = _bos(config, model, tokenizer)
    rows: Any = text_splits(_source(config), tokenizer, config.context, **how)
    asked = {key: getattr(config, key) for key in ("checkpoint", "text", "held_out", "context", "top")}
    result = predict(model, rows[0], rows[1], config) | asked | _conditions(config, model)
    _write_result(Path(config.out).expanduser(), result)
    return result


def run_shift(config: ShiftCheckpoint) -> dict:
    from prosparse.allocation import fold
    from prosparse.card import checkpoint_card
    from prosparse.data import batch
    from prosparse.exporters.hf import export_hf_model, put_card
    from prosparse.ffn import activation_of, substitute
    from prosparse.sparsity import measure, spread
    from prosparse.threshold import shift

    model, tokenizer = _open(config)
    substitute(model, *activation_of(model))
    rows = _rows(config, model, tokenizer)
    chosen = [rows[i] for i in spread(len(rows), config.calibration_rows)]
    report = lambda point: print(point, file=sys.stderr)  # noqa: E731
    shifted = shift(model, chosen, config, batch=config.batch, report=report, progress=_bar("calibration"))
    said: dict = {}
    if shifted.thresholds is not None:  # folded from the most exact weights that the checkpoint has
        model, tokenizer = _open(config, Dtype.fp32)
        ids = batch(chosen, [0]).input_ids
        said["folded"] = fold(model, shifted.thresholds, token_ids=ids, dtype=_dtype(config.dtype)).to_dict()
    figure = {"model": "this model", "tokens": shifted.tokens, **_conditions(config, model)}
    figure["text"] = f"{config.text} ({len(chosen)} calibration rows)"
    card = partial(checkpoint_card, config.checkpoint)
    export_hf_model(model, tokenizer, config.out, _dtype(config.dtype), card=card([]))
    seen: Any = next(point for point in shifted.sweep if point.threshold == shifted.threshold)
    if shifted.thresholds is not None:
        model, _ = _open(replace(config, checkpoint=config.out, trust_remote_code=False))
        seen = measure(model, chosen, batch=config.batch, progress=_bar("as folded"))
        said["folded"] |= {"sparsity": seen.sparsity, "perplexity": seen.perplexity}
        print(f"as folded: sparsity {seen.sparsity:.1%}  perplexity {seen.perplexity:.3f}", file=sys.stderr)
    figure |= {"sparsity": seen.sparsity, "perplexity": seen.perplexity}
    result = put_card(config.out, card([figure]))
    result |= {"shift": shifted.to_dict() | said | {"text": config.text, **_conditions(config, model)}}
    _write_result(Path(config.out).expanduser(), result)  # over the export's own, which it contains
    return result


def run_export(config: Export) -> dict:
    from prosparse.card import checkpoint_card
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
    card = checkpoint_card(config.checkpoint)
    result = exporters[config.format](model, tokenizer, config.out, _dtype(config.dtype), card=card)
    if "serve" in result:
        print(result["serve"], file=sys.stderr)
    return result


def _export_powerinfer(config: Export, model: Any, tokenizer: Any) -> dict:
    from prosparse.card import checkpoint_card
    from prosparse.exporters.powerinfer import export_powerinfer
    from prosparse.sparsity import spread

    assert config.predictors is not None
    rows = None if config.text is None else _rows(config, model, tokenizer)
    chosen = None if rows is None else [rows[i] for i in spread(len(rows), config.rows)]
    how: dict = {
        "quantization": config.quantization,
        "drop_threshold": config.drop_threshold,
        "rows": chosen,
        "text": config.text,
        "card": checkpoint_card(config.checkpoint),
    }
    return export_powerinfer(model, tokenizer, config.predictors, config.out, **how, batch=config.batch)


def run_generate(config: Generate) -> dict:
    import torch

    from prosparse.generation import converse

    if config.prompt is None and not sys.stdin.isatty():
        raise ValueError("prompt is missing, and stdin is no terminal to type one at: give prompt=TEXT")
    out = _claim(config.out)
    model, tokenizer = _open(config)
    decoding = None
    if config.sparse_decoding is Auto.auto:
        try:
            decoding = str(model.enable_sparse_decoding())
        except ValueError as error:
            _say(f"every neuron is computed: {error}")
    torch.manual_seed(config.seed)
    turns = converse(config, model, tokenizer)
    asked: dict = {"sparse_decoding": decoding}
    asked |= {key: getattr(config, key) for key in ("checkpoint", "system", "chat", "temperature", "top_p", "seed")}
    result = ({"turns": turns} if config.prompt is None else turns[0]) | asked | _conditions(config, model)
    if out is not None:
        _write_result(out, result)
    return result


def run_eval(config: Eval) -> dict:
    """Each finished task stands in out/result.json at once; `complete` is false until all do."""
    from prosparse import evaluation
    from prosparse.group import rank_and_world

    out = _claim(config.out)
    model, tokenizer = _open(config, together=True)
    bos = evaluation.starts_with_bos(model.config, tokenizer, config.bos, config.checkpoint)
    asked = ("checkpoint", "limit", "shots", "batch", "context", "task_path")
    result: dict[str, Any] = {"tasks": {}, "suites": {}, "complete": False, "remaining": [], "error": None}
    result |= {key: getattr(config, key) for key in asked}
    result |= {"chat": str(config.chat), "bos": bos, **_conditions(config, model), "notes": evaluation.notes(config)}

    def keep(error: BaseException | None = None) -> None:
        if error is not None:
            result["error"] = f"{type(error).__name__}: {error}"
        result["suites"] = evaluation.averages(config, result["tasks"])
        result["remaining"] = [name for name in evaluation.jobs_of(config) if name not in result["tasks"]]
        result["complete"] = not result["remaining"]
        if out is not None and rank_and_world()[0] == 0:
            _write_result(out, result)

    def tell(name: str, told: dict) -> None:
        result["tasks"][name] = told
        keep()
        _say(evaluation.line(name, told))

    try:
        evaluation.evaluate(model, tokenizer, config, bos=bos, tell=tell)
    except BaseException as error:
        if result["tasks"]:  # else an earlier result stays
            keep(error)
        raise
    keep()
    for suite, said in result["suites"].items():
        _say(f"{suite}: {said['average']}")
    return result


def run_report(config: Report) -> dict:
    from prosparse.records import read_results, read_runs
    from prosparse.reporting import plain, tables, write

    records = read_runs(config.runs)
    measured, evaluated = read_results(config.measures, records)
    out = _claim(config.out) if config.out is not None else records[0].folder / "report"
    assert out is not None
    result = write(records, out, measured, evaluated)
    for record in records:
        if record.status == "not finished":
            print(f"{record.name}: not finished, step {record.report['steps']} so far", file=sys.stderr)
    print(f"\n{plain(tables(records, result)[0])}\n\nreport: {out / 'index.html'}", file=sys.stderr)
    if result["problems"]:
        raise OSError(f"the report in {out} is incomplete and says so: {'; '.join(result['problems'])}")
    return result


def run_bench(config: Bench) -> dict:
    import torch

    from prosparse.benchmarking import bench, lines

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _claim(config.out)
    result = bench(config, _bar(f"bench {config.what}"))
    print("\n".join([*lines(result), f"\nresult: {config.out}/result.json"]), file=sys.stderr)
    return result


RUN: dict[str, Callable[[Any], dict]] = {
    "train": run_train,
    "prepare": run_prepare,
    "plan": run_plan,
    "measure": run_measure,
    "predict": run_predict,
    "shift": run_shift,
    "export": run_export,
    "generate": run_generate,
    "eval": run_eval,
    "report": run_report,
    "bench": run_bench,
}


def _open(config: Opens, dtype: Dtype | None = None, together: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of config.checkpoint, on this rank's device; `together`: the verb shares work among ranks."""
    import torch

    from prosparse.group import keep_freed_memory
    from prosparse.models.load import load_model, load_tokenizer

    device: Any
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        from prosparse.group import start_group

        if not together:
            raise ValueError("only train, measure and eval share their work among ranks: start this without a launcher")
        *_, device = start_group(config.device, config.threads, seed=0)
    else:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    trust: dict = {"trust_remote_code": config.trust_remote_code}
    where: dict = {"dtype": _dtype(dtype or config.dtype), "device": device}
    model = load_model(config.checkpoint, **where, trust_pickle=config.trust_pickle, **trust)
    if str(device) == "cpu":
        keep_freed_memory()
    return model, load_tokenizer(config.checkpoint, **trust)


def _bos(config: Reads, model: Any, tokenizer: Any) -> Auto:
    """auto where documents begin with BOS: as the model was trained, unless config.bos is none."""
    from prosparse.evaluation import starts_with_bos

    return Auto.auto if starts_with_bos(model.config, tokenizer, config.bos, config.checkpoint) else Auto.none


def _source(text: Reads | Text) -> Source:
    path = text.path if isinstance(text, Text) else text.text
    return Source(path=path, column=text.column, config=text.config, split=text.split)


def _rows(config: Reads, model: Any, tokenizer: Any, text: Text | None = None) -> Any:
    """All rows of config.text, or those of a text of several."""
    from prosparse.preparation import text_rows

    how: dict = {"cache": config.cache, "held_out": text.held_out if text else None}
    return text_rows(_source(text or config), tokenizer, config.context, bos=_bos(config, model, tokenizer), **how)


def _say(line: str) -> None:
    """One line for people, of one rank."""
    from prosparse.group import rank_and_world

    if rank_and_world()[0] == 0:
        print(line, file=sys.stderr, flush=True)


def _bar(name: str) -> Callable[[int, int], None]:
    """Shows on a terminal how far a loop has come and how long it still takes; called with (done, of)."""
    from tqdm import tqdm

    from prosparse.group import rank_and_world

    bar = tqdm(desc=name, disable=None if rank_and_world()[0] == 0 else True, leave=False)

    def show(done: int, of: int) -> None:
        if done == 1:
            bar.reset(of)
        bar.update()
        if done == of:
            bar.clear()

    return show


def _dtype(dtype: Dtype) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def _conditions(config: Opens, model: Any) -> dict:
    from prosparse.models.load import locate
    from prosparse.telemetry import command

    opened = str(locate(config.checkpoint))  # a run folder stands for its model or its newest checkpoint
    return {"opened": opened, "dtype": str(config.dtype), "device": str(model.device), "command": command()}


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
