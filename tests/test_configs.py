"""Every shipped config composes; every mistake is one line that names the key."""

import subprocess
import sys
from pathlib import Path

import pytest

from prosparse import cli
from prosparse.cli import compose, main

CONFIGS = Path(__file__).parents[1] / "configs"
NEEDED = ["run_dir=x", "model.source=x", "data.sources.files.path=x"]


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("experiment", choices("experiment"))
@pytest.mark.parametrize("verb", ["train", "prepare", "plan"])
def test_every_experiment_composes(verb, experiment):
    own_text = "override /data: files" in (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()
    own = ["gpus=8"] if verb == "plan" else ["data.sources.files.path=x"] * own_text
    compose(verb, [f"experiment={experiment}", "run_dir=x", *own])


@pytest.mark.parametrize(
    ("group", "choice"),
    [(g, c) for g in ("model", "recipe", "data", "zero", "guard", "tracking") for c in choices(g)]
    + [
        (f"{g}@recipe.{g}", c)
        for g in ("activation", "shift")
        for c in choices(g)
        if c not in ("silu", "relu2", "shifted_relu")
    ]
    + [("stage@recipe.stages.rise", c) for c in choices("stage")],
)
def test_every_choice_of_every_group_composes(group, choice):
    needed = {
        "hf": ["model.source=x"],
        "files": ["data.sources.files.path=x"],
        "target": ["recipe.stages.rise.l1.sparsity=0.8", "recipe.stages.rise.l1.factor=0"] * group.startswith("stage"),
        "prosparse_1b": ["data=minicpm"],
        "turbosparse": ["data.sources.wanjuan_cc.path=x"],
        "minicpm": ["recipe=prosparse_1b"],
    }.get(choice, [])
    compose("train", ["run_dir=x", f"{group}={choice}", *needed])


@pytest.mark.parametrize("activation", ["silu", "relu2", "shifted_relu"])
def test_an_activation_without_a_threshold_composes_without_a_shift_and_is_refused_with_one(activation):
    compose("train", ["run_dir=x", f"activation@recipe.activation={activation}", "shift@recipe.shift=none"])
    with pytest.raises(ValueError, match="recipe.shift needs relu"):
        compose("train", ["run_dir=x", f"activation@recipe.activation={activation}"])


def test_every_config_file_says_what_it_is():
    for path in CONFIGS.rglob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# "), path


BAD = [
    ("recipe.stages.rize.steps=3", "recipe.stages.rize"),
    ("recipe.stages.rise.steps=x", "recipe.stages.rise.steps"),
    ("recipe.stages.rise.steps=0", "recipe.stages.rise.steps is 0"),
    ("recipe.stages.rise.l1.factor=-1", "recipe.stages.rise.l1.factor"),
    ("recipe=nope", "Available options in 'recipe': bamboo_7b"),
    ("+foo=1", "foo: no such key"),
    ("+recipe.stages.rise.foo=1", "recipe.stages.rise.foo: no such key"),
    ("dtype=fp8", "expected one of"),
    ("micro_batch=0", "micro_batch is 0"),
    ("zero.stage=0", "zero.stage is 0"),
    ("zero.offload_weights=true", "zero.offload_weights moves the weights of ZeRO-3, and zero.stage is 2"),
    ("zero.offload=nvme", "zero.offload is nvme and zero.offload_path is None: nvme needs a folder on a local disk"),
    (("zero.offload=cpu", "zero.offload_path=x"), "zero.offload is cpu and zero.offload_path is x: nvme needs"),
    (("zero.offload=nvme", "zero.offload_path=x"), "zero.offload=nvme swaps under ZeRO-3, and zero.stage is 2"),
    (
        ("zero=zero3", "zero.offload=nvme", "zero.offload_path=x", "save.asynchronous=true"),
        "save.asynchronous copies to host memory what zero.offload=nvme keeps out of it",
    ),
    ("sequence_parallel=0", "sequence_parallel is 0"),
    ("sequence_parallel=3", "sequence_parallel is 3, which does not divide a context of 256 tokens"),
    (("sequence_parallel=2", "attention=eager"), "sequence_parallel=2 knows no attention=eager: choose sdpa, flash"),
    (("sequence_parallel=2", "speed.compile=layers"), "sequence_parallel=2 and speed.compile=layers are not tried"),
    ("save.keep=1", "save.keep is 1"),
    ("until=nope", "until=nope"),
    ("recipe.lr.schedule=wsd", "recipe.lr.decay_steps"),
    ("recipe.penalty.unit=sum_1e8", "recipe.penalty.micro_batch_sequences"),
    ("recipe.shift.threshold=0.1", "recipe.shift.threshold and recipe.shift.budget"),
    ("recipe.activation.threshold=0.1", "recipe.activation.threshold"),
    ("recipe.stages.rise.l1.sparsity=0.8", "recipe.stages.rise.l1.sparsity is 0.8 and recipe.stages.rise.l1.shape"),
    (
        "stage@recipe.stages.rise=target",
        "recipe.stages.rise.l1.sparsity is None and recipe.stages.rise.l1.shape is target",
    ),
    ("recipe.stages.rise.lr.peak=-1", "recipe.stages.rise.lr.peak is -1"),
    ("recipe.stages.rise.lr.schedule=wsd", "recipe.stages.rise.lr.decay_steps"),
    ("recipe.stages.rise.weight_decay=-1", "recipe.stages.rise.weight_decay"),
    ("recipe.optimizer.betas=[2,0.9]", "recipe.optimizer.betas"),
    ("attention=foo", "attention is foo"),
    ("data.held_out=0", "data.held_out"),
    ("data.sources.stdlib.weight=0", "data.sources.stdlib.weight"),
    ("data.sources.stdlib.prompt=q", "data.sources.stdlib.prompt and .answer belong together"),
    ("data.sources.stdlib={path: x, messages: m, prompt: q, answer: a}", "data.sources.stdlib.messages and .prompt"),
    ("data=minicpm", "recipe.stages.substitution.data is empty, so the stage would mix all of data.sources, and conv"),
    ("data.template=llama", "data.template"),
    ("+recipe.stages.rise.data.wiki=1", "recipe.stages.rise.data.wiki: no such source"),
]


def test_stages_that_name_no_data_may_read_conversations_if_there_is_nothing_else():
    chats = "data.sources.stdlib={path: x.jsonl, messages: m}"
    assert compose("train", ["experiment=demo", chats]).data.sources["stdlib"].messages == "m"


@pytest.mark.parametrize(("override", "message"), BAD)
def test_a_mistake_is_one_line_that_names_the_key_and_exit_code_2(override, message, capsys):
    assert main(["train", "experiment=demo", *([override] if isinstance(override, str) else override)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("prosparse train: ")


def test_a_missing_value_is_named(capsys):
    assert main(["train", "experiment=llama2_7b"]) == 2
    assert "run_dir" in (error := capsys.readouterr().err) and "data.sources.files.path" in error


def test_no_such_verb_lists_the_verbs(capsys):
    assert main(["tarin"]) == 2
    assert "train" in capsys.readouterr().err


def test_paths_with_equal_signs_and_spaces_are_taken_as_they_are():
    config = compose("train", ["experiment=demo", "run_dir=/tmp/a=b, c d/{x}", "data.cache=it's"])
    assert config.run_dir == "/tmp/a=b, c d/{x}" and config.data.cache == "it's"
    distilling = ["recipe.stages.rise.distillation.weight=1", "teacher=/tmp/a=b c", "fork=/tmp/a=b c@rise"]
    config = compose("train", ["experiment=demo", *distilling])
    assert (config.teacher, config.fork) == ("/tmp/a=b c", "/tmp/a=b c@rise")
    config = compose("train", ["experiment=demo", "run_dir=a\\b c", "data.cache=~/cache\\"])
    assert config.run_dir == "a\\b c" and config.data.cache == "~/cache\\"


def test_experiments_of_ones_own_lie_outside_the_package(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\n# mine\ndefaults:\n  - override /recipe: prosparse_7b\nrun_dir: mine\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    config = compose("train", ["experiment=mine"], config_dir=str(tmp_path))
    assert config.run_dir == "mine" and config.recipe.batch.sequences == 512


def prosparse(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    import os

    command = [sys.executable, "-m", "prosparse.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_cfg_shows_what_would_run_and_writes_nothing(tmp_path):
    done = prosparse("train", "--cfg", "job", "--resolve", "--local_rank=0", "experiment=demo", cwd=tmp_path)
    assert done.returncode == 0 and "factor: 0.75" in done.stdout and list(tmp_path.iterdir()) == []
    bad = prosparse("train", "--cfg", "job", "experiment=demo", "micro_batch=0", cwd=tmp_path)
    assert bad.returncode == 2 and "micro_batch is 0" in bad.stderr


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_cfg_works_for_every_experiment_checks_it_and_names_what_is_missing(experiment, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    assert main(["train", "--cfg", "job", f"experiment={experiment}"]) == 0
    shown = capsys.readouterr()
    assert "micro_batch:" in shown.out and ("run_dir=VALUE" in shown.err) == ("run_dir: ???" in shown.out)
    assert main(["train", "--cfg", "job", f"experiment={experiment}", "micro_batch=0"]) == 2
    assert "micro_batch is 0" in capsys.readouterr().err


def test_cfg_says_what_keeps_it_from_checking(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    assert main(["train", "--cfg", "job", "experiment=demo", "recipe.stages.rise.steps=???"]) == 0
    told = "prosparse train: to run, give recipe.stages.rise.steps=VALUE; nothing was checked without them\n"
    assert capsys.readouterr().err == told


def test_a_source_that_is_missing_names_the_data_groups_that_have_it():
    with pytest.raises(ValueError, match=r"has stdlib: add it there, choose data=minicpm, or change the stage's data"):
        compose("train", ["run_dir=x", "recipe=prosparse_1b"])


def test_multirun_runs_every_combination_checks_them_first_and_writes_nothing(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(cli.RUN, "train", lambda config: seen.append((config.seed, config.run_dir)) or {})
    assert main(["train", "-m", "experiment=demo", "seed=1,2", "run_dir=a,b"]) == 0
    assert seen == [(1, "a,b"), (2, "a,b")]  # a path is taken as it is
    assert main(["train", "-m", "experiment=demo", "micro_batch=1,0"]) == 2
    assert len(seen) == 2 and "micro_batch is 0" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_multirun_under_a_launcher_is_refused(tmp_path):
    done = prosparse("train", "-m", "experiment=demo", "seed=1,2", cwd=tmp_path, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2 and "--multirun" in done.stderr and list(tmp_path.iterdir()) == []


def test_sources_are_added_and_parts_of_data_sets_named_on_the_command_line():
    given = ["experiment=study", "run_dir=x", "data.sources.files.path=hub://a/b", "data.sources.files.split=train[:9]"]
    sources = compose("train", [*given, "data.sources={more: {path: y, weight: 2}}"]).data.sources
    assert (sources["files"].split, sources["more"].path, sources["more"].weight) == ("train[:9]", "y", 2.0)
    read = compose("measure", ["checkpoint=x", "text=hub://a/b", "config=sample-10BT", "split=train[:1%]"])
    assert (read.config, read.split) == ("sample-10BT", "train[:1%]")
