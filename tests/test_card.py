"""A model card has what was measured and nothing else."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from prosparse import checkpoint
from prosparse.card import checkpoint_card, model_card, run_card
from prosparse.records import read_results, read_run
from prosparse.reporting import tables, write
from prosparse.telemetry import Metrics
from runs import A_TASK, SOURCE, a_measurement, a_report, a_run, an_evaluation, model

EXPORTED = a_report()["export"]
TASKS = {"base": 0.7, "settle": 0.6, "shifted": 0.65}


@pytest.fixture
def run_dir(tmp_path):
    return a_run(tmp_path / "demo")


def a_checkpoint(run_dir, step, **manifest):
    """The manifest alone of a checkpoint."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest["format"] = checkpoint.FORMAT
    told = manifest | {"xxh3_128": checkpoint._digest_of(manifest)}
    (folder / "manifest.json").write_text(json.dumps(told))
    return folder


def numbers(value):
    """Every number of a nested value."""
    if isinstance(value, dict):
        return [n for part in value.values() for n in numbers(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def measured(card):
    """What the card's tables say was measured, as numbers."""
    section = card.split("## Measured")[1].split("##")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    told = [cell.strip() for line in table for cell in line.strip("|").split("|")]
    return [float(cell.removesuffix(" %").replace(",", "")) for cell in told if re.fullmatch(r"[\d.,]+( %)?", cell)]


def test_every_figure_of_the_card_is_in_the_report(run_dir):
    record = read_run(run_dir)
    card, known = run_card(record), numbers(record.report)
    figures = measured(card)
    assert len(figures) == 6  # sparsity, perplexity, tokens of two models
    rounded = {round(scale * n, places) for n in known for scale, places in ((1, 3), (100, 2))}
    assert set(figures) <= rounded
    for part in ("stdlib, held out", "bf16", "2 CPU ranks", "`prosparse train experiment=demo`", "made for a test"):
        assert part in card
    record.report["models"]["exported"]["perplexity"] = 23.456
    assert 23.456 in measured(run_card(record))


def test_what_was_not_measured_is_not_in_the_card(run_dir):
    record = read_run(run_dir)
    del record.report["models"]["exported"]
    card = run_card(record)
    assert "Nothing was measured on this model" in card and "perplexity |" not in card
    bare = checkpoint_card("org/other")(EXPORTED)
    assert "Nothing was measured on this model" in bare and "`org/other`" in bare
    assert "exported from a bare model" in bare and re.search(r"\d\d ?%", bare) is None


def test_the_metadata_is_that_of_the_hub_without_what_nobody_told(run_dir):
    data = ModelCard(run_card(read_run(run_dir))).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", SOURCE)
    assert data.tags == ["prosparse", "activation-sparsity", "fatrelu"]
    assert data.license is None and data.language is None and data.datasets is None
    record = read_run(run_dir)
    record.config["model"]["source"] = str(run_dir)  # a path is no name on the Hub
    assert ModelCard(run_card(record)).data.base_model is None


def test_the_card_tells_stages_chat_template_limits_and_citation(run_dir):
    card = run_card(read_run(run_dir))
    for row in ("| substitution | sine | 0.1667 | 4 | 4,096 |", "| settle | sine | 0.5 | 12 | 4,096 |"):
        assert row in card
    for part in ("threshold 0.02", "trust_remote_code=True", "`chat_template.jinja`", "## Limitations", "2402.13516"):
        assert part in card
    assert "12,288 tokens in 12 steps on code (stdlib)" in card
    stock = model_card(EXPORTED | {"files": ["model.safetensors"], "activation": "silu", "param": 0.0}, [])
    assert "which is not sparse" in stock and "trust_remote_code" not in stock and "None: the model continues" in stock


def test_the_card_of_folded_thresholds_has_the_one_that_the_model_has(run_dir):
    record = read_run(run_dir)
    record.report["shift"] |= {"granularity": "neuron", "folded": {"threshold": 0.0625}}
    card = run_card(record)
    assert "Shift: thresholds by neuron, folded into 0.0625 for the whole model, the sparsest tried" in card
    assert "threshold 0.02" not in card.split("## Training")[1]


def test_measurements_and_tasks_of_the_model_stand_in_its_card(run_dir, tmp_path):
    record = read_run(run_dir)
    paths = [
        a_measurement(tmp_path / "own", "runs/demo", 24.125, 0.7),
        a_measurement(tmp_path / "earlier", "runs/demo/checkpoints/step-00000008", 99.0, 0.6),
        an_evaluation(tmp_path / "tasks", "runs/demo/model", complete=False),
    ]
    card = run_card(record, *read_results([str(path) for path in paths], [record]))
    assert (
        "| this model | 70.00 % | 24.125 | 32,768 | code (stdlib), held-out 2 %; wiki (wiki.txt) | bf16 | cpu |" in card
    )
    assert "99.000" not in card
    assert "| this model | arc_easy | acc | 0.3125 | 5 | 1,200 | 9 | bf16 |" in card
    assert "Note: made by hand." in card and "Not all of these tasks were run" in card
    assert "No benchmark tasks" not in card


@pytest.mark.parametrize("ended", [True, False])
def test_the_tasks_of_a_training_stand_in_the_card_of_its_model_and_of_the_base(run_dir, ended):
    scores = {name: {"piqa": A_TASK | {"metrics": {"acc": acc}}} for name, acc in TASKS.items()}
    path = run_dir / "report" / "report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"tasks": scores}))
    if not ended:
        path.unlink()
        for name, result in scores.items():
            row = {"kind": "task", "step": 12, "evaluated": name, "task": "piqa", "result": result["piqa"]}
            Metrics(run_dir, 12).append(row)
    record = read_run(run_dir)
    (tasks,) = (made for made in tables([record], write([record], run_dir / "out")) if made.title == "Tasks")
    assert tasks.headings[2:] == [f"demo, {name} (in training)" for name in TASKS]
    if not ended:
        return
    for card in (run_card(record), checkpoint_card(str(run_dir))(EXPORTED)):
        assert "| base | piqa | acc | 0.7000 | 5 |" in card and "No benchmark tasks" not in card
        assert "| this model, in training | piqa | acc | 0.6500 | 5 |" in card and "0.6000" not in card
    trained = checkpoint_card(str(a_checkpoint(run_dir, 12, shift=None)))(EXPORTED)
    assert "| this model, in training | piqa | acc | 0.6000 |" in trained
    assert "No benchmark tasks" in checkpoint_card(str(a_checkpoint(run_dir, 8, shift=None)))(EXPORTED)


def test_a_checkpoint_has_the_figures_of_its_own_step_only(run_dir):
    (run_dir / "checkpoints").mkdir()
    last, earlier = (checkpoint_card(f"{run_dir}/checkpoints/step-{n:08d}") for n in (12, 8))
    exported = EXPORTED | {"activation": "relu", "param": 0.0}
    assert 21.0 in measured(last(exported)) and 22.0 not in measured(last(exported))
    assert "Nothing was measured on this model" in earlier(exported)
    assert 22.0 in measured(checkpoint_card(str(run_dir))(EXPORTED))
    quantized = {"format": "powerinfer", "activation": "relu", "files": ["m.gguf"], "out": "x"}
    assert "Nothing was measured on this model" in checkpoint_card(str(run_dir))(quantized)


def test_the_card_of_a_recovered_checkpoint_has_its_own_figures_and_its_shift(run_dir):
    path = run_dir / "report" / "report.json"
    report = json.loads(path.read_text())
    report["models"]["trained"]["step"] = report["models"]["shifted"]["step"] = 8
    report["models"]["recovered"] = model(20.5, 0.75) | {"step": 12}
    path.write_text(json.dumps(report))
    last = a_checkpoint(run_dir, 12, shift=report["shift"])
    card = checkpoint_card(str(last))(EXPORTED)
    assert {20.5, 75.0} <= set(measured(card)) and not {21.0, 22.0} & set(measured(card))
    assert "Shift: threshold 0.02" in card
    before = checkpoint_card(str(a_checkpoint(run_dir, 8, shift=None)))(EXPORTED)
    assert 21.0 in measured(before) and not {20.5, 22.0} & set(measured(before)) and "Shift:" not in before
    assert 22.0 in measured(checkpoint_card(str(a_checkpoint(run_dir, 8, shift=report["shift"])))(EXPORTED))


def test_the_card_of_an_earlier_checkpoint_tells_the_training_up_to_it(run_dir):
    card = checkpoint_card(str(a_checkpoint(run_dir, 8, shift=None)))(EXPORTED)
    assert "8,192 tokens in 8 steps" in card and "12,288 tokens" not in card
    assert "| rise | sine | 0.3333 | 8 | 4,096 |" in card and "| settle | sine | not run | 12 | - |" in card


def test_secrets_are_not_in_the_card(run_dir, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "swordfish-2026")
    record = read_run(run_dir)
    record.report["command"] = "prosparse train tracking.name=swordfish-2026"
    assert "swordfish" not in run_card(record) and "tracking.name=***" in run_card(record)
