"""A stage on conversations after stages on text: two ranks, stops, the chat template on the way out."""

import pytest
import torch
from conftest import make_tiny, metrics, tiny_overrides, trained
from test_resume import assert_bit_equal
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from prosparse.chat import TEMPLATES
from prosparse.config import Template

pytestmark = pytest.mark.timeout(300)
CONTEXT = 64


@pytest.fixture(scope="module")
def go(nursery, tiny, tmp_path_factory):
    """go(name, *overrides): one start of a run whose last stage reads conversations."""
    root = tmp_path_factory.mktemp("sft")
    text = [f"+recipe.stages.{name}.data.files=1" for name in ("substitution", "rise")]
    sft = ["+recipe.stages.hold.data.chat=1", "recipe.stages.hold.reset_optimizer=true"]
    (root / "data").mkdir()
    (root / "data" / "both.yaml").write_text(
        f"# Both.\nsources: {{files: {{path: {tiny['text']}}}, chat: {{path: {tiny['chat']}, messages: messages}}}}\n"
        "template: minicpm\n"
    )
    both = ["--config-dir", str(root), "data=both"]

    def start(name: str, *overrides: str, code: int = 0, **inject) -> str:
        others = ("recipe.batch.context", "data=", "data.sources")
        settings = [override for override in tiny_overrides(tiny, root / name) if not override.startswith(others)]
        settings += [*both, "evaluate.every=0", f"recipe.batch.context={CONTEXT}", *text, *sft]
        group = nursery.run([*settings, *overrides], log=root / f"{name}.log", **inject)
        assert group.codes == [code] * 2, group.text()[-4000:]
        return group.text()

    start.root = root
    start("whole", "save.keep=5")
    return start


def test_a_stage_on_conversations_counts_what_is_not_padding_and_the_model_carries_the_template(go):
    rows = trained(go.root / "whole")
    read = [row["tokens"] - before for row, before in zip(rows, [0, *(row["tokens"] for row in rows)], strict=False)]
    assert read[:7] == [4 * CONTEXT] * 7 and all(2 * CONTEXT < count < 4 * CONTEXT for count in read[7:])
    for folder in (go.root / "whole" / "model", go.root / "whole" / "checkpoints" / "step-00000010" / "skeleton"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ bos_token }}" + TEMPLATES[Template.minicpm]
    assert {row["model"] for row in metrics(go.root / "whole") if "model" in row} >= {"base", "shifted", "exported"}


@pytest.mark.parametrize("kind", ["zero=zero2", pytest.param("zero=zero3", marks=pytest.mark.slow)])
def test_a_run_stopped_before_and_within_the_stage_is_bit_equal(go, kind):
    whole, name = ("whole", "stopped") if kind == "zero=zero2" else (f"whole {kind}", f"stopped {kind}")
    if whole != "whole":
        go(whole, kind, "until=hold")
    go(name, kind, "until=rise")
    go(name, kind, "until=hold", code=1, fail=3)  # in the third window of the stage, after the checkpoint of step 8
    assert "goes on after step 8 of 10" in go(name, kind, "until=hold")
    assert_bit_equal(go.root / name, go.root / whole)


def test_a_model_that_mixes_documents_up_is_refused_before_it_trains(go, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "ffn_dim": 64}
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    other = make_tiny(tmp_path, OPTForCausalLM(config))
    text = go("refused", f"model.source={other['model']}", code=2)
    assert "(opt) with attention=sdpa and micro_batch=1 does not keep the documents of a row apart" in text
    assert text.count("does not keep") == 1 and not list((go.root / "refused").rglob("step-*"))
