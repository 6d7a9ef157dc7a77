"""Stages that distill, on two ranks: stopped and resumed, forked, refused."""

import json
from pathlib import Path

import pytest
from conftest import make_tiny, metrics, tiny_llama, tiny_overrides
from test_resume import assert_bit_equal

pytestmark = pytest.mark.timeout(600)
TAUGHT = ["recipe.stages.rise.distillation.weight=1", "recipe.stages.hold.distillation={weight: 0.5, temperature: 2}"]


@pytest.fixture(scope="module")
def go(nursery, tmp_path_factory):
    """go(name, *overrides, ranks=2): one start of the run of that name, up to the end of its stages."""
    root = tmp_path_factory.mktemp("distillation")
    base = make_tiny(root, tiny_llama(initializer_range=0.3))  # to which ReLU does harm
    other = make_tiny(tmp_path_factory.mktemp("other"), tiny_llama(hidden_size=16, intermediate_size=24))

    def start(name: str, *overrides: str, ranks: int = 2, code: int = 0) -> str:
        own = [*tiny_overrides(base, root / name), "evaluate.every=0", "until=hold", *overrides]
        group = nursery.run(own, ranks=ranks, log=root / f"{name}.log")
        assert group.codes == [code] * ranks, group.text()[-4000:]
        return group.text()

    start.root, start.base, start.other = root, base, other
    return start


def kl(run_dir: Path) -> list[float | None]:
    return [row["kl"] for row in metrics(run_dir) if row["kind"] == "train"]


@pytest.mark.parametrize("zero", ["zero3", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_run_that_distills_is_bit_equal_after_stops(go, zero):
    how = [*TAUGHT, f"zero={zero}"]
    text = go(f"whole {zero}", *how)
    assert "teacher  the base model\n" in text and "  KL x 0.5 at temperature 2\n" in text
    go(f"stopped {zero}", *how, "until=rise")
    go(f"stopped {zero}", *how)
    one, other = go.root / f"whole {zero}", go.root / f"stopped {zero}"
    assert_bit_equal(one, other)
    assert kl(one) == kl(other) and kl(one)[:3] == [None] * 3 and all(value > 0 for value in kl(one)[3:])


@pytest.mark.slow
def test_a_parameter_offload_is_the_teachers_too(go):
    go("whole zero3", *TAUGHT, "zero=zero3")
    go("offloaded", *TAUGHT, "zero=zero3", "zero.offload_weights=true")
    assert kl(go.root / "offloaded")[3:] == pytest.approx(kl(go.root / "whole zero3")[3:], rel=1e-3)


def test_the_student_comes_closer_to_its_teacher(go):
    more = ["recipe.stages.substitution.steps=40", "recipe.batch.sequences=16", "micro_batch=8", "until=substitution"]
    go("taught", *more, "recipe.stages.substitution.distillation.weight=100", ranks=1)
    values = kl(go.root / "taught")
    assert values[0] > 0.1 and sum(values[-5:]) < 0.75 * sum(values[:5]), values


@pytest.mark.slow
def test_a_control_keeps_its_teacher_which_is_the_untouched_base_model(go):
    taught = ["recipe.stages.substitution.distillation.weight=1", "until=substitution"]
    go("control", *taught, "recipe.control=silu_continued", ranks=1)
    values = kl(go.root / "control")
    assert abs(values[0]) < 1e-6 < values[1], values  # the student has not moved before its first step


def test_a_fork_may_begin_to_distill_and_a_resume_may_not_change_its_teacher(go):
    go("parent", "until=substitution")
    go("child", f"fork={go.root / 'parent'}@substitution", *TAUGHT, f"teacher={go.other['model']}")
    assert kl(go.root / "child")[:3] == [None] * 3 and kl(go.root / "child")[3] > 0.1
    text = go("child", *TAUGHT, ranks=1, code=2)
    assert f"teacher was {go.other['model']} and is now None" in text.splitlines()[-1]
    text = go("refused", f"fork={go.root / 'child'}@rise", ranks=1, code=2)
    assert "recipe.stages.rise.distillation was" in text.splitlines()[-1]


def test_a_teacher_with_another_vocabulary_is_refused_in_one_line(go, tmp_path):
    for folder in ("larger", "retokenized"):
        (tmp_path / folder).mkdir()
    larger = make_tiny(tmp_path / "larger", vocab_size=301)["model"]
    retokenized = make_tiny(tmp_path / "retokenized")["model"]
    tokenizer = json.loads((retokenized / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (retokenized / "tokenizer.json").write_text(json.dumps(tokenizer))
    for teacher, words in {
        larger: f"teacher={larger} has 301 tokens, but {go.base['model']} has 300: choose a teacher with",
        retokenized: f"teacher={retokenized} has another tokenizer than {go.base['model']}: choose a teacher with",
    }.items():
        text = go("refused", *TAUGHT, f"teacher={teacher}", code=2)
        lines = [line for line in text.splitlines() if line.startswith("prosparse train: ")]
        assert len(lines) == 1 and words in lines[0] and "Traceback" not in text
        assert not list((go.root / "refused").rglob("*.jsonl")) and not list((go.root / "refused").rglob("step-*"))
