"""Accuracy on tasks, by lm-evaluation-harness as a library, with the sparsity of what was computed for each task.

In: a model, its tokenizer, a `Tasks` config. Out: by task its metrics, shots, samples and sparsity; means of suites.
Scores are lm-eval's; what is added is BOS before every text of a model trained with it, and the counting.
"""

import difflib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from prosparse.config import Auto, Evaluate, Tasks
from prosparse.group import from_rank_zero, rank_and_world
from prosparse.models.formats import TRAINED_WITH_BOS

NOTE = (
    "scores of lm-evaluation-harness {version}: UltraEval, with which ProSparse and MiniCPM-S were published, asks and "
    "scores otherwise; compare only with models that this command has evaluated"
)


@dataclass(frozen=True)
class Job:
    """One task of a suite: its name in lm-eval, the examples before each question, the metric that the suite counts."""

    task: str
    shots: int | None
    metric: str | None = None


# A suite is the mean of its groups, a group the mean of its tasks. ProSparse: arXiv 2402.13516, section 4.1 and its
# table of seven groups. Bamboo: the tasks of the Open LLM Leaderboard with its shots, BBH and HumanEval, as its README
# says; there every task is a group.
SUITES: dict[str, dict[str, tuple[Job, ...]]] = {
    "prosparse": {
        "code generation": (Job("humaneval", 0, "pass@1"), Job("mbpp", 3, "pass_at_1")),
        "commonsense reasoning": (
            Job("piqa", 0, "acc"),
            Job("social_iqa", 0, "acc"),
            Job("hellaswag", 0, "acc_norm"),
            Job("winogrande", 0, "acc"),
            Job("copa", 0, "acc"),
        ),
        "reading comprehension": (
            Job("boolq", 0, "acc"),
            Job("lambada_openai", 0, "acc"),
            Job("tydiqa_goldp", 0, "f1"),
        ),
        "gsm8k": (Job("gsm8k", 8, "exact_match,strict-match"),),
        "mmlu": (Job("mmlu", 5, "acc"),),
        "bbh": (Job("bbh", 3, "exact_match"),),
        "agieval": (Job("agieval", 0, "acc"),),
    },
    "bamboo": {
        "mmlu": (Job("mmlu", 5, "acc"),),
        "winogrande": (Job("winogrande", 5, "acc"),),
        "truthfulqa": (Job("truthfulqa_mc2", 0, "acc"),),
        "hellaswag": (Job("hellaswag", 10, "acc_norm"),),
        "gsm8k": (Job("gsm8k", 5, "exact_match,strict-match"),),
        "arc_challenge": (Job("arc_challenge", 25, "acc_norm"),),
        "humaneval": (Job("humaneval", 0, "pass@1"),),
        "bbh": (Job("bbh", 3, "exact_match"),),
    },
}


def starts_with_bos(config: PreTrainedConfig, tokenizer: Any, bos: Auto, source: object) -> bool:
    """Whether texts for the model in `source` begin with BOS.

    Auto.auto: as the model was trained, which its config says if a run of prosparse made it; else if the tokenizer has
    one. Raises ValueError if the model was trained with BOS and the tokenizer has none.
    """
    if bos is Auto.none:
        return False
    trained = getattr(config, TRAINED_WITH_BOS, None)
    if trained and tokenizer.bos_token_id is None:
        raise ValueError(
            f"{source} was trained with BOS before every text ({TRAINED_WITH_BOS} in its config.json), but its "
            "tokenizer has no BOS token: put back the tokenizer that it was trained with; bos=none goes without"
        )
    return tokenizer.bos_token_id is not None if trained is None else trained


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Tasks,
    *,
    bos: bool,
    done: Mapping[str, dict] | None = None,
    tell: Callable[[str, dict], None] = lambda name, result: None,
    poll: Callable[..., None] = lambda: None,
    together: bool = False,
) -> dict[str, dict]:
    """By task, in the order asked for: metrics, shots, samples, subtasks, sparsity, tokens computed, seconds.

    A task of a suite is called SUITE/TASK. Tasks in `done` are not run again; `tell(name, result)` follows each that
    is. bos: see `starts_with_bos`. poll, together: see `Harness`. In a process group every rank has to call it; all
    return the same, whatever their number.
    Raises ValueError for a task that does not exist, runs code that the model writes without tasks.unsafe_code, or asks
    for more than the model's positions, and if lm-eval is not installed.
    """
    jobs = jobs_of(tasks)
    names, results = [job.task for job in jobs.values()], dict(done or {})
    lm_eval = _import()
    if tasks.chat is Auto.auto and tokenizer.chat_template is None:
        raise ValueError(
            "chat=auto: the tokenizer has no chat template; leave chat out, and tasks are asked as they are"
        )
    manager = _manager(tasks.task_path, names)
    unsafe = sorted({name for name in names if _is_unsafe(manager.task_index, name)})
    if unsafe and not tasks.unsafe_code:
        raise ValueError(
            f"{', '.join(unsafe)}: runs code that the model writes, on this machine and without a sandbox; set "
            "unsafe_code=true where that is no harm, or leave it out"
        )
    if unsafe:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    from prosparse.harness import Harness

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = tasks.context or positions
    if context is None or (positions is not None and context > positions):
        raise ValueError(f"context is {context} and the model has {positions} positions: set context to at most that")
    how: dict = {"bos": bos, "batch": tasks.batch, "context": context, "poll": poll, "together": together}
    harness = Harness(model, tokenizer, **how)
    for name, job in jobs.items():
        if name in results:
            continue
        began = time.perf_counter()
        harness.forget()
        if rank_and_world()[1] > 1:  # one rank downloads what the others then find
            from_rank_zero(partial(_load, manager, job.task))
        with harness.watching():
            raw = lm_eval.simple_evaluate(
                harness,
                tasks=[job.task],
                num_fewshot=job.shots,
                limit=tasks.limit,
                bootstrap_iters=100,  # of metrics that are no mean; those have a closed form
                log_samples=False,
                apply_chat_template=tasks.chat is Auto.auto,
                task_manager=manager,
                confirm_run_unsafe_code=tasks.unsafe_code,
            )
        result = from_rank_zero(partial(_plain, job.task, raw))
        results[name] = result | harness.sparsity() | {"seconds": time.perf_counter() - began}
        tell(name, results[name])
    return {name: results[name] for name in jobs}


def jobs_of(tasks: Tasks) -> dict[str, Job]:
    """What `tasks` asks for: those of suites as SUITE/TASK, with the suite's shots, the others by their names."""
    found: dict[str, Job] = {}
    for name in tasks.tasks:
        if name in SUITES:
            found |= {f"{name}/{job.task}": job for group in SUITES[name].values() for job in group}
        else:
            found[name] = Job(name, tasks.shots)
    return found


def averages(tasks: Tasks, results: Mapping[str, dict]) -> dict[str, dict]:
    """By suite asked for: the mean of its groups, the groups, and the tasks that are missing; those means are null."""
    found = {}
    for suite in tasks.tasks:
        if suite not in SUITES:
            continue
        groups: dict[str, float | None] = {}
        missing = []
        for group, jobs in SUITES[suite].items():
            have = [job for job in jobs if f"{suite}/{job.task}" in results]
            missing += [job.task for job in jobs if job not in have]
            values = [metric(results, f"{suite}/{job.task}/{job.metric}") for job in have]
            groups[group] = sum(values) / len(values) if len(have) == len(jobs) else None
        whole = [value for value in groups.values() if value is not None]
        average = sum(whole) / len(whole) if len(whole) == len(groups) else None
        found[suite] = {"average": average, "groups": groups, "missing": missing}
    return found


def metric(results: Mapping[str, dict], name: str) -> float:
    """The value of TASK/METRIC, or TASK/METRIC,FILTER where a task has several filters. ValueError if there is none."""
    task, _, wanted = name.rpartition("/")
    if task not in results:
        raise ValueError(f"{name}: no such task; there are {', '.join(results) or 'none'}")
    has = results[task]["metrics"]
    values = {key: value for key, value in has.items() if key == wanted} or {
        key: value for key, value in has.items() if key.partition(",")[0] == wanted
    }
    if len(values) != 1:
        raise ValueError(f"{name}: {task} has {', '.join(has)}: name one of them")
    return next(iter(values.values()))


def stopped_by(how: Evaluate, base: Mapping[str, dict], now: Mapping[str, dict]) -> str | None:
    """Why evaluate.stop ends the run here, from the results of the base model and now's; None: it does not."""
    if how.stop.metric is None:
        return None
    before, after = metric(base, how.stop.metric), metric(now, how.stop.metric)
    if before - after <= how.stop.drop:
        return None
    return (
        f"{how.stop.metric} fell from {before:.4f} of the base model to {after:.4f}, more than evaluate.stop.drop="
        f"{how.stop.drop:g}"
    )


def notes(tasks: Tasks) -> list[str]:
    """What every report of scores says of them."""
    told = [NOTE.format(version=version("lm-eval"))]
    return told + [f"only the first {tasks.limit} items of each task: no result of the tasks"] * (
        tasks.limit is not None
    )


def line(name: str, result: Mapping[str, Any]) -> str:
    """One task's result for people."""
    shown = [
        f"{key} {value:.4f}" for key, value in result["metrics"].items() if "_stderr" not in key and value is not None
    ]
    return (
        f"{name:<24} {'  '.join(shown)}  sparsity {result['sparsity']:.2%}  "
        f"({result['samples']} items, {result['shots']}-shot, {result['tokens']:,} tokens, {result['seconds']:.0f} s)"
    )


# --- lm-eval ----------------------------------------------------------------------------------------------------------


def _import() -> Any:
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # pools of processes in a rank
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError("tasks need lm-evaluation-harness: pip install 'prosparse[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def _manager(folder: str | None, names: Iterable[str]) -> Any:
    """lm-eval's task manager of the tasks in `folder` and, if a name is not among them, of all that lm-eval has."""
    from lm_eval.tasks import TaskManager

    path = None if folder is None else Path(folder).expanduser().resolve()
    if path is not None and not path.is_dir():
        raise ValueError(f"task_path={folder} is no folder: give one that holds task files (.yaml)")
    manager = TaskManager(include_path=path, include_defaults=False)
    index = manager.task_index
    if set(names) - set(index):
        for name, entry in _shipped().items():
            index.setdefault(name, entry)
    for name in names:
        if name not in index:
            near = difflib.get_close_matches(name, [*SUITES, *index], n=3)
            raise ValueError(
                f"tasks: no task {name}"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
                + ("" if path else "; tasks of your own need task_path=FOLDER")
            )
    if path is not None:
        _find_data(index, path)
    return manager


@cache
def _shipped() -> dict[str, Any]:
    """The index of lm-eval's own tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def _load(manager: Any, task: str) -> None:
    manager.load([task])


def _find_data(index: Mapping[str, Any], folder: Path) -> None:
    """Data files that a task file in `folder` names without a full path lie beside it, whatever the working folder."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for entry in index.values():
        place = entry.yaml_path
        if place is None or not place.is_relative_to(folder) or "task" not in entry.cfg or "group" in entry.cfg:
            continue
        loaded = load_yaml(place, resolve_func=True)
        kwargs = loaded.get("dataset_kwargs") or {}
        if "data_files" in kwargs:
            loaded["dataset_kwargs"] = kwargs | {"data_files": _beside(kwargs["data_files"], place.parent)}
        entry.cfg, entry.yaml_path = loaded, None  # else lm-eval reads the file again


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _beside(part, folder) for split, part in files.items()}
    if isinstance(files, list):
        return [_beside(part, folder) for part in files]
    return files if "://" in files else str(folder / files)


def _is_unsafe(index: Mapping[str, Any], name: str) -> bool:
    """Whether the task, or one of a group's or tag's, runs what the model writes."""
    entry = index.get(name)
    if entry is None:
        return False
    parts = entry.cfg.get("task", []) if entry.cfg and "group" in entry.cfg else entry.tags if entry.cfg is None else []
    children = [part if isinstance(part, str) else part.get("task") or part.get("group") for part in parts]
    return bool((entry.cfg or {}).get("unsafe_code")) or any(_is_unsafe(index, child) for child in children)


def _plain(task: str, raw: Any) -> dict[str, Any]:
    """lm-eval's result of one task or group in this project's form: `METRIC` or `METRIC,FILTER`."""
    scored = {name: _metrics(values) for name, values in raw["results"].items()}
    parts = {name: values for name, values in scored.items() if name != task}
    metrics = scored.get(task) or _means(list(parts.values()))
    shots = raw["n-shot"]
    common = shots.get(task, next(iter(shots.values())) if len(set(shots.values())) == 1 else None)
    return {
        "metrics": metrics,
        "shots": common,  # null: they differ among the subtasks
        "samples": sum(count["effective"] for count in raw["n-samples"].values()),
        "version": raw["versions"].get(task),
        **({"subtasks": parts} if parts else {}),
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    named = {key.removesuffix(",none"): value for key, value in values.items() if "," in key}
    return {key: value for key, value in named.items() if isinstance(value, int | float)}


def _means(parts: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Of a tag, for which lm-eval has no mean of its own: that over its tasks, of the metrics that all have."""
    shared = [key for key in parts[0] if "_stderr" not in key and all(part.get(key) is not None for part in parts)]
    return {key: sum(part[key] for part in parts) / len(parts) for key in shared}  # type: ignore[misc]
