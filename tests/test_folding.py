"""Thresholds by layer or neuron become one threshold in the weights, and the model computes the same."""

from copy import deepcopy

import pytest
import torch
from test_models import TOKEN_IDS, base_model, logits

from prosparse.allocation import fold
from prosparse.ffn import activation_of, put_sparse_ffns, sparse_ffns, substitute


def neuron_thresholds(model, seed: int = 1) -> list[torch.Tensor]:
    """Random thresholds, [neurons] or [experts, neurons] by layer; a few neurons never fire."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for ffn in sparse_ffns(model):
        down = ffn.down_proj if torch.is_tensor(ffn.down_proj) else ffn.down_proj.weight
        at = torch.rand(down.shape[::2] if down.dim() == 3 else down.shape[1:], generator=random) * 0.3 + 1e-3
        made.append(at.where(torch.rand(at.shape, generator=random) > 0.1, torch.inf))
    return made


def cut(ffn, at: torch.Tensor, activation: str, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    """The FFN with one threshold a neuron, in plain torch."""

    def x1(gate, up, at):
        return torch.where(gate >= at, gate, 0.0) * (up.relu() if activation == "drelu" else up)

    if not routing:
        if hasattr(ffn, "gate_proj"):
            return ffn.down_proj(x1(ffn.gate_proj(hidden), ffn.up_proj(hidden), at))
        return ffn.down_proj(x1(*ffn.gate_up_proj(hidden).chunk(2, -1), at))
    out = torch.zeros_like(hidden)
    for token, (experts, weights) in enumerate(zip(*routing, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (ffn.gate_up_proj[expert] @ hidden[token]).chunk(2)
            out[token] += weight * (ffn.down_proj[expert] @ x1(gate, up, at[expert]))
    return out


@pytest.mark.parametrize("activation", ["relu", "fatrelu", "drelu"])
@pytest.mark.parametrize("base", ["llama", "llama_biased", "minicpm", "phi3", "mixtral"])
def test_folding_neuron_thresholds_leaves_the_logits(base, activation):
    model = base_model(base)
    substitute(model, activation, 0.0)
    apart, thresholds = deepcopy(model), neuron_thresholds(model)
    for ffn, at in zip(sparse_ffns(apart), thresholds, strict=True):
        ffn.forward = lambda *given, ffn=ffn, at=at: cut(ffn, at, activation, *given)
    with torch.no_grad():
        expected = logits(apart)
    assert (logits(model) - expected).abs().max() > 1e-2 * expected.abs().max()  # the thresholds matter
    told = fold(model, thresholds, token_ids=TOKEN_IDS)
    seen = logits(model)
    assert (seen - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert told.difference_fp32 <= 1e-5 and told.difference > told.difference_fp32 and told.dtype == "bfloat16"
    assert activation_of(model) == ("drelu" if activation == "drelu" else "fatrelu", told.threshold)
    assert told.silenced == sum(int(at.isinf().sum()) for at in thresholds) > 0
    assert told.smallest_factor < 1 < told.largest_factor


def test_neurons_that_never_fire_have_rows_of_zeros_and_layers_may_share_a_threshold():
    model = base_model("llama")
    substitute(model, "relu")
    at = torch.full((64,), 0.125)
    at[3] = torch.inf
    before = model.model.layers[0].mlp.gate_proj.weight.clone()
    told = fold(model, [at, 0.25], 0.125, token_ids=TOKEN_IDS)
    first, second = (layer.mlp for layer in model.model.layers)
    assert not first.gate_proj.weight[3].any() and not first.up_proj.weight[3].any()
    assert torch.equal(first.gate_proj.weight[4], before[4])
    assert (told.threshold, told.silenced, told.smallest_factor, told.largest_factor) == (0.125, 1, 0.5, 1.0)
    assert {ffn.param for ffn in (first, second)} == {0.125}


@pytest.mark.parametrize(
    ("base", "activation", "thresholds", "threshold", "message"),
    [
        ("opt", "relu", [0.1, 0.1], None, "OPTForCausalLM has no up projection"),
        ("llama", "relu2", [0.1, 0.1], None, "activation is relu2"),
        ("llama", "relu", [0.1], None, "1 thresholds for 2 layers"),
        ("llama", "relu", [0.1, 0.0], None, "layer 1 has a threshold of 0: thresholds fold from 0.0001 on"),
        ("llama", "relu", [0.1, torch.nan], None, "layer 1 has a threshold of nan"),
        ("llama", "relu", [torch.ones(3), 0.1], None, r"layer 0: thresholds of shape \[3\] for neurons \[64\]"),
        ("llama", "relu", [torch.inf, torch.inf], None, "every neuron's threshold is infinite"),
        ("llama", "relu", [0.1, 0.1], 0.0, "a finite one above 0"),
    ],
)
def test_what_does_not_fold_is_refused_and_stays(base, activation, thresholds, threshold, message):
    model = base_model(base)
    substitute(model, activation)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        fold(model, thresholds, threshold, token_ids=TOKEN_IDS)
    assert torch.equal(logits(model), before) and activation_of(model) == (activation, 0.0)


def test_a_refusal_leaves_a_threshold_that_is_no_bf16_number():
    model = base_model("llama")
    put_sparse_ffns(model, "fatrelu", 0.01)  # as a public release is opened
    config = model.config.to_dict()
    with pytest.raises(ValueError, match="every neuron's threshold is infinite"):
        fold(model, [torch.inf, torch.inf], token_ids=TOKEN_IDS)
    assert activation_of(model) == ("fatrelu", 0.01) and model.config.to_dict() == config


def test_thresholds_fold_into_fp32_weights_only():
    model = base_model("llama").to(torch.bfloat16)
    substitute(model, "relu")
    with pytest.raises(ValueError, match="load the model with dtype float32"):
        fold(model, [0.1, 0.1], token_ids=TOKEN_IDS)
