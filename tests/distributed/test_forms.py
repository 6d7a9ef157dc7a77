"""One family of each form through the real trainer under ZeRO-3: stop, resume, shift, export, reload."""

from copy import deepcopy

import pytest
import torch
from conftest import make_tiny, metrics, tiny_overrides, trained
from test_models import BASES, logits
from transformers import AutoModelForCausalLM

from prosparse import checkpoint
from prosparse.ffn import activation_of, sparse_ffns, substitute
from prosparse.models.load import load_model

pytestmark = pytest.mark.timeout(600)
FORMS = {"gemma": "separate", "phi3": "fused", "opt": "ungated", "minicpm": "MiniCPM", "mixtral": "experts"}
STEPS = [
    *("recipe.stages.substitution.steps=2", "recipe.stages.rise.steps=2", "recipe.stages.hold.steps=1"),
    *("recipe.shift.refinements=1", "recipe.shift.calibration_rows=4", "evaluate.rows=4", "zero=zero3"),
]


def tiny_base(family: str):
    """A tiny random model of a family with the 300 tokens of the tiny tokenizer."""
    config = deepcopy(BASES[family])
    config.vocab_size, config.bos_token_id, config.eos_token_id = 300, 0, 1
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    "family", [name if name in FORMS else pytest.param(name, marks=pytest.mark.slow) for name in BASES]
)
def test_a_family_trains_under_zero3_resumes_and_exports_what_it_trained(family, nursery, tmp_path):
    tiny, run = make_tiny(tmp_path, tiny_base(family)), tmp_path / "run"

    def go(*overrides: str) -> str:
        arguments = [*tiny_overrides(tiny, run), *STEPS, *overrides]
        group = nursery.run(arguments, log=tmp_path / "log")
        assert group.codes == [0, 0], group.text()[-4000:]
        return group.text()

    go("until=substitution")
    assert "goes on from" in go()
    rows = trained(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[-1]["l1"] > 0
    assert all(0.1 < sparsity < 0.9 for sparsity in rows[-1]["sparsity_by_layer"])
    exported, shown = load_model(run / "model", dtype=torch.bfloat16), checkpoint.find(run)
    last = load_model(str(shown), dtype=torch.bfloat16)
    assert len(sparse_ffns(last)) == 2
    activation, param = activation_of(exported)
    assert activation == "fatrelu" and param > 0
    substitute(last, activation, param)
    assert torch.equal(logits(exported), logits(last))
    measured = {row["model"]: row for row in metrics(run) if row["kind"] == "evaluation"}
    assert measured["exported"]["perplexity"] == pytest.approx(measured["shifted"]["perplexity"], rel=3e-2)
