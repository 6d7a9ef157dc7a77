"""The fused FFN in training: its gradients, statistics and memory are those of the formula, eager and in Triton."""

import os
from importlib.util import find_spec

import pytest
import torch
from conftest import tiny_llama
from torch.multiprocessing.reductions import StorageWeakRef

from prosparse.activations import intermediate
from prosparse.ffn import set_penalty, sparse_ffns, substitute
from prosparse.kernels.glu import FUSED, gated, recompute_x1
from prosparse.penalty import PenaltyContext, inject_l1, new_statistics

HERE = ["eager"]
if find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":  # see conftest.py; else tests/gpu does it
    HERE.append("triton")
CASES = [(name, 0.0) for name in FUSED] + [("fatrelu", 0.25), ("drelu", 0.25)]


def tensors(shape=(2, 5, 70), dtype=torch.float64):
    """gate, up and a gradient; some gates are exactly at 0 and at the threshold."""
    torch.manual_seed(0)
    gate, up, gradient = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    gate[..., :3], gate[..., 3:5], up[..., 5] = 0.0, 0.25, 0.0
    return [part.to(dtype) for part in (gate, up, gradient)]


def context(mask=None):
    """A penalty of 50 / 70 neurons on each: bf16 tells its gradients from those without."""
    return PenaltyContext(torch.tensor(50.0), new_statistics(2), mask)


def by_formula(name, param, gate, up, gradient, mask=None, **routing):
    """x1, both gradients and the statistics, by autograd in fp64 from the values given."""
    gate, up = (part.double().clone().requires_grad_() for part in (gate, up))
    told = context(mask)
    x1 = inject_l1(intermediate(name, param, gate, up), told, 1, **routing)
    x1.backward(gradient.double())
    return x1.detach(), gate.grad, up.grad, told.statistics


def by_kernel(implementation, name, param, gate, up, gradient, mask=None, **routing):
    gate, up = (part.clone().requires_grad_() for part in (gate, up))
    told = context(mask)
    x1 = gated(gate, up, name, param, implementation, told, 1, **routing)
    x1.backward(gradient)
    return x1.detach(), gate.grad, up.grad, told.statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "param"), CASES)
@pytest.mark.parametrize("implementation", HERE)
def test_x1_gradients_and_statistics_are_those_of_the_formula(implementation, name, param, dtype):
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    for padding in (None, mask):
        gate, up, gradient = tensors(dtype=dtype)
        expected = by_formula(name, param, gate, up, gradient, padding)
        found = by_kernel(implementation, name, param, gate, up, gradient, padding)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        for ours, theirs in zip(found[:3], expected[:3], strict=True):
            torch.testing.assert_close(ours.double(), theirs, **tolerance)
        assert torch.equal(found[3][:, 1:], expected[3][:, 1:])  # non-zeros and elements exactly
        torch.testing.assert_close(
            found[3][:, 0], expected[3][:, 0], rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=0
        )


@pytest.mark.parametrize(("name", "param"), CASES)
@pytest.mark.skipif("triton" not in HERE, reason="Triton's interpreter is off: tests/gpu has rows of many blocks")
def test_triton_goes_through_all_blocks_of_a_row(monkeypatch, name, param):
    from prosparse.kernels import glu_triton

    monkeypatch.setattr(glu_triton, "BLOCK", 32)
    given = tensors((3, 70), torch.float32)
    for ours, theirs in zip(by_kernel("triton", name, param, *given), by_formula(name, param, *given), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", HERE)
def test_x1_is_bit_equal_to_that_of_the_plain_activation_where_it_is_a_product(implementation):
    rounds = implementation == "eager"  # Triton's interpreter cuts bits off instead
    for name, param in CASES:
        gate, up, _ = tensors(dtype=torch.bfloat16 if rounds else torch.float32)
        x1 = gated(gate, up, name, param, implementation, context(), 0)
        plain = intermediate(name, param, gate, up)
        assert name in ("silu", "swish") or torch.equal(x1, plain), name


@pytest.mark.parametrize("implementation", HERE)
def test_routed_rows_count_by_their_token_and_the_visits_share_the_penalty(implementation):
    gate, up, gradient = tensors((8, 70), torch.float32)
    tokens, mask = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), torch.tensor([[True, True, False, True]])
    routing = {"mask": mask, "tokens": tokens, "visits": 2}
    expected = by_formula("relu", 0.0, gate, up, gradient, **routing)
    found = by_kernel(implementation, "relu", 0.0, gate, up, gradient, **routing)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", HERE)
def test_the_halves_of_a_fused_projection_need_no_copy_before(implementation):
    gate, up, gradient = tensors((4, 70), torch.float32)
    halves = torch.cat([gate, up], -1).requires_grad_()
    x1 = gated(*halves.chunk(2, dim=-1), "relu", 0.0, implementation, told := context(), 1)
    x1.backward(gradient)
    _, d_gate, d_up, statistics = by_formula("relu", 0.0, gate, up, gradient)
    torch.testing.assert_close(halves.grad.double(), torch.cat([d_gate, d_up], -1), rtol=1e-5, atol=1e-6)
    assert torch.equal(told.statistics[:, 1:], statistics[:, 1:])


@pytest.mark.parametrize("implementation", HERE)
def test_a_gate_that_is_no_number_reaches_the_gradient(implementation):
    gate, up, gradient = tensors((4, 70), torch.float32)
    gate[1, 1] = torch.nan
    for name in ("relu", "drelu", "silu"):
        up[1, 1] = 1.0
        _, d_gate, *_ = by_kernel(implementation, name, 0.0, gate, up, gradient)
        x1, *_ = by_formula(name, 0.0, gate, up, gradient)
        assert x1[1, 1].isnan() and d_gate.isfinite().sum() >= d_gate.numel() - 1


# --- in a model -------------------------------------------------------------------------------------------------------


def saved_bytes(model, ids, told, kernel):
    """Bytes of distinct storages that one forward pass keeps for backward, without parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    set_penalty(model, told, kernel)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids).logits.sum().backward()
    return sum(size for size, _ in kept.values())


def x1_lives(model, ids):
    """Whether the memory of each layer's x1 is held after a forward pass whose backward is still to come."""
    storages = []
    note = lambda module, inputs: storages.append(StorageWeakRef(inputs[0].untyped_storage()))  # noqa: E731
    hooks = [ffn.down_proj.register_forward_pre_hook(note) for ffn in sparse_ffns(model)]
    set_penalty(model, PenaltyContext(torch.tensor(0.1), new_statistics(3)), "eager")
    loss = model(ids).logits.sum()
    for hook in hooks:
        hook.remove()
    lives = [not storage.expired() for storage in storages]
    loss.backward()
    return lives


def test_recompute_x1_frees_it_after_the_forward_pass():
    model, ids = tiny_llama(), torch.arange(60).view(2, 30)
    substitute(model, "relu")
    assert x1_lives(model, ids) == [True] * 3
    for ffn in sparse_ffns(model):
        recompute_x1(ffn.down_proj)
    assert x1_lives(model, ids) == [False] * 3


def gradients(model, ids, told, kernel):
    model.zero_grad()
    set_penalty(model, told, kernel)
    model(ids).logits.square().mean().backward()
    set_penalty(model, None)
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["relu", "drelu", "fatrelu", "silu"])
@pytest.mark.parametrize("implementation", HERE)
def test_a_model_has_the_gradients_and_statistics_of_the_plain_penalty(implementation, name):
    model, ids = tiny_llama(), torch.arange(60).view(2, 30)
    substitute(model, name, 0.01 if name == "fatrelu" else 0.0)
    plain = PenaltyContext(torch.tensor(0.1), new_statistics(3))
    expected = gradients(model, ids, plain, None)
    for recompute in (False, True):
        for ffn in sparse_ffns(model):
            vars(ffn.down_proj).pop("forward", None)
            if recompute:
                recompute_x1(ffn.down_proj)
        told = PenaltyContext(torch.tensor(0.1), new_statistics(3))
        for ours, theirs in zip(gradients(model, ids, told, implementation), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(told.statistics, plain.statistics, rtol=1e-6, atol=0)


def test_what_is_kept_for_backward_is_four_tensors_then_three_then_two():
    neurons, tokens, layers = 4096, 60, 3
    model, ids = tiny_llama(intermediate_size=neurons), torch.arange(tokens).view(2, 30)
    one = neurons * tokens * 4 * layers

    def units(name, kernel, recompute=False):
        substitute(model, name)
        for ffn in sparse_ffns(model):
            vars(ffn.down_proj).pop("forward", None)
            if recompute:
                recompute_x1(ffn.down_proj)
        told = None if kernel is None else PenaltyContext(torch.tensor(0.1), new_statistics(3))
        return saved_bytes(model, ids, told, kernel)

    rest = units("relu", "eager") - 3 * one  # attention, norms, logits
    assert 0 < rest < one
    assert units("silu", None) == 4 * one + rest  # eager SwiGLU
    for implementation in HERE:
        for name in ("relu", "silu"):
            assert units(name, implementation) == 3 * one + rest, name
    # x1 itself is not seen by these hooks where recompute_x1 has its own inside them
    assert units("relu", "eager", recompute=True) == 2 * one + rest
