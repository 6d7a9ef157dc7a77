"""What a run does with its model between steps and after them: evaluate, shift, export, report.

In: a `Run` whose steps up to here are done, on every rank. Out: rows of metrics.jsonl, RUN/model, RUN/report.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prosparse import checkpoint, controller, schedule, shards
from prosparse.allocation import fold
from prosparse.card import run_card
from prosparse.data import batch
from prosparse.evaluation import notes as task_notes
from prosparse.exporters.hf import Card, export_hf, put_card
from prosparse.ffn import activation_of, set_penalty, substitute
from prosparse.group import from_rank_zero, patience
from prosparse.models.formats import stock_config
from prosparse.models.load import build_model, load_model
from prosparse.records import read_run
from prosparse.reporting import fairness, table, write_report
from prosparse.run import DTYPES, Run, free_engine, hold
from prosparse.signals import interruptible
from prosparse.sparsity import measure, spread
from prosparse.tasks import evaluate_tasks, task_results
from prosparse.telemetry import command, device_name, read_metrics, versions
from prosparse.threshold import shift


def evaluate(run: Run, name: str, model: PreTrainedModel | None = None) -> dict:
    """Measure the run's model, or `model`, on its held-out rows (all ranks call it); log the row and return it."""
    began, config, model = time.time(), run.config, model or run.engine.module
    set_penalty(model, None)
    indices = spread(len(run.held_out), config.evaluate.rows)
    result = measure(model, run.held_out, batch=config.micro_batch, indices=indices, progress=run.poll, group=run.group)
    row = {"kind": "evaluation", "model": name, "step": run.state.step, "split": "held_out", **result.to_dict()}
    if run.thresholds is None or name == "exported":  # else it has many thresholds
        row["activation"] = dict(zip(("name", "param"), activation_of(model), strict=True))
    row["seconds"] = time.time() - began
    run.log(row)
    run.say(
        f"held out  {name:<12} perplexity {result.perplexity:10.2f}  sparsity {result.sparsity:6.1%}  "
        f"({result.tokens:,} tokens, {row['seconds']:.0f} s)"
    )
    return row


def end_training(run: Run) -> None:
    """After the last stage, before `recover`: evaluate and, if the recipe does, shift (all ranks call it)."""
    config, recipe, state, model = run.config, run.config.recipe, run.state, run.engine.module
    patience(config.timeouts.start_seconds)
    evaluate(run, "trained")
    if not schedule.shifts(recipe):
        hold(run, {}, None)
        return
    unread = sum(schedule.window_rows(recipe, state.step, state.window - 1))
    rows = [run.rows(state.step)[unread + i] for i in range(recipe.shift.calibration_rows)]
    run.say(f"shifting the threshold on the {len(rows)} training rows after those that were read")
    say = lambda point: run.say(str(point))  # noqa: E731
    set_penalty(model, None)
    shifted = shift(model, rows, recipe.shift, batch=config.micro_batch, report=say, progress=run.poll, group=run.group)
    hold(run, shifted.to_dict(), shifted.thresholds)
    if run.metrics is not None:
        run.metrics.append({"kind": "shift", "step": state.step, **shifted.to_dict()})
    evaluate(run, "shifted")
    evaluate_tasks(run, "shifted")


def finish(run: Run) -> dict:
    """After the last step: shift, export, report (all ranks call it)."""
    config, recipe, state, model = run.config, run.config.recipe, run.state, run.engine.module
    patience(config.timeouts.start_seconds)
    if run.shifted is None:
        end_training(run)
    else:
        evaluate(run, "recovered")
    logged = from_rank_zero(lambda: read_metrics(run.folder))
    models = {row["model"]: row for row in logged if row["kind"] == "evaluation" and row["model"] != "training"}
    report: dict[str, Any] = {
        "models": models,
        "tokens_trained": state.tokens,
        "steps": state.step,
        "text": "held-out documents of " + ", ".join(f"{n} ({s.path})" for n, s in config.data.sources.items()),
        "dtype": str(config.dtype),
        "device": device_name(run.device, run.world),
        "command": command(),
        "control": str(recipe.control),
        "seed": config.seed,
        "until": config.until,
        "rows_digest": run.identity["digest of the rows"],
        "versions": versions(),
        "notes": [fairness(recipe.control)],
    }
    if "base" not in models:
        report["notes"].append("base and substituted stand in the report of the run that this one went on from")
    if schedule.steered(recipe, state.step):
        report["notes"].append(controller.told(state.controller))
    if run.shifted:
        report["shift"] = run.shifted
    if config.until != "shift":
        activation, generation, target = activation_of(model), model.generation_config, run.folder / "model"
        weights = checkpoint.gather(run.engine) if run.thresholds is None else {}
        del model
        free_engine(run)
        unmeasured = lambda export: run_card(read_run(run.folder, report=report | {"export": export}))  # noqa: E731
        job = lambda: export_run(run, weights, activation, generation, unmeasured)  # noqa: E731
        report["export"] = from_rank_zero(interruptible(job))
        if run.thresholds is not None:
            report["shift"] |= {"folded": report["export"]["folded"]}
        del weights
        exported = load_model(target, dtype=DTYPES[config.dtype], device=run.device, attention=config.attention)
        models["exported"] = evaluate(run, "exported", exported)
    if config.evaluate.tasks:
        report["tasks"] = from_rank_zero(lambda: task_results(run.folder))
        report["notes"] += task_notes(config.evaluate)
    rows = from_rank_zero(lambda: read_metrics(run.folder))
    spent = ("step_seconds", "seconds", "blocked_seconds")
    report["seconds"] = sum(row.get(key, 0.0) for row in rows for key in spent)

    def publish() -> Path:
        if "export" in report:  # whose card was written before the model was measured
            card = lambda said: run_card(read_run(run.folder, report=report | {"export": said}))  # noqa: E731
            report["export"] = put_card(run.folder / "model", card)
        return write_report(run.folder, report)

    folder = from_rank_zero(publish)
    run.say(f"\n{table(report)}\n\nreport: {folder}")
    if "export" in report:
        run.say(f"model: {run.folder / 'model'}")
    if run.tracker is not None:
        run.tracker.finish(sorted(folder.iterdir()))
    return report


def export_run(
    run: Run, weights: dict[str, torch.Tensor], activation: tuple[str, float], generation: Any, card: Card
) -> dict:
    """Write RUN/model (rank 0) from `weights`; where thresholds are to be folded, from the last fp32 weights."""
    dtype, said = DTYPES[run.config.dtype], {}
    if run.thresholds is not None:
        own = run.folder / "checkpoints" / f"step-{run.state.step:08d}"
        found = own if own.exists() or run.began_from is None else run.began_from
        manifest = checkpoint.verify(found)
        masters = shards.read_weights(checkpoint.rank_files(found, manifest), manifest["shapes"])
        model = build_model(stock_config(run.base_config), masters, torch.float32)
        substitute(model, *activation)
        ids = batch(run.rows(run.state.step), [0]).input_ids
        said = {"folded": fold(model, run.thresholds, token_ids=ids, dtype=dtype).to_dict()}
        weights, activation = model.state_dict(), activation_of(model)
    how: dict = {"said": said, "card": card}
    return export_hf(
        weights, run.base_config, *activation, run.tokenizer, generation, run.folder / "model", dtype, **how
    )
