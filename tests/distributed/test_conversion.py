"""The whole road on tiny models: real launchers, real checkpoints, real exports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch, metrics, prosparse, tiny_llama, tiny_overrides, trained
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from prosparse import checkpoint

pytestmark = pytest.mark.timeout(600)  # a dozen trainings


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def assert_equal_runs(one: Path, other: Path) -> None:
    assert trained(one) == trained(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def runs(nursery, tiny, tmp_path_factory) -> dict[str, Path]:
    """Two ranks train: undisturbed; stopped after a stage; ZeRO-1 and ZeRO-3; the controls."""
    root = tmp_path_factory.mktemp("runs")
    quick = ["evaluate.every=0", "save.every=100"]
    plans = {
        "undisturbed": [],
        "stopped": ["until=rise"],
        "zero1": ["zero=zero1", *quick],
        "zero3": ["zero=zero3", *quick],
        "split": ["micro_batch=2", *quick],
        "silu_continued": ["recipe.control=silu_continued", *quick],
        "reset": ["recipe.stages.rise.reset_optimizer=true", "until=rise", *quick],
        "drelu": ["activation@recipe.activation=drelu", "dtype=fp32", "checkpointing=reentrant", *quick],
    }
    trainings = [[*tiny_overrides(tiny, root / name), *extra] for name, extra in plans.items()]
    plans["zero3 again"] = []  # stopped after its last stage and resumed under ZeRO-3
    again = [*tiny_overrides(tiny, root / "zero3 again"), "zero=zero3", *quick]
    trainings += [[*again, "until=rise"], [*again, "until=hold"], [*again, "until=shift"], again]
    for overrides in trainings:
        group = nursery.run(overrides, log=root / "log")
        assert group.codes == [0, 0], group.text()[-4000:]
    return {name: root / name for name in plans}


def test_a_run_leaves_what_it_promises(runs):
    folder = runs["undisturbed"]
    report = json.loads((folder / "report" / "report.json").read_text())
    assert list(report["models"]) == ["base", "substituted", "trained", "shifted", "exported"]
    assert report["tokens_trained"] == 10 * 4 * 32 and report["seconds"] > 0
    assert report["models"]["exported"]["perplexity"] == pytest.approx(
        report["models"]["shifted"]["perplexity"], rel=1e-3
    )
    assert report["models"]["exported"]["sparsity"] == pytest.approx(report["models"]["shifted"]["sparsity"], abs=1e-3)
    pictures = {"frontier.png", "training.png", "layers.png", "shift.png", "thresholds.png"}
    assert {path.name for path in (folder / "report").iterdir()} == {
        *pictures,
        "report.json",
        "index.html",
        "README.md",
    }
    card = (folder / "model" / "README.md").read_text()
    assert card == (folder / "report" / "README.md").read_text()
    assert f"| this model | {100 * report['models']['exported']['sparsity']:.2f} % |" in card
    written = json.loads((folder / "model" / "result.json").read_text())
    assert report["export"] == written and "README.md" in written["files"]
    assert written["bytes"] == sum((folder / "model" / name).stat().st_size for name in written["files"])
    assert report["models"]["exported"]["activation"] == {"name": "fatrelu", "param": written["param"]}
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["model_type"] == "sparsellama" and config["hidden_act"] == "fatrelu"
    assert (folder / "config.yaml").is_file()
    steps = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert steps == [f"step-000000{n}" for n in ("03", "07", "08", "10")]  # the ends of stages and the two newest
    assert [row["tokens_per_second"] * row["step_seconds"] for row in metrics(folder) if row["kind"] == "train"] == (
        pytest.approx([128.0] * 10)
    )


def test_a_run_stopped_and_started_again_as_a_module_by_deepspeed_is_bit_equal_to_an_undisturbed_one(runs, tiny):
    stopped = runs["stopped"]
    assert [row["step"] for row in metrics(stopped) if row["kind"] == "train"] == list(range(1, 8))
    with open(stopped / "metrics.jsonl", "a") as file:  # what a run killed between checkpoints leaves behind
        file.write(json.dumps({"kind": "train", "step": 8, "loss": 0.0}) + "\n" + '{"kind": "tr')
    done = launch("prosparse.cli", "train", *tiny_overrides(tiny, stopped), "resume=must", script="--module")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "goes on after step 7" in done.stderr
    assert_equal_runs(stopped, runs["undisturbed"])


def test_a_resume_under_zero3_is_bit_equal_and_until_stops_after_the_last_stage_and_the_shift(runs):
    assert_equal_runs(runs["zero3 again"], runs["zero3"])
    evaluated = [row["model"] for row in metrics(runs["zero3 again"]) if row["kind"] == "evaluation"]
    assert evaluated == ["base", "substituted", "trained", "shifted", "exported"]


def test_the_seconds_of_a_report_are_those_of_all_starts(runs):
    rows = metrics(runs["zero3 again"])
    seconds = json.loads((runs["zero3 again"] / "report" / "report.json").read_text())["seconds"]
    spent = ("step_seconds", "seconds", "blocked_seconds")
    assert seconds == pytest.approx(sum(row.get(key, 0) for row in rows for key in spent))


def test_zero_stages_and_micro_batches_train_the_same_model(runs):
    losses = {name: [row["loss"] for row in trained(runs[name])] for name in ("undisturbed", "zero1", "zero3", "split")}
    for name, values in losses.items():
        assert values == pytest.approx(losses["undisturbed"], rel=3e-3), name
    for name in ("zero1", "zero3"):
        assert (runs[name] / "model" / "config.json").is_file()


def test_a_stage_may_start_with_a_new_optimizer(runs):
    plain, reset = ([row["loss"] for row in trained(runs[name])] for name in ("undisturbed", "reset"))
    assert plain[:4] == reset[:4] and plain[4] != reset[4]


def test_the_silu_control_trains_the_same_rows_and_is_written_as_its_stock_class(runs):
    folder = runs["silu_continued"]
    config = json.loads((folder / "model" / "config.json").read_text())
    assert (config["model_type"], config["hidden_act"]) == ("llama", "silu") and "auto_map" not in config
    assert list(json.loads((folder / "report" / "report.json").read_text())["models"]) == [
        "base",
        "trained",
        "exported",
    ]
    plain, control = trained(runs["undisturbed"]), trained(folder)
    assert [(r["lr"], r["tokens"], r["window"]) for r in plain] == [
        (r["lr"], r["tokens"], r["window"]) for r in control
    ]
    assert all(row["l1_factor"] == 0 for row in control)


def test_drelu_is_exported_with_its_threshold(runs):
    config = json.loads((runs["drelu"] / "model" / "config.json").read_text())
    shift = json.loads((runs["drelu"] / "report" / "report.json").read_text())["shift"]
    assert config["hidden_act_param" if shift["threshold"] else "model_type"] == (shift["threshold"] or "bamboo")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(runs, tmp_path, damage, capsys):
    shutil.copytree(runs["undisturbed"] / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step-00000010"
    assert checkpoint.find(tmp_path) == newest
    file = next((newest / "engine").glob("rank-*.safetensors"))
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    assert checkpoint.find(tmp_path) == tmp_path / "checkpoints" / "step-00000008"
    assert file.name in capsys.readouterr().err
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.verify(newest)


def test_a_checkpoint_without_its_manifest_or_not_yet_renamed_is_none(runs, tmp_path):
    shutil.copytree(runs["undisturbed"] / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "step-00000008").rename(tmp_path / "checkpoints" / "step-00000008.tmp")
    assert checkpoint.find(tmp_path) == tmp_path / "checkpoints" / "step-00000007"


def test_a_checkpoint_opens_as_a_model_and_exports(runs, tmp_path):
    """`until` leaves no model/: its checkpoint is enough for measure and export."""
    from prosparse.models.load import load_model

    model = load_model(runs["undisturbed"] / "checkpoints" / "step-00000010", dtype=torch.bfloat16)
    theirs = weights(runs["undisturbed"])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items() if name in theirs)
    assert model.model.layers[0].mlp.activation == "relu"


def test_the_verbs_work_on_a_finished_run(runs, nursery, tiny, tmp_path):
    def run(verb: str, *overrides: str):
        group = nursery.run(list(overrides), ranks=1, log=tmp_path / "log", verb=verb)
        assert group.codes == [0], group.text()
        return group

    text = [f"text={tiny['text']}", f"cache={tiny['cache']}", "context=32", "threads=1"]
    result = run("measure", f"checkpoint={runs['undisturbed']}", "held_out=0.2", *text).result()
    assert len(result["sparsity_by_layer"]) == 3 and result["tokens"] > 0
    shifted = f"checkpoint={runs['undisturbed']}/checkpoints/step-00000010"
    run("shift", shifted, "threshold=0.01", f"out={tmp_path / 'shifted'}", *text)
    assert json.loads((tmp_path / "shifted" / "config.json").read_text())["hidden_act_param"] == 0.010009765625
    card = (tmp_path / "shifted" / "README.md").read_text()
    point = json.loads((tmp_path / "shifted" / "result.json").read_text())["shift"]["sweep"][-1]
    assert f"| this model | {100 * point['sparsity']:.2f} % | {point['perplexity']:.3f} |" in card
    both = f"runs=[{runs['undisturbed']},{runs['silu_continued']}]"
    reported = run("report", both, f"out={tmp_path / 'report'}")
    rows = {(row["run"], row["model"]): row for row in reported.result()["table"]}
    ratio = rows["undisturbed", "exported"]["perplexity"] / rows["silu_continued", "trained"]["perplexity"]
    assert rows["undisturbed", "exported"]["x_control"] == pytest.approx(ratio)
    assert (tmp_path / "report" / "index.html").is_file() and "by its path" not in reported.text()


def test_torchrun_starts_the_same_entry_and_a_plain_run_goes_too(runs, nursery, tiny, tmp_path):
    overrides = [*tiny_overrides(tiny, tmp_path / "torchrun"), "until=substitution", "evaluate.rows=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "launch/train.py", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert trained(tmp_path / "torchrun") == trained(runs["undisturbed"])[:3]

    plain = prosparse("train", *tiny_overrides(tiny, tmp_path / "plain"), "until=substitution", "zero=zero3")
    assert plain.returncode == 0, plain.stderr[-3000:]
    assert json.loads(plain.stdout.splitlines()[-1])["stopped_at"] == "substitution"
    # the newest checkpoint is damaged: the run goes on from the one before and writes that step anew
    newest = tmp_path / "plain" / "checkpoints" / "step-00000003"
    file = next((newest / "engine").glob("rank-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    again = [*tiny_overrides(tiny, tmp_path / "plain"), "until=rise", "zero=zero3", "save.keep=9"]
    more = nursery.run(again, ranks=1, log=tmp_path / "log")
    assert more.codes == [0] and "passing over" in more.text() and "goes on after step 2" in more.text()
    kept = sorted(path.name for path in newest.parent.iterdir())
    assert kept == [f"step-0000000{n}" for n in (2, 3)] + ["step-00000003.superseded"] + [
        f"step-0000000{n}" for n in (4, 6, 7)
    ]
    for path in newest.parent.glob("step-????????"):
        checkpoint.verify(path)
    assert [r["step"] for r in trained(tmp_path / "plain")] == list(range(1, 8))
    assert [r["loss"] for r in trained(tmp_path / "plain")[:3]] == (
        pytest.approx([r["loss"] for r in trained(runs["undisturbed"])[:3]], rel=3e-3)
    )


def test_what_a_user_can_mend_is_one_line_and_leaves_nothing_half_written(runs, nursery, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    AutoTokenizer.from_pretrained(tiny["model"]).save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=300)).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny["model"]).save_pretrained(tmp_path / "small")
    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "small")
    cases = {
        "rows": (["recipe.batch.sequences=5", "micro_batch=2"], "recipe.batch.sequences is 5"),
        "file": (["data.sources.files.path=/no/such/file"], "data.sources.files"),
        "model": (["model.source=/no/such/model"], "/no/such/model"),
        "short": ([f"data.sources.files.path={tmp_path / 'short.txt'}"], "data."),
        "shape": (["model.shape.hidden_size=64"], "model.shape.hidden_size is 64"),
        "ffn": ([f"model.source={tmp_path / 'gpt2'}"], "gpt2: prosparse exports llama, mistral, qwen2, qwen3"),
        "vocabulary": ([f"model.source={tmp_path / 'small'}"], "set data.tokenizer"),
        "must": (["resume=must"], "resume=must"),
        "path": ([f"resume={tmp_path / 'none'}"], "is no complete checkpoint"),
        "zero": (["+zero.extra.stage=3"], "zero.extra.stage"),
        "extra": (["+zero.extra.foo=1"], "zero.extra: "),
        "positions": (["recipe.batch.context=512"], "recipe.batch.context is 512"),
        "gpu": (["device=cuda"], "device is cuda"),
        "unwritable": (["run_dir=/proc/run"], "run_dir=/proc/run cannot be written"),
    }
    calls = {name: [*tiny_overrides(tiny, tmp_path / name), *overrides] for name, (overrides, _) in cases.items()}
    finished = runs["undisturbed"]
    calls["other"] = [*tiny_overrides(tiny, finished), "recipe.stages.hold.l1.factor=0.1"]
    calls["weights"] = [*tiny_overrides(tiny, finished), "data.sources.files.weight=2"]
    calls["never"] = [*tiny_overrides(tiny, finished), "resume=never"]
    expected = {name: message for name, (_, message) in cases.items()} | {
        "weights": "data.sources weights.files was 1.0 and is now 2.0",
        "other": "recipe.stages.hold.l1.factor was 0.75 and is now 0.1",
        "never": "resume=never",
    }
    before = sorted(finished.rglob("*"))
    for name, message in expected.items():
        group = nursery.run(calls[name], ranks=1, log=tmp_path / f"{name}.log")
        last = group.text().strip().splitlines()[-1]
        assert group.codes == [2] and last.startswith("prosparse train: ") and message in last, (name, group.text())
        assert [path for path in (tmp_path / name).rglob("*") if path.is_file()] == [], name
    assert sorted(finished.rglob("*")) == before
