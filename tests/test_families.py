"""Every model family: substitution, the penalty's gradient, the measured sparsity, against plain torch."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from test_models import BASES, TOKEN_IDS, base_model, logits
from transformers import AutoModelForCausalLM

from prosparse import engine
from prosparse.cli import compose
from prosparse.ffn import activation_key, activation_of, by_expert, neurons, set_penalty, sparse_ffns, substitute
from prosparse.penalty import COUNT, MAGNITUDE, NONZERO, PenaltyContext, new_statistics
from prosparse.sparsity import measure
from prosparse.telemetry import _idle
from prosparse.ulysses import no_sharing

DOWN = ("down_proj", "fc2", "dense_4h_to_h")  # the modules that the intermediate enters
FACTOR = 0.7


def stock_relu(family: str):
    """The family's own class with ReLU, and the random weights of `base_model`."""
    config = deepcopy(BASES[family])
    setattr(config, activation_key(config), "relu")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(base_model(family).state_dict())
    return model


def listen(model) -> list[torch.Tensor]:
    """The list that a stock model's intermediates go to, each [batch x context, neurons]."""
    heard: list[torch.Tensor] = []
    hear: Callable = lambda module, inputs: heard.append(inputs[0].flatten(0, -2))  # noqa: E731

    def hear_experts(experts, inputs) -> None:
        hidden, index, _ = inputs
        gate, up = torch.einsum("th,tkgh->tkg", hidden, experts.gate_up_proj[index]).chunk(2, -1)
        heard.append((F.relu(gate) * up).flatten(0, 1))

    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts":
            module.register_forward_pre_hook(hear_experts)
        if name.rpartition(".")[2] in DOWN:
            module.register_forward_pre_hook(hear)
    return heard


@pytest.mark.parametrize("family", BASES)
def test_the_base_activation_changes_nothing_and_relu_is_the_stock_class_with_relu(family):
    model = base_model(family)
    names, before = list(model.state_dict()), logits(model)
    substitute(model, *activation_of(model))
    torch.testing.assert_close(logits(model), before)
    assert list(model.state_dict()) == names and len(sparse_ffns(model)) == 2
    substitute(model, "relu")
    torch.testing.assert_close(logits(model), logits(stock_relu(family)))


@pytest.mark.parametrize("family", BASES)
def test_the_injected_gradient_is_that_of_the_loss_written_out(family):
    ids = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False

    def language_loss(model) -> torch.Tensor:
        return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    plain = stock_relu(family).double()
    if hasattr(plain.config, "num_experts_per_tok"):
        plain.set_experts_implementation("eager")  # the other one takes no fp64
    heard = listen(plain)
    loss = language_loss(plain)
    kept = [x1[mask.flatten().repeat_interleave(len(x1) // mask.numel())] for x1 in heard]
    (loss + FACTOR * sum(x1.abs().mean() for x1 in kept)).backward()
    expected = dict(plain.named_parameters())

    model = base_model(family)
    substitute(model, "relu")
    context = PenaltyContext(torch.tensor(FACTOR / mask.sum().item()), new_statistics(2), mask)
    set_penalty(model, context)
    language_loss(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        wanted = expected[name].grad
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, name
    written_out = [[x1.abs().sum().item(), (x1 != 0).sum().item(), x1.numel()] for x1 in kept]
    torch.testing.assert_close(context.statistics, torch.tensor(written_out, dtype=torch.float64), rtol=1e-5, atol=0)
    assert (context.statistics[:, COUNT] == mask.sum() * neurons(model.config)).all()
    assert (context.statistics[:, MAGNITUDE] > 0).all()
    assert (context.statistics[:, NONZERO] < context.statistics[:, COUNT]).all()


@pytest.mark.parametrize("substituted", [False, True])
@pytest.mark.parametrize("family", BASES)
def test_measured_sparsity_is_the_share_of_zeros_in_what_enters_the_down_projection(family, substituted):
    plain = stock_relu(family)
    heard = listen(plain)
    logits(plain)
    expected = [(x1 == 0).double().mean().item() for x1 in heard]
    model = base_model(family) if substituted else stock_relu(family)
    if substituted:
        substitute(model, "relu")
    types = [type(module) for module in model.modules()]
    result = measure(model, TOKEN_IDS.numpy())
    assert result.sparsity_by_layer == pytest.approx(expected, abs=1e-6) and 0.1 < result.sparsity < 0.9
    assert [type(module) for module in model.modules()] == types


APART = sorted(BASES.keys() - {"opt", "falcon"})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", BASES)
def test_documents_of_a_row_are_kept_apart_or_the_model_is_refused_for_chats(family, attention, monkeypatch):
    monkeypatch.setattr(engine, "on_any_rank", lambda *flags: list(flags))
    model = base_model(family).train()
    model.set_attn_implementation(attention)
    substitute(model, "relu")
    config = compose("train", ["experiment=demo", f"attention={attention}", "micro_batch=2"])
    if family in APART:
        engine.check_packing(model, config, no_sharing())
        return
    with pytest.raises(ValueError, match=f"attention={attention} and micro_batch=2 does not keep the documents of"):
        engine.check_packing(model, config, no_sharing())


def test_a_model_that_is_not_finite_is_not_taken_for_one_that_keeps_documents_apart(monkeypatch):
    monkeypatch.setattr(engine, "on_any_rank", lambda *flags: list(flags))
    model = base_model("llama")
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="does not keep the documents"):
        engine.check_packing(model, compose("train", ["experiment=demo"]), no_sharing())


def test_the_kernel_for_experts_on_a_gpu_computes_what_the_loop_computes():
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(10, 16, generator=generator), torch.randn(4, 8, 16, generator=generator)
    ends = torch.tensor([3, 3, 9, 10], dtype=torch.int32)  # the second expert has no rows
    results = []
    for compute in (by_expert, lambda rows, weights, ends: F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)):
        given = [rows.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = compute(*given, ends)
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in given)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_experts_that_a_token_does_not_visit_cost_no_flops():
    sizes = BASES["mixtral"]  # 2 layers, 2 of 4 experts, gate, up and down each 64 x 32
    assert _idle(base_model("mixtral")) == 2 * 2 * 3 * sizes.intermediate_size * sizes.hidden_size
    assert _idle(base_model("llama")) == 0
