"""Training after the shift: thresholds are held, a resume goes on with them, what is exported has them folded."""

import json
import shutil

import pytest
import torch
from conftest import metrics, tiny_overrides, trained
from safetensors.torch import load_file

from prosparse import load_model
from prosparse.cli import compose
from prosparse.schedule import learning_rate, scaled, spans

GRANULARITIES = (pytest.param("model", marks=pytest.mark.slow), "neuron")


def settings(tiny, run_dir, granularity: str) -> list[str]:
    how = ["shift@recipe.shift=budget", f"recipe.shift.granularity={granularity}", "recipe.shift.budget=0.002"]
    recover = ["recipe.recover.steps=3", "recipe.recover.lr=1e-4", "save.keep=4", "experiment=demo"]
    return [*tiny_overrides(tiny, run_dir), *how, *recover, "save.every=1"]


@pytest.fixture(scope="module", params=GRANULARITIES)
def run(request, nursery, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    done = nursery.run(settings(tiny, folder, request.param), ranks=1, log=folder.with_suffix(".log"))
    assert done.codes == [0], done.text()
    return folder, request.param


def held_out(folder) -> dict[str, dict]:
    return {row["model"]: row for row in metrics(folder) if row["kind"] == "evaluation"}


def test_recovery_follows_the_shift_and_its_model_is_exported(run):
    folder, granularity = run
    rows = trained(folder)
    assert [row["stage"] for row in rows[-4:]] == ["hold", "recover", "recover", "recover"]
    assert [row["lr"] for row in rows[-3:]] == [1e-4] * 3 and rows[-1]["l1_factor"] == rows[-4]["l1_factor"]
    seen = held_out(folder)
    assert [seen[name]["step"] for name in ("trained", "shifted", "recovered", "exported")] == [10, 10, 13, 13]
    assert seen["shifted"]["sparsity"] > seen["trained"]["sparsity"]
    assert seen["recovered"]["loss"] != seen["shifted"]["loss"]  # it has trained
    assert seen["exported"]["sparsity"] == pytest.approx(seen["recovered"]["sparsity"], abs=2e-3)
    assert seen["exported"]["loss"] == pytest.approx(seen["recovered"]["loss"], rel=2e-3)
    report = json.loads((folder / "report" / "report.json").read_text())
    assert set(report["models"]) == {"base", "substituted", "trained", "shifted", "recovered", "exported"}
    assert report["shift"]["granularity"] == granularity and ("folded" in report["shift"]) == (granularity == "neuron")


def test_a_resume_within_the_recovery_is_bit_equal(run, nursery, tiny, tmp_path):
    folder, granularity = run
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step-00000013")
    shutil.rmtree(again / "checkpoints" / "step-00000012")
    done = nursery.run(settings(tiny, again, granularity), ranks=1, log=tmp_path / "log")
    assert done.codes == [0] and "goes on from" in done.text(), done.text()
    assert "step-00000011" in done.text() and "shifting the threshold" not in done.text()
    assert trained(again) == trained(folder)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    seen, before = held_out(again), held_out(folder)
    assert {name: row["loss"] for name, row in seen.items()} == {name: row["loss"] for name, row in before.items()}


@pytest.mark.slow
def test_a_run_that_stopped_before_the_shift_or_at_it_ends_the_same(run, nursery, tiny, tmp_path):
    folder, granularity = run
    overrides = settings(tiny, tmp_path / "run", granularity)
    for until in ("hold", "shift"):
        done = nursery.run([*overrides, f"until={until}"], ranks=1, log=tmp_path / "log")
        assert done.codes == [0] and not (tmp_path / "run" / "model").exists(), done.text()
    done = nursery.run(overrides, ranks=1, log=tmp_path / "log")
    assert done.codes == [0] and trained(tmp_path / "run") == trained(folder), done.text()


def test_a_checkpoint_whose_thresholds_are_apart_is_refused_as_a_model(run):
    folder, granularity = run
    path = folder / "checkpoints" / "step-00000011"
    if granularity == "neuron":
        with pytest.raises(ValueError, match="thresholds by neuron"):
            load_model(path, dtype=torch.float32)
    else:
        model = load_model(path, dtype=torch.float32)
        assert model.config.hidden_act == "fatrelu" and model.config.hidden_act_param > 0


def test_the_schedule_has_recovery_as_its_last_stage():
    recipe = scaled(compose("train", ["recipe.recover.steps=8", "recipe.recover.lr=1e-5", "run_dir=x"]).recipe)
    assert [span.name for span in spans(recipe)][-1] == "recover" and scaled(recipe) == recipe
    assert learning_rate(recipe, spans(recipe)[-1].first) == learning_rate(recipe, spans(recipe)[-1].last) == 1e-5


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["recipe.recover.steps=3"], "recipe.recover.lr is None"),
        (["recipe.recover.steps=-1"], "recipe.recover.steps is -1"),
        (["recipe.recover.steps=3", "recipe.recover.lr=1e-5", "shift@recipe.shift=none"], "trains after the shift"),
        (["recipe.shift.granularity=neuron", "zero=zero3"], "needs whole weights on every rank"),
    ],
)
def test_what_cannot_recover_is_told(overrides, told):
    with pytest.raises(ValueError, match=told):
        compose("train", ["run_dir=x", *overrides])
