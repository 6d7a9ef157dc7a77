"""A training run's model on tasks: before the first step, at the end of each stage, after the shift.

In: a `Run` between two steps. Out: a row of metrics.jsonl a task, and whether evaluate.stop ends the run.
"""

import json
from hashlib import sha256
from pathlib import Path

from prosparse import evaluation, schedule
from prosparse.config import Auto
from prosparse.ffn import activation_of, set_penalty
from prosparse.group import from_rank_zero, waiting
from prosparse.run import Run
from prosparse.telemetry import read_metrics


def evaluate_tasks(run: Run, name: str) -> dict[str, dict]:
    """What the run's model scores on evaluate.tasks (all ranks call it), by task; log a row each, once.

    A row that the metrics have already, of this step, model and settings, is not made again.
    """
    config, how, model = run.config, run.config.evaluate, run.engine.module
    if not how.tasks:
        return {}
    set_penalty(model, None)
    settings = _asked(run) | {"activation": list(activation_of(model)), "shift": _digest(run.shifted)}
    mark = {"kind": "task", "evaluated": name, "step": run.state.step, "settings": settings}
    rows = from_rank_zero(lambda: read_metrics(run.folder))
    done = {row["task"]: row["result"] for row in rows if all(row.get(key) == value for key, value in mark.items())}

    def tell(task: str, result: dict) -> None:
        run.log(mark | {"task": task, "result": result, "seconds": result["seconds"]})
        run.say(f"{name:<12} {evaluation.line(task, result)}")

    bos = evaluation.starts_with_bos(run.base_config, run.tokenizer, Auto.auto, run.folder)
    together = config.zero.stage == 3 and run.world > 1
    with waiting(config.timeouts.start_seconds):
        return evaluation.evaluate(
            model, run.tokenizer, how, bos=bos, done=done, tell=tell, poll=run.poll, together=together
        )


def judge(run: Run) -> bool:
    """At the end of a stage, evaluate its model on the tasks; whether evaluate.stop ends the run here (all ranks)."""
    step, how = run.state.step, run.config.evaluate
    if not how.tasks or step == 0 or step != (span := schedule.stage_at(run.config.recipe, step)).last:
        return False
    now = evaluate_tasks(run, span.name)
    if how.stop.metric is not None:
        base = from_rank_zero(lambda: task_results(run.folder, _asked(run)))["base"]
        run.stopped_by = evaluation.stopped_by(how, base, now)
    return run.stopped_by is not None


def _digest(shifted: dict | None) -> str | None:
    return sha256(json.dumps(shifted).encode()).hexdigest()[:16] if shifted else None


def check_stop_rule(run: Run) -> None:
    """ValueError unless the base model has the metric of evaluate.stop: before training, not after a stage."""
    wanted = run.config.evaluate.stop.metric
    if wanted is None:
        return
    base = from_rank_zero(lambda: task_results(run.folder, _asked(run))).get("base")
    if base is None:
        raise ValueError(
            f"evaluate.stop.metric is {wanted}, but the base model was not asked with the same evaluate.limit, "
            "shots, context, chat and task_path: set it to null, or start in another run_dir"
        )
    evaluation.metric(base, wanted)


def _asked(run: Run) -> dict:
    """What of the config makes the scores of two models comparable."""
    how = run.config.evaluate
    return {key: getattr(how, key) for key in ("task_path", "limit", "shots", "context")} | {"chat": str(how.chat)}


def task_results(run_dir: Path, asked: dict | None = None) -> dict[str, dict[str, dict]]:
    """By model (base, a stage's name, shifted) and task what the rows of kind `task` say; the newest counts.

    `asked`: only rows with these settings.
    """
    found: dict[str, dict[str, dict]] = {}
    for row in read_metrics(run_dir):
        if row["kind"] == "task" and (asked or {}).items() <= row["settings"].items():
            found.setdefault(row["evaluated"], {})[row["task"]] = row["result"]
    return found
