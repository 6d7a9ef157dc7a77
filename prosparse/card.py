"""The model card (README.md) that stands beside exported weights, in the form of the Hugging Face Hub.

In: the record of the run that made the model, if there is one, and what the export says of itself. Out: Markdown with
metadata. A figure that was not measured is not there; what is unknown is said to be.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from prosparse.checkpoint import find, read_manifest
from prosparse.config import Control
from prosparse.records import Record, label, number, percent, read_run, stages, task_figures, texts_of, training_tasks
from prosparse.telemetry import redact, versions

CARD = "README.md"
CITATION = """@inproceedings{song2025prosparse,
  title = {{ProSparse}: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models},
  author = {Song, Chenyang and Han, Xu and Zhang, Zhengyan and Hu, Shengding and Shi, Xiyu and Li, Kuai and Chen, Chen
            and Liu, Zhiyuan and Li, Guangli and Yang, Tao and Sun, Maosong},
  booktitle = {Proceedings of the 31st International Conference on Computational Linguistics},
  pages = {2626--2644},
  year = {2025},
  note = {arXiv:2402.13516},
}"""
NAMES = {"bfloat16": "bf16", "float32": "fp32"}


def run_card(record: Record, measured: Sequence[dict[str, Any]] = (), evaluated: Sequence[dict[str, Any]] = ()) -> str:
    """The card of a run's exported model, with its figures and those of measurements and evaluations of it."""
    figures = [_figure(record, name) for name in ("base", "exported") if name in record.models]
    for result in measured:
        if result["model"] in ({"run": None, "model": "base"}, {"run": record.name, "model": "exported"}):
            name = "base" if result["model"]["model"] == "base" else "this model"
            figures.append({**result, "model": name, "text": texts_of(result)})
    own = [result for result in evaluated if result["model"] == {"run": record.name, "model": "exported"}]
    return model_card(record.report["export"], figures, record, _own_tasks(record, "exported") + own)


def checkpoint_card(checkpoint: str, figures: Sequence[dict[str, Any]] | None = None) -> Callable[[dict], str]:
    """For an export of `checkpoint`: what makes its card of what the export says.

    figures: measured on the very model that is exported; None: those that a run's own files have of it.
    """
    place = Path(checkpoint).expanduser()
    record = _record_of(place)
    if record is not None and record.folder == place and not (place / "model" / "config.json").is_file():
        place = find(place) or place  # what is opened where a run has not ended
    name = None if record is None else label(str(place), [record], str(place / "model"))["model"]
    if record is not None and name != "exported":
        name = _cut(record, place) if str(name).startswith("step ") else None

    def card(exported: dict[str, Any]) -> str:
        known, tasks = list(figures or []), []
        if record is not None and figures is None and exported["format"] != "powerinfer":  # which has other numbers
            known = [_figure(record, part) for part in ("base", name) if part in record.models]
            tasks = _own_tasks(record, name)
        return model_card(exported, known, record, tasks, source=checkpoint)

    return card


def _own_tasks(record: Record, name: str | None) -> list[dict[str, Any]]:
    """What the training scored with its base and with the model `name`, as it was before any export."""
    if name == "exported":
        name = next((made for made in ("recovered", "shifted") if made in record.models), "trained")
    stage = record.train_rows[-1]["stage"] if record.train_rows else None
    found = training_tasks(record)
    key = {"shifted": "shifted", "trained": stage, "recovered": stage}.get(name or "")
    if key is None or key not in found:
        return []
    models = {"base": found.get("base"), "this model, in training": found[key]}
    return [{**result, "model": {"run": None, "model": told}} for told, result in models.items() if result is not None]


def _cut(record: Record, checkpoint: Path) -> str | None:
    """Leave of the record what had been when `checkpoint` was saved; the name that the run measured that model by."""
    last, step = record.report.get("steps"), int(checkpoint.name.removeprefix("step-"))
    try:
        shift = read_manifest(checkpoint).get("shift")
    except ValueError:  # whoever opens it says so
        shift = None
    record.rows = [row for row in record.rows if row["step"] <= step]
    read = {row["step"]: row.get("tokens") for row in record.train_rows}
    tokens = record.report.get("tokens_trained") if step == last else read.get(step)
    record.report = record.report | {"shift": shift or None, "steps": step, "tokens_trained": tokens}
    names = ("recovered", "shifted") if shift else ("trained",)
    return next((name for name in names if record.models.get(name, {}).get("step", last) == step), None)


def _record_of(path: Path) -> Record | None:
    """The run that `path` lies in: the folder itself, its model or one of its checkpoints."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            return read_run(folder)
    return None


def _figure(record: Record, name: str) -> dict[str, Any]:
    kept = ("text", "dtype", "device", "command")
    return {**record.models[name], **{key: record.report[key] for key in kept}, "model": _called(name)}


def _called(name: str) -> str:
    return "base" if name == "base" else "this model"


def model_card(
    exported: dict[str, Any],
    figures: Sequence[dict[str, Any]],
    record: Record | None = None,
    evaluated: Sequence[dict[str, Any]] = (),
    source: str | None = None,
) -> str:
    """The card as Markdown. exported: what the export says; figures: measurements of "this model" and of "base"."""
    base = record.source if record is not None else source
    activation, dense = exported["activation"], exported["activation"] not in SPARSE
    parts = [
        f"---\n{_metadata(base, exported, record)}\n---",
        f"# {Path(exported['out']).name if record is None else record.name}",
        _introduction(base, exported, record, dense),
        _loading(exported),
        _measured(figures, record, evaluated),
        *(
            [_training(record)]
            if record is not None
            else ["## Training\n\nNot known: it was exported from a bare model."]
        ),
        _chat(exported),
        _limitations(activation, exported, record, figures, evaluated),
        f"## Citation of the method\n\n```bibtex\n{CITATION}\n```",
    ]
    return redact("\n\n".join(parts) + "\n")


SPARSE = ("relu", "fatrelu", "drelu", "shifted_relu", "relu2")


def _metadata(base: str | None, exported: dict[str, Any], record: Record | None) -> str:
    """YAML; no license and no language, which nobody has told us."""
    hub = base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None
    sources = ((record.config.get("data") or {}).get("sources") or {}).values() if record is not None else ()
    datasets = [source["path"].removeprefix("hub://") for source in sources if source["path"].startswith("hub://")]
    data = ModelCardData(
        library_name=None if exported["format"] == "powerinfer" else "transformers",
        pipeline_tag="text-generation",
        base_model=hub,
        datasets=datasets or None,
        tags=["prosparse", "activation-sparsity", exported["activation"]],
    )
    return data.to_yaml().strip()


def _introduction(base: str | None, exported: dict[str, Any], record: Record | None, dense: bool) -> str:
    param, name = exported.get("param"), "offset" if exported["activation"] == "shifted_relu" else "threshold"
    how = f"`{exported['activation']}`" + (f" with {name} {param:.6g}" if param else "")
    lines = [f"The base model is `{base}`." if base else "The base model is not known."]
    if dense:
        lines.append(f"Its feed-forward layers use {how}, which is not sparse.")
    else:
        lines.append(
            f"Its feed-forward layers use the activation {how}, so that part of their intermediate (what enters "
            "`down_proj`) is exactly zero and need not be computed or read by a runtime that knows it."
        )
    control = record.report.get("control") if record is not None else None
    if control not in (None, "none"):
        lines.append(
            f"It is the control `{control}` of an experiment: trained like a sparse model, without the method."
        )
    made = (record.report.get("versions") or {} if record is not None else versions()).get("prosparse")
    lines.append(f"Made with prosparse {made}." if made else "Made with prosparse.")
    return " ".join(lines)


def _loading(exported: dict[str, Any]) -> str:
    if exported["format"] == "powerinfer":
        return "## Loading\n\nThe folder is for PowerInfer; other runtimes of GGUF files compute another activation."
    code = any(file.startswith("modeling_") for file in exported["files"])
    dtype, trust = exported["dtype"], ", trust_remote_code=True" * code
    text = (
        "## Loading\n\n```python\nimport torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'folder = "."  # this one\nmodel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype}{trust})\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )
    if code:
        text += (
            "\n\nThe class is in the `modeling_*.py` of this folder. With `import prosparse` none of its code is run."
        )
    return text + (f"\n\n{exported['serve']}" if exported.get("serve") else "")


def _measured(figures: Sequence[dict[str, Any]], record: Record | None, evaluated: Sequence[dict[str, Any]]) -> str:
    own = [figure for figure in figures if figure["model"] == "this model"]
    if not own:
        text = "## Measured\n\nNothing was measured on this model. `prosparse measure` and `prosparse eval` do."
    else:
        rows = [
            [
                figure["model"],
                percent(figure["sparsity"]),
                number(figure["perplexity"], ".3f"),
                number(figure["tokens"], ","),
                figure["text"],
                figure["dtype"],
                figure["device"],
            ]
            for figure in figures
        ]
        headings = ["model", "sparsity", "perplexity", "tokens", "text", "dtype", "device"]
        commands = dict.fromkeys(f"`{figure['command']}`" for figure in figures)
        text = (
            "## Measured\n\nSparsity is the share of exact zeros in the intermediate, mean over layers. It depends on "
            f"the text.\n\n{_table(headings, rows)}\n\nCommands: {'; '.join(commands)}"
        )
        notes = record.report.get("notes") or [] if record is not None else []
        text += "".join(f"\n\nNote: {note}." for note in notes)
    for result in evaluated:
        model = "this model" if result["model"]["run"] else result["model"]["model"]
        rows = []
        for task, metric, value in task_figures(result):
            made = result["tasks"].get(task) or {}  # a suite has none
            counts = [number(made.get(key), ",") for key in ("shots", "samples", "tokens")]
            if metric != "items":
                rows.append([model, task, metric, value, *counts, result.get("dtype") or "-"])
        headings = ["model", "task", "metric", "value", "shots", "items", "tokens", "dtype"]
        text += f"\n\n{_table(headings, rows)}\n\nCommand: `{result.get('command', 'not recorded')}`"
        text += "".join(f"\n\nNote: {note}." for note in result.get("notes") or [])
        text += "\n\nNot all of these tasks were run to their end." * (result.get("complete") is False)
    return text


def _training(record: Record) -> str:
    report, config = record.report, record.config
    recipe = config.get("recipe") or {}
    sources = (config.get("data") or {}).get("sources") or {}
    text = ", ".join(f"{name} ({source['path']})" for name, source in sources.items()) or "not known"
    batch, lr = recipe.get("batch") or {}, recipe.get("lr") or {}
    penalty = recipe.get("penalty") or {}
    m = penalty.get("micro_batch_sequences")
    rows = [
        [
            stage["stage"],
            f"{stage['shape']}" + ("" if stage["target"] is None else f", to {100 * stage['target']:g} %"),
            number(stage["l1_factor"], ".4g") if stage["steps_run"] else "not run",
            number(stage["last_step"], ","),
            number(stage["tokens"], ","),
        ]
        for stage in stages(record)
    ]
    told = (
        f"## Training\n\n{number(report.get('tokens_trained'), ',')} tokens in {number(report.get('steps'), ',')} "
        f"steps on {text}; {batch.get('sequences')} rows of {batch.get('context')} tokens a step "
        "where a stage names no other, "
        f"learning rate {lr.get('schedule')} with peak {lr.get('peak')}, {report.get('dtype')}, "
        f"seed {config.get('seed')}.\n\n"
        + _table(["stage", "shape of λ", "λ_i", "T_i (last step)", "tokens"], rows)
        + f"\n\nλ in the unit `{penalty.get('unit', 'mean')}`"
        + (f" of {m} sequences" if m else "")
        + ": docs/training.md of prosparse."
    )
    shift = report.get("shift")
    if shift:
        folded = shift.get("folded")  # of thresholds by layer or neuron
        budget = shift.get("budget")
        what, most = f"threshold {shift['threshold']:.6g}", "the largest tried that keeps"
        if folded:
            what, most = f"thresholds by {shift['granularity']}", "the sparsest tried that keep"
        how = "given" if budget is None else f"{most} perplexity within {100 * budget:g} %"
        what += f", folded into {folded['threshold']:.6g} for the whole model" if folded else ""
        told += f"\n\nShift: {what}, {how}, on {shift['tokens']:,} calibration tokens."
    return (
        told if report.get("control") != str(Control.silu_continued) else told + "\n\nWithout any L1 penalty (control)."
    )


def _chat(exported: dict[str, Any]) -> str:
    has = any(file.startswith("chat_template") for file in exported["files"])
    text = "In `chat_template.jinja`, which the tokenizer applies." if has else "None: the model continues plain text."
    return f"## Chat template\n\n{text}"


def _limitations(
    activation: str,
    exported: dict[str, Any],
    record: Record | None,
    figures: Sequence[dict[str, Any]],
    evaluated: Sequence[dict[str, Any]],
) -> str:
    lines = ["Sparsity and perplexity hold for the texts named above; on other texts they are others."]
    if activation in SPARSE:
        lines.append(
            "A runtime that ignores the activation in `config.json` computes another function: check its output."
        )
        lines.append("transformers computes all neurons: being sparse makes it no faster there.")
    if not evaluated:
        lines.append("No benchmark tasks were run on it.")
    measured = {NAMES.get(str(figure["dtype"]), str(figure["dtype"])) for figure in figures}
    written = NAMES.get(exported.get("dtype", ""), exported.get("dtype"))
    if written is not None and measured - {written}:
        lines.append(f"The figures are of {', '.join(sorted(measured))}, the weights here are {written}.")
    if record is not None and record.problems:
        lines.append(f"The record of its training is incomplete: {'; '.join(record.problems)}.")
    lines.append("What the base model was trained on, its license and its biases: see there.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
