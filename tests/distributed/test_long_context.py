"""Rows that ranks share: the same run as without, through every phase; and what cannot be shared is refused by name."""

import pytest
import torch
from conftest import make_tiny, metrics, tiny_llama, tiny_overrides, trained
from transformers import OPTConfig, OPTForCausalLM

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
    assert [(row["kind"], row["step"], row.get("model")) for row in ours] == [
        (row["kind"], row["step"], row.get("model")) for row in theirs
    ]
    for row, wanted in zip(ours, theirs, strict=True):
        for key in ("perplexity", "sparsity", "tokens", "threshold"):
            assert row.get(key) == pytest.approx(wanted.get(key), rel=2e-3), (key, row, wanted)


def test_a_run_whose_rows_are_shared_is_the_plain_run_from_the_base_model_to_the_export(go):
    text = go("shared", SHARED, *SHIFT)
    assert "micro_batch 1 x 1 groups of 2 ranks x accumulation 4" in text
    assert_equal(go, "shared")


def test_a_checkpoint_goes_on_with_another_way_to_share_rows(go):
    go("changed", SHARED, "zero=zero3", "until=substitution")
    go("changed", "until=rise")
    go("changed", SHARED, "checkpointing=non_reentrant", *SHIFT)
    assert_equal(go, "changed")


def test_four_ranks_are_two_groups_and_fewer_key_heads_than_ranks_are_repeated(go, tmp_path):
    base = make_tiny(tmp_path, tiny_llama(num_key_value_heads=1))
    how = [f"model.source={base['model']}", "until=substitution", "recipe.stages.substitution.distillation.weight=1"]
    go("four", SHARED, *how, ranks=4)
    go("one", *how, ranks=1)
    assert_equal(go, "four", "one")
    assert metrics(go.root / "four")[-1]["kl"] is not None


def test_what_cannot_be_shared_is_refused_in_one_line_before_it_trains(go, tiny, tmp_path):
    torch.manual_seed(0)
    chat = [f"data.sources.files.path={tiny['chat']}", "data.sources.files.messages=messages", "data.template=chatml"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "ffn_dim": 64}
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    opt = make_tiny(tmp_path, OPTForCausalLM(config))["model"]
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for name, model in (("heads", tiny_llama(num_attention_heads=1, num_key_value_heads=1, head_dim=32)),
                        ("rope", tiny_llama(rope_parameters=rope)),
                        ("window", tiny_llama(sliding_window=8))):  # fmt: skip
        (tmp_path / name).mkdir()
        make_tiny(tmp_path / name, model)
    for overrides, words in {
        ("recipe.batch.context=33",): "sequence_parallel is 2, which does not divide a context of 33 tokens",
        ("attention=eager",): "sequence_parallel=2 knows no attention=eager: choose sdpa, flash_attention_2",
        ("speed.compile=layers",): "are not tried together: set speed.compile=none",
        ("sequence_parallel=3", "recipe.batch.context=33"): "sequence_parallel is 3, which does not divide the 2 ranks",
        tuple(chat): "does not keep the documents of a row apart, which chat sources need: choose "
        "attention=flash_attention_2",
        (f"model.source={opt}",): "sequence_parallel=2: opt ",
        (f"model.source={tmp_path / 'heads' / 'model'}",): "does not divide the model's 1 attention heads",
        (f"model.source={tmp_path / 'rope' / 'model'}",): "rotary embeddings (dynamic) depend on the length of the row",
        (f"model.source={tmp_path / 'window' / 'model'}",): "the model attends to 8 tokens only",
    }.items():
        text = go("refused", SHARED, *overrides, code=2)
        lines = [line for line in text.splitlines() if line.startswith("prosparse train: ")]
        assert len(lines) == 1 and words in lines[0] and "Traceback" not in text, text[-3000:]
        assert not list((go.root / "refused").rglob("step-*"))
