"""Substitution: every gated FFN, or an error that names what is in the way."""

import pytest
import torch
import torch.nn as nn
from conftest import tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from prosparse.activations import ACTIVATIONS, intermediate
from prosparse.ffn import activation_of, find_ffns, sparse_ffns, substitute

FAMILIES = {
    "llama": {},
    "llama-with-bias": {"mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}


def tiny_family(name: str, **changes):
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition("-")[0], **sizes, **heads, **FAMILIES[name], **changes)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_substitution_keeps_names_and_weights_and_its_silu_the_outputs(family):
    model, ids = tiny_family(family), torch.arange(20)[None]
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(ids).logits
    done = substitute(model, "silu")
    assert (done.layers, done.replaced, done.activation) == (2, "silu", "silu")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(ids).logits, logits)


def test_relu_equals_the_stock_class_with_relu():
    model, stock = tiny_llama(), tiny_llama(hidden_act="relu")
    ids = torch.arange(20)[None]
    substitute(model, "relu")
    assert torch.equal(model(ids).logits, stock(ids).logits)


def test_each_activation_computes_its_formula():
    gate, up = torch.tensor([-1.0, 0.0, 0.05, 0.1, 2.0, 2.0]), torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0, -3.0])
    expected = {
        ("silu", 0.0): gate * torch.sigmoid(gate) * up,
        ("relu", 0.0): torch.tensor([0, 0, 0.15, 0.3, 6, -6]),
        ("fatrelu", 0.1): torch.tensor([0, 0, 0, 0.3, 6, -6]),  # kept at the threshold itself
        ("drelu", 0.0): torch.tensor([0, 0, 0.15, 0.3, 6, 0]),
        ("drelu", 0.1): torch.tensor([0, 0, 0, 0.3, 6, 0]),
        ("shifted_relu", 0.1): torch.tensor([0, 0, 0, 0, 5.7, -5.7]),
        ("relu2", 0.0): torch.tensor([0, 0, 0.0075, 0.03, 12, -12]),
    }
    for (name, param), values in expected.items():
        torch.testing.assert_close(intermediate(name, param, gate, up), values.float(), msg=name)


@pytest.mark.parametrize(("name", "param"), [("fatrelu", 0.01), ("drelu", 0.0), ("drelu", 0.01), ("relu2", 0.0)])
def test_no_gradient_reaches_what_the_activation_cut(name, param):
    gate, up = torch.randn(200, requires_grad=True), torch.randn(200, requires_grad=True)
    x1 = intermediate(name, param, gate, up)
    x1.sum().backward()
    assert gate.grad is not None and torch.equal(gate.grad[x1 == 0], torch.zeros_like(gate.grad[x1 == 0]))
    assert (gate.grad[x1 != 0] != 0).all()


def test_substituting_twice_exchanges_the_activation_and_reports_the_one_before():
    model = tiny_llama()
    substitute(model, "relu")
    done = substitute(model, "fatrelu", 0.5)
    assert (done.replaced, done.replaced_param) == ("relu", 0.0)
    assert {(ffn.activation, ffn.param) for ffn in sparse_ffns(model)} == {("fatrelu", 0.5)}
    assert activation_of(model) == ("fatrelu", 0.5) and len(sparse_ffns(model)) == 3


def test_a_substituted_model_cannot_be_saved_as_if_it_were_the_old_one(tmp_path):
    model = tiny_llama()
    substitute(model, "relu")
    model.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, model.eval()(ids).logits)


def test_a_model_without_gated_ffns_is_an_error_that_names_its_modules():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100))
    with pytest.raises(ValueError, match=r"0 of 2 layers .* GPT2Attention, GPT2MLP, LayerNorm"):
        substitute(model, "relu")


def test_a_model_recognized_in_part_is_an_error_and_stays_as_it_was():
    model = tiny_llama()
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"2 of 3 layers .* LlamaMLP"):
        substitute(model, "relu")
    assert not sparse_ffns(model)


def test_an_unknown_activation_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="choose one of silu"):
        substitute(tiny_llama(), "mish")
    with pytest.raises(ValueError, match="hidden_act is mish"):
        activation_of(tiny_llama(hidden_act="mish"))


def test_ffns_are_found_in_layer_order():
    assert list(find_ffns(tiny_llama())) == [f"model.layers.{i}.mlp" for i in range(3)]
    assert set(ACTIVATIONS) >= {"silu", "relu", "fatrelu", "drelu", "shifted_relu", "relu2"}
