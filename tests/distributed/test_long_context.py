"""Rows that ranks share: the same run as without, through every phase; and what cannot be shared is refused by name."""

import re

import pytest
import torch
from conftest import make_tiny, metrics, tiny_llama, tiny_overrides, trained
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig

from prosparse.ulysses import check_divisible

pytestmark = pytest.mark.timeout(300)
SHARED = "sequence_parallel=2"
SHIFT = ["recipe.shift.granularity=neuron", "recipe.shift.refinements=1"]


@pytest.fixture(scope="module")
def go(nursery, tiny, tmp_path_factory):
    """go(name, *overrides, ranks=2): one start of the run of that name, in fp32."""
    root = tmp_path_factory.mktemp("long")

    def start(name: str, *overrides: str, ranks: int = 2, code: int = 0) -> str:
        own = [*tiny_overrides(tiny, root / name), "evaluate.every=5", "dtype=fp32", *overrides]
        group = nursery.run(own, ranks=ranks, log=root / f"{name}.log")
        assert group.codes == [code] * ranks, group.text()[-4000:]
        return group.text()

    start.root = root
    start("plain", *SHIFT)
    return start


def assert_equal(go, name: str, other: str = "plain") -> None:
    """Two runs to fp32 rounding: every step, every evaluation, the shift."""
    ours, theirs = trained(go.root / name), trained(go.root / other)
    for key in ("step", "window", "tokens", "l1_factor", "lr"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]
    for key in ("loss", "l1", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-4)
    ours, theirs = ([r for r in metrics(go.root / n) if r["kind"] in ("evaluation", "shift")] for n in (name, other))
    for row, wanted in zip(ours, theirs, strict=False):
        assert [row.get(key) for key in ("kind", "step", "model")] == [
            wanted.get(key) for key in ("kind", "step", "model")
        ]
        for key in {"perplexity", "sparsity", "tokens", "threshold"} & set(wanted):
            assert row[key] == pytest.approx(wanted[key], rel=2e-3), (key, row, wanted)


def test_a_run_whose_rows_are_shared_is_the_plain_run_from_the_base_model_to_the_export(go):
    text = go("shared", SHARED, *SHIFT)
    assert "micro_batch 1 x 1 groups of 2 ranks x accumulation 4" in text
    assert_equal(go, "shared")
    kinds = [[row.get("model", row["kind"]) for row in metrics(go.root / n)] for n in ("shared", "plain")]
    assert kinds[0] == kinds[1] and {"trained", "shift", "shifted", "exported"} <= set(kinds[0])


def test_a_checkpoint_goes_on_with_another_way_to_share_rows(go):
    go("changed", SHARED, "zero=zero3", "until=substitution")
    go("changed", "until=rise")
    go("changed", SHARED, "checkpointing=non_reentrant", "until=hold")
    assert_equal(go, "changed")


def test_four_ranks_are_two_groups_and_fewer_key_heads_than_ranks_are_repeated(go, tmp_path):
    base = make_tiny(tmp_path, tiny_llama(num_key_value_heads=1))
    how = [f"model.source={base['model']}", "until=substitution", "recipe.stages.substitution.distillation.weight=1"]
    go("four", SHARED, *how, ranks=4)
    go("one", *how, ranks=1)
    assert_equal(go, "four", "one")
    kl = [[row["kl"] for row in metrics(go.root / name) if row["kind"] == "train"] for name in ("four", "one")]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3, abs=1e-6) and kl[0][-1] > 0


def test_what_cannot_be_shared_is_refused_in_one_line_before_it_trains(go, tiny, tmp_path):
    torch.manual_seed(0)
    chat = [f"data.sources.files.path={tiny['chat']}", "data.sources.files.messages=messages", "data.template=chatml"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    config = FalconConfig(**sizes, bos_token_id=0, eos_token_id=1)
    own_attention = make_tiny(tmp_path, FalconForCausalLM(config))["model"]
    for overrides, words in {
        ("sequence_parallel=4",): "sequence_parallel is 4, which does not divide the 2 ranks: choose 1, 2",
        (*chat, "recipe.batch.context=64"): "choose attention=flash_attention_2 with micro_batch=1, or",
        (f"model.source={own_attention}",): "sequence_parallel=2",
    }.items():
        text = go("refused", SHARED, *overrides, code=2)
        lines = [line for line in text.splitlines() if "prosparse train: " in line]
        assert len(lines) == 1 and words in lines[0] and "Traceback" not in text, text[-3000:]
        assert not list((go.root / "refused").rglob("step-*"))


def test_a_model_whose_attention_cannot_be_divided_is_refused():
    for words, changes in {
        "does not divide the model's 6 attention heads and 2 key heads: choose 1, 2, 6": {"num_attention_heads": 6},
        "rotary embeddings (dynamic) depend on the length": {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}
        },
        "the model attends to 8 tokens only": {"sliding_window": 8},
    }.items():
        config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2)
        check_divisible(config, 4, "sdpa", 64)
        for key, value in changes.items():
            setattr(config, key, value)
        with pytest.raises(ValueError, match=re.escape(words)):
            check_divisible(config, 4, "sdpa", 64)
        check_divisible(config, 1, "sdpa", 64)
