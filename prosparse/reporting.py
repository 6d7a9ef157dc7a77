"""What runs say: tables, report.json, plots, a page and a model card.

In: records of runs, results of `prosparse measure` and `prosparse eval`. Out: report.json, PNGs, index.html and, of one
run, README.md in one folder; the tables as text. Nothing stands in them that was not measured.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prosparse import plotting
from prosparse.card import CARD, run_card
from prosparse.config import Control
from prosparse.page import Table, page
from prosparse.records import (
    FINISHED,
    Record,
    began_from,
    controls,
    number,
    percent,
    read_run,
    stages,
    task_figures,
    texts_of,
    threshold_of,
    training_tasks,
)
from prosparse.telemetry import duration, redact, strict_json, write_atomically

# --- the table of one training ----------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The models of a report as plain text: a caption with the conditions, one row a model, the notes."""
    models = Record("", Path(), report=report).models
    measured = sorted({model["tokens"] for model in models.values()})
    tokens = " to ".join(f"{count:,}" for count in dict.fromkeys([measured[0], measured[-1]]))
    caption = f"{report['text']}, {tokens} tokens measured, {report['dtype']}, {report['device']}"
    trained = f"trained on {report['tokens_trained']:,} tokens in {duration(report['seconds'])}"
    control = "" if report["control"] == "none" else f", control: {report['control']}"
    header = f"{'model':<12} {'perplexity':>11} {'x base':>8} {'sparsity':>9} {'threshold':>10}"
    lines = [caption, trained + control, "", header, "-" * len(header)]
    base = models.get("base", {}).get("perplexity")
    for name, model in models.items():
        shift = report.get("shift") if name in ("shifted", "recovered", "exported") else None
        perplexity = model["perplexity"]
        lines.append(
            f"{name:<12} {number(perplexity, '.3f'):>11} {number(_ratio(perplexity, base), '.4f'):>8} "
            f"{percent(model['sparsity']):>9} {threshold_of(shift, name, model) if shift else '-':>10}"
        )
    lines += _task_lines(report.get("tasks", {}))
    return "\n".join(lines + [""] * bool(report["notes"]) + [f"note: {note}" for note in report["notes"]])


def _task_lines(tasks: dict[str, dict[str, dict]]) -> list[str]:
    """A row a model and task: metrics and sparsity."""
    lines = [""] * bool(tasks)
    for model, results in tasks.items():
        for task, result in results.items():
            scores = [
                f"{key} {number(value, '.4f')}" for key, value in result["metrics"].items() if "_stderr" not in key
            ]
            lines.append(f"{model:<12} {task:<24} {'  '.join(scores)}  sparsity {percent(result['sparsity'])}")
    return lines


def fairness(control: Control) -> str:
    """What to compare a run's perplexities with."""
    if control is Control.silu_continued:
        return (
            "control silu_continued: the base's own activation, λ 0, the same rows and learning rate; the row that a "
            "sparse model's cost is measured against"
        )
    return (
        "the base model has not been trained on this text and the others have: a ratio to it is no measure of what "
        "sparsity costs; recipe.control=silu_continued trains the fair row on the same tokens"
    )


def _ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value is not None and to else None


# --- several runs side by side ----------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # key of a row: heading, form
    "run": ("run", lambda value: value or "-"),
    "model": ("model", str),
    "activation": ("activation", lambda value: value or "-"),
    "control": ("control", lambda value: value or "-"),
    "tokens_trained": ("tokens trained", lambda value: number(value, ",")),
    "steps": ("steps", lambda value: number(value, ",")),
    "sparsity": ("sparsity", percent),
    "perplexity": ("perplexity", lambda value: number(value, ".3f")),
    "x_base": ("x base", lambda value: number(value, ".4f")),
    "x_control": ("x control", lambda value: number(value, ".4f")),
    "status": ("status", lambda value: value or "-"),
    "measured": ("measured", str),
}


def compare(records: Sequence[Record], measured: Sequence[dict[str, Any]] = ()) -> tuple[list[dict], list[str]]:
    """The matched-token table, a row a model of each run and a measurement, and the notes that it needs.

    x_control is the perplexity by that of the silu_continued run trained on as many tokens of the same text with the
    same seed, batch and learning rate, on the same held-out tokens; None where there is no such run.
    """
    matched, notes = controls(records)
    rows, untrained_rows = [], set()
    for record in records:
        report = record.report
        base = record.models.get("base", {}).get("perplexity")
        dense = matched[record.name].models if record.name in matched else {}  # by step: one may stand before `recover`
        control = {model.get("step"): model["perplexity"] for name, model in dense.items() if name in FINISHED}
        trained_by = {row["step"]: row.get("tokens") for row in record.train_rows}
        for name, model in record.models.items():
            untrained = name in ("base", "substituted")
            seen = (name, record.source, model["perplexity"], model["sparsity"], model["tokens"])
            if seen in untrained_rows:
                continue
            untrained_rows |= {seen} if untrained else set()
            rows.append(
                {
                    "run": None if untrained and len(records) > 1 else record.name,
                    "model": name,
                    "activation": _activation(record, name, model),
                    "control": None if untrained else report.get("control"),
                    "tokens_trained": 0
                    if untrained
                    else trained_by.get(model.get("step"), report.get("tokens_trained")),
                    "steps": model.get("step", report.get("steps")),
                    "sparsity": model["sparsity"],
                    "perplexity": model["perplexity"],
                    "x_base": _ratio(model["perplexity"], base),
                    "x_control": _ratio(model["perplexity"], control.get(model.get("step")))
                    if name in FINISHED
                    else None,
                    "tokens": model["tokens"],
                    "text": report["text"],
                    "dtype": report["dtype"],
                    "device": report["device"],
                    "status": None if untrained else record.status,
                }
            )
    return rows + [_measured_row(result, measured, records, matched) for result in measured], notes


def _measured_row(
    result: dict[str, Any], measured: Sequence[dict[str, Any]], records: Sequence[Record], matched: dict[str, Record]
) -> dict[str, Any]:
    run, model = result["model"]["run"], result["model"]["model"]
    record = next((record for record in records if record.name == run), None)

    def perplexity(run: str | None, model: str) -> float | None:
        """Of another measurement of exactly the same rows."""
        same = (other for other in measured if other["model"] == {"run": run, "model": model})
        return next((other["perplexity"] for other in same if _rows(other) == _rows(result)), None)

    steps = tokens = control = None
    if record is not None:
        end = record.report.get("steps")
        steps = int(model.removeprefix("step ")) if model.startswith("step ") else end if model == "exported" else None
        trained_by = {row["step"]: row.get("tokens") for row in record.train_rows}
        tokens = record.report.get("tokens_trained") if steps == end else trained_by.get(steps)
        if run in matched and steps == end:
            control = perplexity(matched[run].name, "exported")
    return {
        "run": run,
        "model": f"{model} (measured)",
        "activation": _threshold(**result["activation"]) if result.get("activation") else None,
        "control": record.report.get("control") if record is not None else None,
        "tokens_trained": tokens,
        "steps": steps,
        "sparsity": result["sparsity"],
        "perplexity": result["perplexity"],
        "x_base": _ratio(result["perplexity"], perplexity(None, "base")),
        "x_control": _ratio(result["perplexity"], control),
        "tokens": result["tokens"],
        "text": texts_of(result),
        "dtype": result["dtype"],
        "device": result["device"],
        "status": "incomplete" if result.get("complete") is False else None,
    }


def _rows(result: dict[str, Any]) -> tuple:
    """What two measurements have to share for their perplexities to be compared."""
    return texts_of(result), result["tokens"], result.get("context"), result["dtype"], result.get("bos")


def _activation(record: Record, name: str, model: dict[str, Any]) -> str | None:
    """The activation of a run's model as far as it was recorded or follows from the recipe."""
    if isinstance(model.get("activation"), dict):
        return _threshold(**model["activation"])
    export = record.report.get("export") or {}
    recipe = record.config.get("recipe") or {}
    if name == "base":
        return None
    if name in ("shifted", "recovered", "exported"):
        shift = record.report.get("shift") or {}
        if name != "exported" and (shift.get("granularity") or "model") != "model":
            return f"{export['activation'] if export else ''} {threshold_of(shift, name, model)}".strip()
        return _threshold(export["activation"], export["param"]) if export else None
    if record.report.get("control") == str(Control.silu_continued):
        return export.get("activation")
    return (
        "relu"
        if record.report.get("control") == str(Control.relu_only)
        else (recipe.get("activation") or {}).get("name")
    )


def _threshold(name: str, param: float) -> str:
    return f"{name} {param:.4g}" if param else name


def tables(records: Sequence[Record], result: dict[str, Any]) -> list[Table]:
    """Everything of a report that is told in rows, each cell as text."""
    shown = result["table"]
    notes = list(result["table_notes"])
    keys = [key for key in COLUMNS if key not in ("status", "measured")]
    if any(row["status"] not in (None, "finished") for row in shown):
        keys.append("status")
    told = [f"{row['tokens']:,} tokens, {row['text']}, {row['dtype']}, {row['device']}" for row in shown]
    conditions = list(dict.fromkeys(told))
    letters = {condition: chr(ord("a") + i % 26) * (1 + i // 26) for i, condition in enumerate(conditions)}
    if len(conditions) > 1:
        keys.append("measured")
        notes = [f"measured {letter}: {condition}" for condition, letter in letters.items()] + notes
    else:
        notes = [f"measured: {condition}" for condition in conditions] + notes
    named = [row | {"measured": letters[condition]} for row, condition in zip(shown, told, strict=True)]
    cells = [[COLUMNS[key][1](row[key]) for key in keys] for row in named]
    found = [Table("Models", [COLUMNS[key][0] for key in keys], cells, notes)]
    found += [_stage_table(record) for record in records if stages(record)]
    evaluated = [made for record in records for made in training_tasks(record).values()] + result["evaluations"]
    return found + _measure_tables(result["measures"]) + _evaluation_tables(evaluated)


def _stage_table(record: Record) -> Table:
    penalty = (record.config.get("recipe") or {}).get("penalty") or {}
    unit = f"λ in the unit {penalty.get('unit', 'mean')}"
    unit += f" of {penalty['micro_batch_sequences']} sequences" if penalty.get("micro_batch_sequences") else ""
    control = record.report.get("control")
    unit += f"; as the control {control} changed it" if control not in (None, "none", "unknown") else ""
    rows = []
    for stage in stages(record):
        target = "" if stage["target"] is None else f" {100 * stage['target']:g} %"
        share = "" if stage["steps_run"] else "not run"
        rows.append(
            [
                stage["stage"],
                f"{stage['shape']}{target}",
                share or number(stage["l1_factor"], ".4g"),
                number(stage["last_step"], ","),
                number(stage["tokens"], ","),
                percent(stage["sparsity"]),
            ]
        )
    notes = [unit]
    if (origin := began_from(record)) and (steps := [row["step"] for row in record.train_rows]):
        notes.append(f"from step {min(steps)} on: the run went on from {origin}, which has the steps before")
    headings = ["stage", "shape of λ", "λ at its end", "last step", "tokens", "sparsity of its last window"]
    return Table(f"Stages of {record.name}", headings, rows, notes)


def _measure_tables(measured: Sequence[dict[str, Any]]) -> list[Table]:
    """What measurements tell beyond the first table: by text, and CETT-PPL."""
    rows, cett = [], []
    for result in (result for result in measured if not result.get("shift")):
        parts = result.get("texts") or {}
        name = plotting.title(result)
        for text, part in [*parts.items(), *([("all together", result)] if len(parts) != 1 else [])]:
            active, dead, reuse = part.get("active_per_token") or {}, part.get("dead") or {}, part.get("reuse") or {}
            rows.append(
                [
                    name,
                    text,
                    number(part.get("tokens"), ","),
                    percent(part.get("sparsity")),
                    number(part.get("perplexity"), ".3f"),
                    *(number(active.get(key), ",.1f") for key in ("mean", "p50", "p95")),
                    number(active.get("neurons"), ",.0f"),
                    percent(dead.get("share")),
                    percent(reuse.get("share")),
                ]
            )
        if made := result.get("cett"):
            cett.append(
                [
                    name,
                    made["text"],
                    number(made["tokens"], ","),
                    f"{made['percent']:g} %",
                    number(made["cett"], ".4g"),
                    percent(made["sparsity"]),
                    number(made["perplexity"], ".3f"),
                    number(made["dense_perplexity"], ".3f"),
                ]
            )
    headings = ["model", "text", "tokens", "sparsity", "perplexity", "active neurons, mean", "p50", "p95", "of", "dead"]
    notes = [
        "active neurons: of a layer for one token, mean over layers; dead: never active on these tokens; reused: of "
        "the active neurons, those active again at the next token"
    ]
    found = [Table("Measurements by text", [*headings, "reused"], rows, notes)] if rows else []
    names = ["model", "text", "tokens", "rise", "CETT", "sparsity", "perplexity", "perplexity, all neurons"]
    return found + ([Table("CETT-PPL", names, cett, [])] if cett else [])


def _evaluation_tables(evaluated: Sequence[dict[str, Any]]) -> list[Table]:
    """Tasks and their metrics, a column a model."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for column, result in enumerate(evaluated):
        for task, metric, value in task_figures(result):
            cells.setdefault((task, metric), {})[column] = value
    if not cells:
        return []
    names = [plotting.title(result) for result in evaluated]
    rows = [[task, metric, *(found.get(i, "-") for i in range(len(names)))] for (task, metric), found in cells.items()]
    notes = [f"{name}: {note}" for name, made in zip(names, evaluated, strict=True) for note in made.get("notes") or []]
    for name, made in zip(names, evaluated, strict=True):
        if made.get("complete") is False:
            notes.append(f"{name}: incomplete, without {', '.join(made.get('remaining') or ['some tasks'])}")
    return [Table("Tasks", ["task", "metric", *names], rows, notes)]


def plain(table: Table) -> str:
    """A table as text."""
    lines = [table.headings, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.headings))]
    told = [
        "  ".join(
            f"{cell:{'>' if numeric else '<'}{width}}"
            for cell, width, numeric in zip(line, widths, table.numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([told[0], "-" * max(map(len, told)), *told[1:], *(f"note: {note}" for note in table.notes)])


# --- the files --------------------------------------------------------------------------------------------------------


def write_report(run_dir: str | Path, report: dict[str, Any]) -> Path:
    """At the end of a training: write RUN/report from its rows and `report`; returns that folder."""
    folder = Path(run_dir) / "report"
    write([read_run(run_dir, report=report)], folder)
    return folder


def write(
    records: Sequence[Record],
    out: Path,
    measured: Sequence[dict[str, Any]] = (),
    evaluated: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write report.json, the plots for which there is data, index.html and, of one exported model, README.md to `out`.

    Returns what report.json holds: of one run what its training said and more, of several each run's under "runs".
    """
    out.mkdir(parents=True, exist_ok=True)
    rows, notes = compare(records, measured)
    drawn = {name: drawing for name, drawing in _figures(records, measured).items() if drawing[0] is not None}
    for name in FIGURES:
        if name not in drawn:
            (out / name).unlink(missing_ok=True)  # of an earlier report
    for name, (figure, _) in drawn.items():
        assert figure is not None
        figure.savefig(out / name, dpi=plotting.DOTS_PER_INCH)
    problems = [problem for record in records for problem in record.problems]
    one = len(records) == 1
    runs = {
        record.name: {
            "folder": str(record.folder),
            "status": record.status,
            "problems": record.problems,
            "stages": stages(record),
            **({} if one else {"report": record.report}),
        }
        for record in records
    }
    result = (records[0].report if one else {}) | {
        "verb": "report",
        "finished": all(record.finished for record in records),
        "incomplete": bool(problems),
        "problems": problems,
        "lost": next((record.lost for record in records if record.lost), None),
        "runs": runs,
        "table": rows,
        "table_notes": notes,
        "measures": list(measured),
        "evaluations": list(evaluated),
        "figures": {name: caption for name, (_, caption) in drawn.items()},
        "out": str(out),
    }
    card = run_card(records[0], measured, evaluated) if one and records[0].report.get("export") else None
    files = [*drawn, "report.json", "index.html", *([CARD] if card is not None else [])]
    result["files"] = files
    write_atomically(out / "report.json", redact(strict_json(result, indent=2)) + "\n")
    write_atomically(out / "index.html", redact(page(_heading(records), tables(records, result), result, out)))
    if card is not None:
        write_atomically(out / CARD, card)
    else:
        (out / CARD).unlink(missing_ok=True)
    return result


FIGURES = {  # file: what it shows; in the order of the page
    "frontier.png": "Perplexity against sparsity. Points are held-out text, lines are sweeps of the shift on "
    "calibration rows, which are another text and so another level of perplexity.",
    "training.png": "Loss, L1 factor λ and sparsity over the steps of training.",
    "layers.png": "Sparsity by layer on held-out text.",
    "shift.png": "The shift: what each threshold of the whole model gave on calibration rows; dashed the largest "
    "within the budget, or the one given.",
    "thresholds.png": "What thresholds of the whole model, by layer or by neuron cost: the rise of the perplexity "
    "on calibration rows over that before the shift, against sparsity. Rings: the sparsest within the "
    "budget. Rises of more than four budgets lie outside.",
    "texts.png": "Sparsity by text, and by layer on each text.",
    "top_k.png": "Perplexity when only the largest of each token's neurons are kept (top-k); the star is the sparsity "
    "at which the perplexity has risen by the given percentage (CETT-PPL).",
    "union.png": "Share of a layer's neurons that a batch of tokens needs together.",
}


def _figures(
    records: Sequence[Record], measured: Sequence[dict[str, Any]]
) -> dict[str, tuple[Figure | None, dict[str, Any]]]:
    """By file: the figure, and its caption: what it shows, and for each source its conditions and command."""
    drawn = {
        "frontier.png": plotting.frontier(records),
        "training.png": plotting.training(records),
        "layers.png": plotting.layers(records),
        "shift.png": plotting.shift(records),
        "thresholds.png": plotting.thresholds(records, measured),
        "texts.png": plotting.texts(measured),
        "top_k.png": plotting.top_k(measured),
        "union.png": plotting.union(measured),
    }
    result = {}
    for name, figure in drawn.items():
        if name in ("texts.png", "top_k.png", "union.png"):
            told = [_conditions(made, name) for made in measured]
        else:
            told = [_source(record, name) for record in records if record.models or record.rows]
        if name == "thresholds.png":
            told += [_conditions(made, name) for made in measured]
        sources = [source for source in told if source is not None]
        result[name] = figure, {"shows": FIGURES[name], "sources": sources}
    return result


def _source(record: Record, figure: str) -> dict[str, str] | None:
    report = record.report
    shift = report.get("shift") or {}
    counts = sorted({model["tokens"] for model in record.models.values()})
    held_out = (
        f"{report['text']}, {' to '.join(f'{count:,}' for count in dict.fromkeys(counts[:1] + counts[-1:]))} tokens"
    )
    sweep = f"sweep on {shift['tokens']:,} tokens of training text not read before" if shift.get("tokens") else ""
    trained = f"trained on {number(report.get('tokens_trained'), ',')} tokens"
    parts = {
        "training.png": [trained, held_out],
        "frontier.png": [held_out, sweep],
        "shift.png": [sweep],
        "thresholds.png": [sweep],
    }.get(figure, [held_out])
    if figure in ("shift.png", "thresholds.png") and not sweep:
        return None
    status = [] if record.status == "finished" else [record.status]
    told = "; ".join([*(part for part in parts if part), report["dtype"], report["device"], *status])
    return {"name": record.name, "conditions": told, "command": report["command"]}


def _conditions(made: dict[str, Any], figure: str) -> dict[str, str] | None:
    """The same of a measurement; None if it has no part in the figure."""
    key = figure.removesuffix(".png").replace("thresholds", "shift")
    if not (made.get(key) or (key == "top_k" and made.get("cett"))):
        return None
    text, tokens = texts_of(made), made["tokens"]
    if key == "top_k":
        part = made["cett"] or made["top_k"][0]
        text, tokens = part["text"], part["tokens"]
    context = f", rows of {made['context']}" if made.get("context") else ""
    told = f"{text}; {tokens:,} tokens{context}; {made['dtype']}; {made['device']}"
    return {"name": plotting.title(made), "conditions": told, "command": made["command"]}


def _heading(records: Sequence[Record]) -> str:
    return ", ".join(record.name for record in records)
