"""Tasks on two ranks, by the verb and within a training: the same numbers, a row a task, the rule that ends a run."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, make_tiny, metrics, tiny_overrides, trained

pytestmark = pytest.mark.timeout(300)
NAMES = ("opposites", "series")
FOLDER = ROOT / "tests" / "tasks"
TASKS = ["evaluate.tasks=[opposites,series]", f"evaluate.task_path={FOLDER}", "evaluate.limit=9", "evaluate.batch=4"]


@pytest.fixture(scope="module")
def go(nursery, tiny, tmp_path_factory):
    """go(name, *overrides): one start of the run of that name, with 2 ranks; returns what it said."""
    root = tmp_path_factory.mktemp("tasks")

    def start(name: str, *overrides: str, code: int = 0) -> str:
        settings = [*tiny_overrides(tiny, root / name), "evaluate.every=0", "save.every=100", *TASKS, *overrides]
        group = nursery.run(settings, log=root / f"{name}.log")
        assert group.codes == [code] * 2, group.text()[-4000:]
        return group.text()

    start.root = root
    start("whole")
    return start


def tasks(run_dir: Path) -> dict[tuple[str, str], dict]:
    rows = [row for row in metrics(run_dir) if row["kind"] == "task"]
    found = {(row["evaluated"], row["task"]): row["result"] for row in rows}
    assert len(found) == len(rows)
    return found


def scores(run_dir: Path) -> dict:
    """Without what depends on the clock."""
    kept = ("metrics", "sparsity_by_layer", "tokens", "samples", "shots")
    return {name: {key: result[key] for key in kept} for name, result in tasks(run_dir).items()}


def test_base_stages_and_shifted_model_are_evaluated_and_reported(go):
    found = tasks(go.root / "whole")
    models = ["base", "substitution", "rise", "hold", "shifted"]
    assert list(found) == [(model, task) for model in models for task in NAMES]
    assert all(result["samples"] == 9 for result in found.values())
    assert found["base", "series"]["sparsity"] < 0.1 < found["hold", "series"]["sparsity"]
    report = json.loads((go.root / "whole" / "report" / "report.json").read_text())
    assert report["tasks"]["rise"]["series"] == found["rise", "series"] and "UltraEval" in " ".join(report["notes"])


def test_the_model_says_that_it_was_trained_with_bos(go):
    for folder in ("model", "checkpoints/step-00000010/skeleton"):
        assert json.loads((go.root / "whole" / folder / "config.json").read_text())["trained_with_bos"] is True


def test_a_run_that_stops_repeats_no_task_and_loses_none(go):
    go("stopped", "until=rise")
    file = go.root / "stopped" / "metrics.jsonl"
    before = tasks(go.root / "stopped")
    assert list(before)[-1] == ("rise", "series")
    *kept, last = file.read_text().splitlines()
    assert json.loads(last)["evaluated"] == "rise"  # as if the run had died between its last two tasks
    file.write_text("\n".join(kept) + "\n")
    done = [line.split()[:2] for line in go("stopped").splitlines() if " items, " in line]
    assert done == [["rise", "series"], *[[model, task] for model in ("hold", "shifted") for task in NAMES]]
    after = tasks(go.root / "stopped")
    assert {name: after[name] for name in before if name != ("rise", "series")} == {
        name: result for name, result in before.items() if name != ("rise", "series")
    }
    assert scores(go.root / "stopped") == scores(go.root / "whole")
    assert trained(go.root / "stopped") == trained(go.root / "whole")


def test_evaluating_changes_nothing_of_the_training_and_a_stop_rule_has_to_be_there_from_the_start(go):
    go("without", "evaluate.tasks=[]", "until=rise")
    assert trained(go.root / "without") == trained(go.root / "whole")[:7]
    said = go("without", "evaluate.stop.metric=opposites/acc", code=2)
    assert "the base model was not asked with the same evaluate.limit" in said


@pytest.mark.slow
def test_under_zero_3_the_ranks_answer_the_same(go):
    go("zero3", "zero=zero3", "until=substitution", "evaluate.batch=3")  # three batches of each task for two ranks
    found, known = scores(go.root / "zero3"), scores(go.root / "whole")
    for task in NAMES:
        assert found["base", task]["metrics"] == known["base", task]["metrics"]
        assert found["base", task]["tokens"] == known["base", task]["tokens"]


def test_the_stop_rule_ends_a_run_after_a_stage_and_without_it_the_run_goes_on(go):
    go("worse", "until=substitution")
    file = go.root / "worse" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row.get("evaluated") == "base" and row["task"] == "opposites":
            row["result"]["metrics"]["acc"] += 0.5  # a base model that no training of ten steps comes near
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rule = ["evaluate.stop.metric=opposites/acc", "evaluate.stop.drop=0.1"]
    for _ in range(2):  # started again it says so again, and trains nothing
        said = go("worse", *rule)
        assert "stopped after stage substitution: opposites/acc fell from" in said
        assert len(trained(go.root / "worse")) == 3
    assert not (go.root / "worse" / "model").exists()
    go("worse", "until=rise")
    assert len(trained(go.root / "worse")) == 7


def test_a_stop_rule_on_what_no_task_has_is_refused_before_training(go):
    said = go("odd", "evaluate.stop.metric=series/acc", code=2)
    assert "series/acc: series has exact_match,number" in said and not trained(go.root / "odd")


def test_the_verb_gives_on_two_ranks_exactly_what_it_gives_on_one(nursery, tmp_path):
    asked = [
        f"checkpoint={make_tiny(tmp_path, hidden_act='relu')['model']}",
        "tasks=[opposites,series]",
        f"task_path={FOLDER}",
        "batch=7",
        "threads=1",
    ]
    for ranks, name in ((1, "one"), (2, "two")):
        done = nursery.run([*asked, f"out={tmp_path / name}"], ranks, tmp_path / "log", "eval")
        assert done.codes == [0] * ranks, done.text()
        assert len(re.findall("^(?!{).*sparsity", done.text(), re.M)) == 2  # one rank speaks
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert two["complete"] and list(two["tasks"]) == ["opposites", "series"]
    assert all(0.3 < result["sparsity"] < 0.7 for result in one["tasks"].values())
    for name, result in one["tasks"].items():
        assert result | {"seconds": 0} == two["tasks"][name] | {"seconds": 0}
