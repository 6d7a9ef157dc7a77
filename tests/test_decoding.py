"""Sparse decoding gives what dense decoding gives, in every family it takes, and leaves the model what it was."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from test_families import stock_relu
from test_generation import say, words
from test_models import BASES, base_model
from transformers import AutoModelForCausalLM

import prosparse
from prosparse import decoding
from prosparse.config import Implementation
from prosparse.decoding import TRIED, disable_sparse_decoding, enable_sparse_decoding, sparse_layers
from prosparse.ffn import observing, sparse_ffns, substitute
from prosparse.models.load import load_model

IDS = torch.tensor([[7, 12, 31, 5, 80, 2, 9, 44, 71, 18]])  # a prompt that is too long for the sparse path
OTHERS = {"opt", "gpt_neox", "falcon", "mixtral", "qwen3_moe", "qwen3_moe_mixed"}  # ungated, or experts
GATED = [name for name in BASES if name not in OTHERS]


def relu_model(family: str, activation: str = "relu", param: float = 0.0):
    model = base_model(family)
    substitute(model, activation, param)
    return model


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """How many neurons fired at each call of the down projection's sparse operator."""
    calls: list[int] = []
    original = decoding.sparse_down

    def sparse_down(x1, *rest):
        calls.append(int((x1 != 0).any(0).sum()))
        return original(x1, *rest)

    monkeypatch.setattr(decoding, "sparse_down", sparse_down)
    return calls


@torch.no_grad()
def decode(model, ids: torch.Tensor, steps: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and the logits that they come from, with a cache."""
    out = model.generate(
        ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True, pad_token_id=0,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("implementation", ["cpp", "eager"])
@pytest.mark.parametrize(("activation", "param"), [("relu", 0.0), ("fatrelu", 0.25), ("drelu", 0.0), ("drelu", 0.25)])
@pytest.mark.parametrize("family", GATED)
def test_tokens_and_logits_are_those_of_dense_decoding(family, activation, param, implementation, taken):
    model = relu_model(family, activation, param)
    expected, logits = decode(model, IDS.repeat(3, 1))
    assert enable_sparse_decoding(model, implementation) is Implementation(implementation)
    found, sparse = decode(model, IDS.repeat(3, 1))
    torch.testing.assert_close(sparse, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, expected)
    assert len(taken) == 2 * 7 and 0 < max(taken) < 64  # layers x steps after the prompt's


def test_a_stock_model_with_relu_takes_it_and_gets_its_own_modules_back(taken):
    model = stock_relu("llama")
    modules, expected = list(model.modules()), decode(model, IDS)[0]
    enable_sparse_decoding(model)
    assert torch.equal(decode(model, IDS)[0], expected) and taken and sparse_layers(model) == [True, True]
    disable_sparse_decoding(model)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert torch.equal(decode(model, IDS)[0], expected) and len(taken) == 2 * 7


@pytest.mark.parametrize("family", ["llama", "phi3", "minicpm"])
def test_disabling_restores_the_model_bit_for_bit(family):
    model = relu_model(family)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    expected = decode(model, IDS)[1]
    enable_sparse_decoding(model)
    disable_sparse_decoding(model)
    disable_sparse_decoding(model)  # twice is once
    assert torch.equal(decode(model, IDS)[1], expected) and sparse_layers(model) == [False, False]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1]
    assert not any({"forward", "decoding"} & set(vars(module)) for module in model.modules())


def test_an_enabled_model_is_saved_copied_and_enabled_again(tmp_path, taken):
    model = stock_relu("llama")
    state, expected = deepcopy(model.state_dict()), decode(model, IDS)
    enable_sparse_decoding(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    copy = deepcopy(model)
    with torch.no_grad():
        copy.model.layers[0].mlp.down_proj.weight.zero_()
    assert torch.equal(decode(model, IDS)[0], expected[0]) and not torch.equal(decode(copy, IDS)[1], expected[1])
    enable_sparse_decoding(model)
    model.load_state_dict(state)
    assert torch.equal(decode(model, IDS)[0], expected[0])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_every_model_that_prosparse_opens_has_the_method_and_so_has_its_copy(tmp_path, taken):
    stock_relu("llama").save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=torch.float32)
    expected = decode(model, IDS)[0]
    copy = deepcopy(model)
    torch.save(model, tmp_path / "whole.pt")
    pickled = torch.load(tmp_path / "whole.pt", weights_only=False)
    for one in (copy, pickled):
        assert one.enable_sparse_decoding("eager") is Implementation.eager
        assert torch.equal(decode(one, IDS)[0], expected) and sparse_layers(one) == [True, True]
    assert sparse_layers(model) == [] and len(taken) == 2 * 2 * 7
    assert prosparse.enable_sparse_decoding is enable_sparse_decoding


def test_prefill_large_batches_gradients_and_autocast_are_dense(taken):
    model = relu_model("llama")
    enable_sparse_decoding(model, "eager")
    with torch.no_grad():
        model(IDS.repeat(1, 2))
        model(IDS[:, :1].repeat(9, 1))
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS[:, :1])
    assert taken == []
    model(IDS[:, :1]).logits.sum().backward()
    assert taken == [] and all(ffn.down_proj.weight.grad is not None for ffn in sparse_ffns(model))
    with torch.no_grad():
        model(IDS[:, :1].repeat(8, 1))
    assert len(taken) == 2


def test_observers_see_the_intermediate_and_what_they_put_in_its_place_goes_on(taken):
    model = relu_model("llama")
    seen: dict[str, list] = {"dense": [], "sparse": []}

    def see(layer, x1, name):
        seen[name].append(x1)
        return x1 * 0.5

    outs = []
    for name in seen:
        with observing(model, partial(see, name=name)), torch.no_grad():
            outs.append(model(IDS[:, :3]).logits)
        enable_sparse_decoding(model)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen["sparse"], seen["dense"], rtol=1e-4, atol=1e-4)
    assert seen["sparse"][0].shape == (1, 3, 64) and len(taken) == 2


def test_generation_reports_the_same_text_and_sparsity(taken):
    dense = say(relu_model("llama"), words())
    model = relu_model("llama")
    enable_sparse_decoding(model)
    sparse = say(model, words())
    assert sparse.answer == dense.answer and sparse.sparsity_by_layer == dense.sparsity_by_layer
    assert taken and sparse.sparsity_prefill == dense.sparsity_prefill


@pytest.mark.parametrize(("break_even", "on"), [(0.2, True), (0.9, False)])
def test_a_layer_below_the_break_even_is_dense_after_its_first_steps(break_even, on, taken):
    model = relu_model("llama")
    expected = decode(model, IDS, TRIED + 6)[0]
    enable_sparse_decoding(model, break_even=break_even)
    assert torch.equal(decode(model, IDS, TRIED + 6)[0], expected)
    assert sparse_layers(model) == [on, on]
    assert len(taken) == 2 * (TRIED + 5 if on else TRIED)
    assert model.model.layers[0].mlp.down_proj.weight.is_contiguous() != on
    disable_sparse_decoding(model)
    assert torch.equal(decode(model, IDS, TRIED + 6)[0], expected)


@pytest.mark.parametrize(("implementation", "on"), [("cpp", True), ("eager", False)])
def test_the_break_even_is_that_of_the_implementation(implementation, on):
    model = relu_model("llama")  # of whose neurons half are cut
    enable_sparse_decoding(model, implementation)
    decode(model, IDS, TRIED + 1)
    assert sparse_layers(model) == [on, on]


def test_hooks_of_the_down_projection_run(taken):
    model, heard = relu_model("llama"), []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, inputs, output: heard.append(inputs[0]))
    enable_sparse_decoding(model)
    decode(model, IDS)
    assert len(heard) == 8 and heard[-1].shape == (1, 1, 64)


def hooked(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


def quantized(model):
    class Packed(torch.nn.Linear): ...

    model.model.layers[0].mlp.gate_proj.__class__ = Packed
    return model


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: base_model("llama"), "the activation is silu, which leaves no zeros: substitute one of relu, fatrelu"),
        (lambda: relu_model("llama", "shifted_relu", 0.1), "the activation is shifted_relu"),
        (lambda: stock_relu("opt"), r"activation_fn is a UngatedFFN: sparse decoding needs FFNs with gate and up"),
        (lambda: stock_relu("mixtral"), r"mlp.experts is a ExpertsFFN: .*\(no experts\)"),
        (lambda: hooked(stock_relu("llama")), r"layers.1.mlp.up_proj has hooks, which sparse decoding would pass by"),
        (lambda: quantized(stock_relu("llama")), r"layers.0.mlp.gate_proj is a Packed, not a plain linear layer"),
        (lambda: stock_relu("llama").double(), r"is in torch.float64: load the model in fp32, bf16 or fp16"),
    ],
)
def test_what_it_cannot_take_is_named_and_left_as_it_was(build, said):
    model = build()
    modules = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=said):
        enable_sparse_decoding(model)
    assert [type(m) for m in model.modules()] == modules


def test_a_break_even_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match="break_even is 89: give a share of neurons, 0 to 1"):
        enable_sparse_decoding(relu_model("llama"), break_even=89)
