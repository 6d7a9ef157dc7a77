"""Going on: after stops, with other ranks, under another ZeRO stage, from another run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import metrics, tiny_llama, tiny_overrides, trained

from prosparse import checkpoint, shards

pytestmark = pytest.mark.timeout(600)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """fp32 masters of the newest checkpoint."""
    folder = checkpoint.find(run_dir)
    assert folder is not None
    manifest = checkpoint.verify(folder)
    return shards.read_weights(checkpoint.rank_files(folder, manifest), manifest["shapes"])


def assert_bit_equal(one: Path, other: Path) -> None:
    assert trained(one) == trained(other)
    ours, theirs = weights(one), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def go(nursery, tiny, tmp_path_factory):
    """go(name, *overrides, ranks=2): one start of the run of that name, up to the end of its stages."""
    root = tmp_path_factory.mktemp("resume")

    def start(name: str, *overrides: str, ranks: int = 2, code: int = 0, **inject):
        group = nursery.run(
            [*tiny_overrides(tiny, root / name), "evaluate.every=0", "until=hold", *overrides],
            ranks=ranks,
            log=root / f"{name}.log",
            **inject,
        )
        assert group.codes == [code] * ranks, group.text()[-4000:]
        return group.text()

    start.root = root
    start("undisturbed")
    return start


def slow(value: str):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["save.asynchronous=true", slow("zero=zero1"), "zero=zero3", slow("dtype=fp32")])
def test_a_run_resumed_twice_and_across_stages_is_bit_equal(go, kind):
    name = kind.replace("=", "-")
    undisturbed = "undisturbed" if kind.startswith("save") else f"whole {name}"
    if undisturbed != "undisturbed":
        go(undisturbed, kind)
    go(name, kind, "until=substitution")
    go(name, kind, "until=rise")
    go(name, kind)
    assert_bit_equal(go.root / name, go.root / undisturbed)


def test_two_ranks_then_one_then_two_train_the_same_rows(go):
    go("ranks", "until=substitution")
    text = go("ranks", "until=rise", ranks=1)
    assert "written by 2 ranks under ZeRO-2, with 1 under ZeRO-2" in text
    assert "written by 1 ranks under ZeRO-2, with 2 under ZeRO-2" in go("ranks")
    ours, theirs = trained(go.root / "ranks"), trained(go.root / "undisturbed")
    for key in ("step", "window", "tokens", "l1_factor", "lr"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]
    assert ours[:3] == theirs[:3]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-3)


@pytest.mark.parametrize("stages", ["1 2 1", "2 3 2", slow("3 1 3")])
def test_the_zero_stage_may_change(go, stages):
    one, two, three = (f"zero=zero{stage}" for stage in stages.split())
    go(f"zero {stages}", one, "until=substitution")
    go(f"zero {stages}", two, "until=rise")
    assert f"under ZeRO-{stages[2]}, with 2 under ZeRO-{stages[4]}" in go(f"zero {stages}", three)
    ours, theirs = trained(go.root / f"zero {stages}"), trained(go.root / "undisturbed")
    assert [row["window"] for row in ours] == [row["window"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-3)


def test_a_run_whose_checkpoints_are_all_damaged_begins_anew_and_they_are_not_in_its_way(go):
    run = go.root / "all damaged"
    shutil.copytree(go.root / "undisturbed", run)
    for path in run.glob("checkpoints/step-*/engine/*"):
        os.truncate(path, path.stat().st_size // 2)
    assert "set aside as step-00000010.superseded" in go("all damaged")
    assert_bit_equal(run, go.root / "undisturbed")


def test_a_finished_stage_is_the_start_of_another_run(go):
    parent = go.root / "undisturbed"
    text = go("tail", f"fork={parent}@rise", "recipe.stages.hold.l1.factor=0.1", "recipe.stages.hold.steps=4")
    assert "goes on after step 7 of 11" in text
    rows = trained(go.root / "tail")
    assert rows[:7] == trained(parent)[:7] and [row["step"] for row in rows] == list(range(1, 12))
    assert rows[7]["l1_factor"] == 0.1 and rows[7]["window"] == 8
    # the same tail is the same run, and the parent stays as it was
    go("same tail", f"fork={parent}@rise")
    assert trained(go.root / "same tail") == trained(parent)
    # what lies after the last stage may differ too
    text = go("other shift", f"fork={parent}@hold", "until=shift", "shift@recipe.shift=threshold")
    assert "threshold 0.010" in text and trained(go.root / "other shift") == trained(parent)
    # started again it goes on by itself; without the optimizer's moments it trains otherwise
    go("tail", f"fork={parent}@rise", "recipe.stages.hold.l1.factor=0.1", "recipe.stages.hold.steps=4")
    go("new moments", f"fork={parent}@rise", "fork_optimizer=false")
    fresh = trained(go.root / "new moments")
    assert fresh[:7] == trained(parent)[:7] and fresh[7]["loss"] == trained(parent)[7]["loss"]
    assert fresh[8]["loss"] != trained(parent)[8]["loss"]


def test_a_fork_that_cannot_be_is_refused_by_name(go):
    parent = go.root / "undisturbed"
    for overrides, words in {
        (f"fork={parent}@warmup",): "the recipe has no stage warmup",
        (f"fork={parent / 'none'}@rise",): "has no checkpoint of the end of stage rise; it has: none",
        (f"fork={parent}@rise", "recipe.stages.rise.l1.factor=0.1"): "recipe.stages.rise.l1_factor was",
        (
            f"fork={parent}@rise",
            "recipe.stages.substitution.steps=2",
        ): "recipe.stages.substitution.steps was 3 and is now 2",
        (f"fork={parent}@rise", "seed=1"): "seed was 0 and is now 1",
    }.items():
        text = go("refused", *overrides, ranks=1, code=2)
        assert words in text.splitlines()[-1], text[-2000:]
        assert not list((go.root / "refused").rglob("step-*"))


def test_what_a_checkpoint_does_not_fit_is_named(go, tiny, tmp_path):
    tiny_llama(intermediate_size=64).save_pretrained(tmp_path / "wider")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny["model"] / name, tmp_path / "wider")
    shutil.copytree(tiny["model"], tmp_path / "retokenized")
    tokenizer = json.loads((tmp_path / "retokenized" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (tmp_path / "retokenized" / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copytree(go.root / "undisturbed", go.root / "kept")
    for override, words in {
        f"model.source={tmp_path / 'wider'}": "model.source was",
        f"data.tokenizer={tmp_path / 'retokenized'}": "data.tokenizer was",
        "recipe.stages.hold.l1.factor=0.1": "fork=RUN@STAGE",
        "dtype=fp32": "dtype was bf16 and is now fp32",
    }.items():
        text = go("kept", override, ranks=1, code=2)
        assert words in text.splitlines()[-1] and "was trained otherwise" in text.splitlines()[-1]


def test_a_checkpoint_of_another_major_version_has_to_be_accepted(go):
    shutil.copytree(go.root / "undisturbed", go.root / "older")
    for folder in (go.root / "older" / "checkpoints").glob("step-*"):
        manifest = checkpoint.read_manifest(folder)
        manifest["versions"]["deepspeed"] = "1.2.3"
        content = manifest | {"xxh3_128": checkpoint._digest_of(manifest)}
        (folder / "manifest.json").write_text(json.dumps(content))
    text = go("older", "until=null", ranks=1, code=2)
    assert "was written with deepspeed 1.2.3" in text and "accept_versions=true" in text
    go("older", "accept_versions=true")


def test_a_loss_spike_takes_the_run_back_and_leaves_its_windows_out(go):
    judge = ["guard=rewind", "guard.after=4", "guard.deviations=20", "save.every=2"]
    text = go("spiked", *judge, spike={"8": 50.0})  # the loss of the 8th window, the first after the stage `rise`
    assert "step 8: loss" in text and "windows [7] are left out" in text and "back to step 7" in text
    rows = trained(go.root / "spiked")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["window"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    manifest = checkpoint.verify(checkpoint.find(go.root / "spiked"))
    assert manifest["state"]["dropped_windows"] == [7]
    assert [row["windows"] for row in metrics(go.root / "spiked") if row["kind"] == "rewind"] == [[7]]
    logged = go("told", *judge, "guard=log", spike={"8": 50.0})
    assert "standard deviations above" in logged and trained(go.root / "told")[-1]["window"] == 10


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(go):
    for zero in ("zero1", "zero2", "zero3"):
        text = go(f"nan {zero}", f"zero={zero}", "until=substitution", nan=[2], rank=1)
        assert text.count("step 2 not applied") == 1 and "rows 4-7 left out" in text
        rows = trained(go.root / f"nan {zero}")
        assert [(row["step"], row["window"]) for row in rows] == [(1, 1), (2, 3), (3, 4)]
    go("nan fp32", "dtype=fp32", "until=substitution", nan=[2], rank=1)
    assert trained(go.root / "nan fp32")[1]["window"] == 3


def test_many_steps_in_a_row_that_are_not_finite_end_with_a_diagnosis(go):
    text = go("overflow", "recipe.lr.peak=1e30", "recipe.lr.warmup_steps=0", "guard.skipped_in_a_row=3", code=1)
    last = text.strip().splitlines()[-1]
    assert "3 windows in a row were not finite" in last and "rank 0, rows" in last and "rank 1, rows" in last
    assert "output of model." in last or "gradient of model." in last
    assert "lower recipe.lr.peak" in last and "Traceback" not in text


def test_a_run_that_began_elsewhere_goes_back_there_and_never_to_the_start(go):
    parent = go.root / "undisturbed" / "checkpoints" / "step-00000007"
    judge = ["guard=rewind", "guard.after=4", "guard.deviations=20", "save.every=100"]
    text = go("elsewhere", f"resume={parent}", *judge, spike={"2": 50.0})
    assert "back to step 7; windows [7, 8] are left out" in text
    assert [(row["step"], row["window"]) for row in trained(go.root / "elsewhere")] == [(8, 10), (9, 11), (10, 12)]
    # started again with the same resume=PATH it goes on from its own checkpoint, not from PATH
    again = go("elsewhere", f"resume={parent}", "until=shift")
    assert f"goes on from {go.root / 'elsewhere'}" in again and "set aside" not in again


def test_a_rewind_is_remembered_by_a_run_that_is_killed_after_it(go, nursery, tiny):
    judge = ["guard=rewind", "guard.after=4", "guard.deviations=20", "save.every=100"]
    run_dir = go.root / "remembered"
    overrides = [*tiny_overrides(tiny, run_dir), "evaluate.every=0", "recipe.stages.hold.steps=500", *judge]
    group = nursery.start(overrides, log=go.root / "remembered.log", spike={"9": 50.0})
    assert group.wait_for("step    9/")
    for rank in (0, 1):
        group.signal(9, rank)
    group.wait()
    group = nursery.start(overrides, log=go.root / "remembered.log")
    assert group.wait_for("step    9/")
    group.signal(15, 0)
    assert group.wait() == [75, 75]
    assert [(row["step"], row["window"]) for row in trained(run_dir)][6:8] == [(7, 7), (8, 10)]
    manifest = checkpoint.verify(checkpoint.find(run_dir))
    assert manifest["state"]["dropped_windows"] == [7, 8]


def test_an_infinite_loss_is_skipped_and_no_spike(go):
    text = go("infinite", "guard=rewind", "guard.after=3", nan=[6])
    assert "step 6 not applied" in text and "standard deviations" not in text


@pytest.mark.parametrize(
    "extra",
    [
        "+zero.extra.round_robin_gradients=true",
        "zero.offload=cpu",
        slow("+zero.extra.sub_group_size=1000"),
    ],
)
def test_a_resume_is_bit_equal_with_other_keys_of_deepspeed(go, extra):
    stage = "zero=zero3" if "sub_group" in extra else "zero=zero2"
    name = extra.split(".")[-1].partition("=")[0]
    go(f"whole {name}", extra, stage)
    go(name, extra, stage, "until=rise")
    go(name, extra, stage)
    assert_bit_equal(go.root / name, go.root / f"whole {name}")


def test_keys_of_deepspeed_that_a_resume_cannot_fill_are_refused(go):
    text = go("hpz", "zero=zero3", "+zero.extra.zero_hpz_partition_size=2", code=2)
    assert "zero.extra.zero_hpz_partition_size" in text.splitlines()[-1]


def test_a_fork_of_something_else_in_the_same_folder_is_refused(go):
    parent = go.root / "undisturbed"
    go("forked", f"fork={parent}@rise", "until=hold")
    text = go("forked", f"fork={parent}@substitution", code=2, ranks=1)
    assert "has a run that began otherwise" in text.splitlines()[-1]
