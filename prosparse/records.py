"""What is known of runs, measurements and evaluations: read from their folders, put side by side, compared.

In: run folders (config.yaml, metrics.jsonl, report/report.json) and result.json of other verbs. Out: plain
records; what is damaged or missing is named in them, and the rest is kept.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import isfinite
from pathlib import Path, PurePath
from types import NoneType
from typing import Any

import yaml

from prosparse.config import Control
from prosparse.telemetry import read_metrics

# The models of a run in the order of their making; "training" is the model of a run that has not ended.
MODELS = ("base", "substituted", "training", "trained", "shifted", "recovered", "exported")
FINISHED = ("trained", "shifted", "recovered", "exported")
CONDITIONS = ("model.source", "data.", "recipe.batch.", "recipe.lr.", "recipe.optimizer.", "seed", "dtype")
NO_CONDITION = ("data.cache", "data.processes")  # what may differ though a run's text is the same

# What files have to hold to be used: of config.yaml what lies at these paths (*: each), of the others keys and types.
NUMBER = (int, float, NoneType)  # null: not finite
CONFIG = (
    "model.source",
    "data.sources.*.path",
    "recipe.stages.*.steps",
    "recipe.stages.*.l1",
    "recipe.batch",
    "recipe.lr",
    "recipe.penalty",
    "recipe.activation",
)
LEAVES = {"source": str, "path": str, "steps": int}
FIGURES: dict[str, Any] = {"perplexity": NUMBER, "sparsity": NUMBER, "tokens": int}
ROWS: dict[str, dict[str, Any]] = {
    "train": {"stage": str, "loss": NUMBER, "sparsity": NUMBER},
    "evaluation": FIGURES,
    "shift": {"threshold": NUMBER, "tokens": int, "sweep": list},
    "task": {"evaluated": str, "task": str, "result": dict},
}
REPORT: dict[str, Any] = {
    **dict.fromkeys(("text", "dtype", "device", "command"), str),
    **{"models": dict, "tokens_trained": int, "steps": int, "notes": list},
}


@dataclass
class Record:
    """One run as its folder tells it."""

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    report: dict[str, Any] = field(default_factory=dict)  # the training's own, or as much of it as the rows give
    finished: bool = False  # whether the training wrote its report
    problems: list[str] = field(default_factory=list)  # what is damaged
    lost: str | None = None  # of the problems, that the training's report is

    @property
    def status(self) -> str:
        if self.problems:
            return "incomplete"
        return "finished" if self.finished else "not finished"

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        found = self.report.get("models") or {}
        return {name: found[name] for name in MODELS if found.get(name)}

    @property
    def last(self) -> str | None:
        """The name of the newest model after training, if there is one."""
        return next((name for name in reversed(FINISHED) if name in self.models), None)

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "train"]

    @property
    def source(self) -> str | None:
        return (self.config.get("model") or {}).get("source")


def read_run(folder: str | Path, name: str | None = None, report: dict[str, Any] | None = None) -> Record:
    """The record of the run in `folder`; `report` in place of its report/report.json.

    Raises ValueError if it is no run folder. Damage ends up in `Record.problems`.
    """
    folder = Path(folder).expanduser()
    if report is None and not any((folder / file).is_file() for file in ("config.yaml", "metrics.jsonl")):
        what = "it has neither config.yaml nor metrics.jsonl" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"runs: {folder} is no run folder ({what}): give the run_dir of a training")
    record = Record(name or folder.resolve().name, folder)
    record.config = _read_config(folder / "config.yaml", record.problems)
    damaged: list[str] = []
    rows = read_metrics(folder, damaged)
    record.rows = [row for row in rows if _whole(row)]
    if len(record.rows) < len(rows):
        damaged.append(f"{folder}/metrics.jsonl: {len(rows) - len(record.rows)} lines lack keys and are left out")
    if report is None:
        report = _read_report(folder / "report" / "report.json", record)
    shifted = report is not None and report.get("until") == "shift"  # and is not exported, but may go on
    record.finished = report is not None and not shifted and report.get("finished", True)
    record.report = report if record.finished and report is not None else _so_far(record)
    if shifted and report is not None:
        gone_on = record.report["steps"] > report["steps"]
        newer = ("models", "tokens_trained", "steps", "seconds") if gone_on else ()
        record.report = report | {"finished": False} | {key: record.report[key] for key in newer}
    record.problems += damaged if record.finished else [line for line in damaged if "cut off" not in line]
    record.problems += _gaps(record)
    return record


def read_runs(folders: Sequence[str]) -> list[Record]:
    """A record a folder; those of equal names are told apart by their paths. Raises ValueError as `read_run`."""
    paths = [Path(folder).expanduser() for folder in folders]
    twice = [folder for folder in folders if paths.count(Path(folder).expanduser()) > 1]
    if twice:
        raise ValueError(f"runs: {twice[0]} is named twice: name every run once")
    names = [path.resolve().name for path in paths]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
        for path_of in CONFIG:
            _check_config(config, path_of.split("."))
        return config
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        problems.append(f"{path} cannot be read ({reason}): recipe, text and seed are unknown")
        return {}


def _check_config(config: Any, path: Sequence[str], above: str = "it") -> None:
    """ValueError unless config.yaml has at `path` (a *: at every key) what a run's has: it may be cut off."""
    if not isinstance(config, dict):
        raise ValueError(f"{above} holds no mapping")
    if path:
        for key in config if path[0] == "*" else path[:1]:
            if len(path) > 1 or key not in LEAVES:
                _check_config(config.get(key), path[1:], key)
            elif not isinstance(config.get(key), LEAVES[key]):
                raise ValueError(f"{above} lacks {key}")


def _read_report(path: Path, record: Record) -> dict[str, Any] | None:
    """What the training, or an earlier `prosparse report` of the run, wrote; None if nothing can be read."""
    try:
        report = json.loads(path.read_text())
        if not isinstance(report, dict):
            raise ValueError("it holds no mapping")
        wrong = [key for key, kind in REPORT.items() if not isinstance(report.get(key), kind)]
        wrong += [name for name, model in (report.get("models") or {}).items() if model and not _has(model, FIGURES)]
        if wrong:
            raise ValueError(f"it lacks {', '.join(wrong)}")
        record.lost = report.get("lost")  # an earlier `prosparse report` found the training's own damaged
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        report, record.lost = None, f"{path} could not be read ({error}): what stands in metrics.jsonl is shown instead"
    if record.lost:
        record.problems.append(record.lost)
    return report


def _whole(row: Any) -> bool:
    """Whether a line of metrics.jsonl has what every row of its kind has."""
    return _has(row, {"kind": str}) and _has(row, {"step": int} | ROWS.get(row["kind"], {}))


def _has(value: Any, kinds: dict[str, Any]) -> bool:
    """Whether `value` is a mapping with these keys, each with a value of its kind."""
    return isinstance(value, dict) and all(key in value and isinstance(value[key], kinds[key]) for key in kinds)


def _so_far(record: Record) -> dict[str, Any]:
    """What the rows alone tell of a run that has no report yet."""
    config = record.config
    known = [row for row in record.rows if row["kind"] == "evaluation" and row.get("model") in MODELS]
    models = {row["model"]: row for row in known}
    if any(name in models for name in FINISHED):
        models.pop("training", None)
    train = record.train_rows
    sources = (config.get("data") or {}).get("sources") or {}
    try:
        export = {"export": json.loads((record.folder / "model" / "result.json").read_text())}
    except (OSError, ValueError):
        export = {}
    shifts = [row for row in record.rows if row["kind"] == "shift"]
    tasks: dict[str, dict] = {}
    for row in record.rows:
        if row["kind"] == "task":
            tasks.setdefault(row["evaluated"], {})[row["task"]] = row["result"]
    return export | {
        "finished": False,
        "models": models,
        "tokens_trained": train[-1].get("tokens", 0) if train else 0,
        "steps": train[-1]["step"] if train else 0,
        "text": "held-out documents of " + ", ".join(f"{name} ({s['path']})" for name, s in sources.items())
        if sources
        else "unknown",
        "dtype": config.get("dtype", "unknown"),
        "device": "device not recorded",
        "command": "command not recorded",
        "control": (config.get("recipe") or {}).get("control", "unknown"),
        "versions": config.get("versions", {}),
        "seconds": sum(row.get(key) or 0.0 for row in record.rows for key in ("step_seconds", "seconds")),
        "notes": [],
        **({"tasks": tasks} if tasks else {}),
        **({"shift": shifts[-1]} if shifts else {}),
    }


def _gaps(record: Record) -> list[str]:
    """Steps that metrics.jsonl should have and has not."""
    steps = {row["step"] for row in record.train_rows}
    last = record.report.get("steps") if record.finished else max(steps, default=0)
    first = min(steps, default=1) if began_from(record) else 1  # earlier steps are another run's
    missing = sorted(set(range(first, (last or 0) + 1)) - steps)
    if not missing:
        return []
    where = f"{missing[0]}" if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
    text = f"metrics.jsonl lacks {len(missing)} of {last} steps ({where}): curves and stages show the others"
    return [f"{record.folder}/{text}"]


def began_from(record: Record) -> str | None:
    """The checkpoint elsewhere that a run began from, whose rows it has not; a fork has those of its parent."""
    told = str(record.config.get("resume") or "auto")
    if told not in ("auto", "must", "never"):
        return told
    for manifest in sorted(record.folder.glob("checkpoints/step-*/manifest.json"), reverse=True):
        try:  # config.yaml is that of the last start
            return re.fullmatch(r"resume (.+)", json.loads(manifest.read_text())["origin"])[1]  # type: ignore[index]
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return None


def stages(record: Record) -> list[dict[str, Any]]:
    """The stages of the recipe in order: λ and step planned and reached, the tokens and the sparsity of training.

    `l1_factor` is that of the stage's last step in metrics.jsonl; None of what was not run.
    """
    recipe = record.config.get("recipe") or {}
    by_stage = {
        name: [row for row in rows] for name, rows in groupby(record.train_rows, key=lambda row: row.get("stage"))
    }
    counts = {row["step"]: row.get("tokens") for row in record.train_rows}
    table, last = [], 0
    for name, stage in (recipe.get("stages") or {}).items():
        last += stage["steps"]
        rows = by_stage.get(name, [])
        end = rows[-1] if rows else {}
        tokens, before = end.get("tokens"), _tokens_before(rows[0], counts) if rows else None
        l1 = stage.get("l1") or {}
        table.append(
            {
                "stage": name,
                "shape": l1.get("shape"),
                "target": l1.get("sparsity"),
                "l1_factor": end.get("l1_factor"),
                "last_step": last,
                "steps_run": len(rows),
                "tokens": None if tokens is None or before is None else tokens - before,
                "sparsity": end.get("sparsity"),
            }
        )
    return table


def _tokens_before(row: dict[str, Any], counts: dict[int, int | None]) -> int | None:
    """Tokens trained on before the step of `row`; None if neither the row before it nor its own speed tells."""
    if row["step"] == 1:
        return 0
    if row["step"] - 1 in counts:
        return counts[row["step"] - 1]
    count, speed, seconds = (row.get(key) for key in ("tokens", "tokens_per_second", "step_seconds"))
    return None if count is None or speed is None or seconds is None else count - round(speed * seconds)


# --- which runs may be compared ---------------------------------------------------------------------------------------


def differences(record: Record, other: Record) -> list[str]:
    """What keeps two runs from being matched: other tokens, text, seed, batch, learning rate, dtype or base model."""
    found = []
    for key in ("tokens_trained", "steps"):
        ours, theirs = (run.report.get(key) for run in (record, other))
        if ours != theirs:
            found.append(f"{key.replace('_', ' ')} {_number(ours)} and {_number(theirs)}")
    digests = [run.report.get("rows_digest") for run in (record, other)]
    if all(digests) and digests[0] != digests[1]:
        found.append("other rows of text (digests differ)")
    flat = [_conditions(run.config) for run in (record, other)]
    for key in flat[0].keys() & flat[1].keys():
        if flat[0][key] != flat[1][key] and not (all(digests) and key.startswith("data.")):
            found.append(f"{key} {flat[0][key]} and {flat[1][key]}")
    if not all(flat):
        found.append("config.yaml of one is unknown")
    counts = [run.models.get("trained", {}).get("tokens") for run in (record, other)]
    if all(counts) and counts[0] != counts[1]:
        found.append(f"measured on {_number(counts[0])} and {_number(counts[1])} tokens")
    return sorted(found)


def controls(records: Sequence[Record]) -> tuple[dict[str, Record], list[str]]:
    """The matched silu_continued control of each run that has one, by name, and notes on those that have none."""
    dense = [record for record in records if record.report.get("control") == str(Control.silu_continued)]
    found, notes = {}, []
    for record in records:
        matched = [other for other in dense if not differences(record, other)]
        if matched:
            found[record.name] = matched[0]
            if record is not matched[0] and not all(run.report.get("rows_digest") for run in (record, matched[0])):
                notes.append(
                    f"{record.name} and {matched[0].name}: the text is taken to be the same by its path and keys, as "
                    "not both reports have digests of the rows"
                )
        elif dense:
            notes.append(
                f"{record.name} is not matched with {dense[0].name}: {'; '.join(differences(record, dense[0]))}"
            )
    if not dense and len(records) > 1:
        notes.append("no silu_continued run is among them, so what sparsity costs is not told")
        for record in records[1:]:
            if told := differences(record, records[0]):
                notes.append(f"{record.name} is not matched with {records[0].name}: {'; '.join(told)}")
    return found, notes


def _conditions(config: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal for a fair comparison, by dotted key."""
    flat = flattened(config)
    kept = {
        key: value for key, value in flat.items() if key.startswith(CONDITIONS) and not key.startswith(NO_CONDITION)
    }
    parts = (".lr.", ".batch.", ".data.", ".weight_decay", ".reset_optimizer")
    return kept | {
        key: value
        for key, value in flat.items()
        if key.startswith("recipe.stages.") and any(part in key for part in parts)
    }


def flattened(value: Any, path: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key, below `path`."""
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: part
        for name, item in value.items()
        for key, part in flattened(item, f"{path}.{name}" if path else str(name)).items()
    }


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown" if value is None else str(value)


# --- results of other verbs -------------------------------------------------------------------------------------------


def read_results(paths: Sequence[str], records: Sequence[Record]) -> tuple[list[dict], list[dict]]:
    """(measurements, evaluations): result.json of `prosparse measure`, `shift` and `eval`, each with its "model".

    Raises ValueError for a path that has neither.
    """
    measured, evaluated = [], []
    for path in paths:
        place = Path(path).expanduser()
        file = place / "result.json" if place.is_dir() else place
        try:
            result = json.loads(file.read_text())
            if "sweep" in (result.get("shift") or {}):
                measured.append(_shifted(result, file.parent))
                continue
            checkpoint = result["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no result of a verb"
            raise ValueError(
                f"measures: {file} cannot be used ({reason}): give folders of prosparse measure, eval or shift"
            ) from error
        result["model"] = label(checkpoint, records, result.get("opened"))
        if "tasks" in result:
            evaluated.append(result)
        elif "perplexity" in result and "sparsity" in result:
            measured.append(result)
        else:
            raise ValueError(
                f"measures: {file} is neither of measure nor of eval: give a folder that one of them wrote"
            )
    return measured, evaluated


def _shifted(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A result of `prosparse shift` as a measurement on its calibration rows, with all that was tried as "shift"."""
    shift = result["shift"]
    chosen = shift.get("folded") or next(row for row in shift["sweep"] if row["threshold"] == shift["threshold"])
    told = {key: shift[key] for key in ("tokens", "dtype", "device", "command")}
    told |= {"sparsity": chosen["sparsity"], "perplexity": chosen["perplexity"], "shift": shift}
    activation = {"name": result["activation"], "param": result["param"]}
    model = {"run": None, "model": str(folder)}
    return told | {"text": f"{shift['text']} (calibration rows)", "activation": activation, "model": model}


def label(checkpoint: str, records: Sequence[Record], opened: str | None = None) -> dict[str, str | None]:
    """Which run and which of its models `checkpoint` names: {"run", "model"}; run None for any other model.

    opened: the folder in which the model was found; of a run folder nothing else tells a model/ from a checkpoint.
    """
    for record in records:
        if checkpoint == record.source:
            return {"run": None, "model": "base"}
        inside = _inside(checkpoint, record)
        if inside is not None:
            name = inside.name or PurePath(opened or "").name
            step = name.removeprefix("step-")
            part = f"step {int(step)}" if step.isdecimal() else "exported" if name == "model" else str(inside)
            return {"run": record.name, "model": "of an unknown step" if not name else part}
    return {"run": None, "model": checkpoint}


def _inside(checkpoint: str, record: Record) -> PurePath | None:
    """The place of `checkpoint` in the run's folder: absolute, from here, or as the run's own commands named it."""
    places: list[tuple[PurePath, PurePath]] = [(Path(checkpoint).expanduser().resolve(), record.folder.resolve())]
    places += [(PurePath(checkpoint), PurePath(str(name))) for name in (record.config.get("run_dir"),) if name]
    for path, folder in places:
        if path.is_relative_to(folder):
            return path.relative_to(folder)
    return None


def texts_of(result: dict[str, Any]) -> str:
    """The texts of a measurement, with the share that was held out."""
    parts = result.get("texts") or {"": {"text": result.get("text"), "held_out": result.get("held_out")}}
    told = []
    for name, part in parts.items():
        share, path = part.get("held_out"), str(part.get("text"))
        source = path if name in ("", path) else f"{name} ({path})"
        told.append(source + (f", held-out {100 * share:g} %" if share else ""))
    return "; ".join(told)


def training_tasks(record: Record) -> dict[str, dict[str, Any]]:
    """What a training's models (base, one a stage, shifted) scored on tasks, by name, as `prosparse eval` has it."""
    report = record.report
    told = {key: report.get(key) for key in ("dtype", "device", "command")}
    return {
        name: {"model": {"run": record.name, "model": f"{name} (in training)"}, "tasks": tasks, **told}
        for name, tasks in (report.get("tasks") or {}).items()
    }


def task_figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(task or suite, metric, value as text) of an evaluation."""
    told = []
    for task, made in result["tasks"].items():
        told += [(task, metric, number(value, ".4f")) for metric, value in made["metrics"].items()]
        told += [(task, "sparsity", percent(made["sparsity"])), (task, "items", number(made["samples"], ","))]
    suites = result.get("suites") or {}
    return told + [(suite, "average", number(made["average"], ".4f")) for suite, made in suites.items()]


# --- figures as text --------------------------------------------------------------------------------------------------


def threshold_of(shift: dict[str, Any], name: str, model: dict[str, Any]) -> str:
    """The threshold of a model after the shift: of one with many, by what they go; of the exported one the folded."""
    granularity, folded = shift.get("granularity") or "model", shift.get("folded")
    if name != "exported" and granularity != "model" and not model.get("activation"):  # which a single one is told with
        return f"by {granularity}"
    return number((folded or shift)["threshold"], ".4g")


def number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None or not isfinite(value) else f"{value:{form}}{unit}"


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share, ".2f", " %")
