"""The penalty as a gradient (the table over engines is tests/distributed/test_gradients.py)."""

import torch
from conftest import tiny_llama

from prosparse.ffn import set_penalty, sparse_ffns, substitute
from prosparse.penalty import (
    COUNT,
    MAGNITUDE,
    NONZERO,
    PenaltyContext,
    inject_l1,
    mean_abs_by_layer,
    new_statistics,
    sparsity_by_layer,
)


def context(scale: float, layers: int = 1, mask=None) -> PenaltyContext:
    return PenaltyContext(torch.tensor(scale), new_statistics(layers), mask)


def test_backward_adds_the_sign_per_neuron_and_forward_nothing():
    x1 = torch.tensor([[[1.0, -2.0, 0.0, 4.0]]], requires_grad=True)
    out = inject_l1(x1, context(0.8), 0)
    assert torch.equal(out, x1)
    (out * 3).sum().backward()
    torch.testing.assert_close(x1.grad, torch.tensor([[[3.2, 2.8, 3.0, 3.2]]]))


def test_padding_has_neither_penalty_nor_count():
    x1 = torch.ones(1, 2, 4, requires_grad=True)
    c = context(4.0, mask=torch.tensor([[True, False]]))
    inject_l1(x1, c, 0).sum().backward()
    torch.testing.assert_close(x1.grad, torch.tensor([[[2.0] * 4, [1.0] * 4]]))
    assert c.statistics.tolist() == [[4.0, 4.0, 4.0]]


def test_statistics_are_added_in_backward_only():
    c = context(0.0)
    x1 = torch.tensor([[[1.0, -2.0, 0.0, 4.0]]], requires_grad=True)
    with torch.no_grad():
        inject_l1(x1, c, 0)
    out = inject_l1(x1, c, 0)
    assert c.statistics.sum() == 0
    out.sum().backward()
    inject_l1(x1, c, 0).sum().backward()
    assert c.statistics[0, [MAGNITUDE, NONZERO, COUNT]].tolist() == [14.0, 6.0, 8.0]
    assert sparsity_by_layer(c.statistics) == [0.25] and mean_abs_by_layer(c.statistics) == [1.75]


def test_every_layer_has_its_own_row_and_taking_the_penalty_away_leaves_plain_gradients():
    model, ids = tiny_llama(), torch.arange(24).reshape(2, 12)
    substitute(model, "relu")
    model(input_ids=ids, labels=ids).loss.backward()
    plain = [ffn.gate_proj.weight.grad.clone() for ffn in sparse_ffns(model)]
    c = context(100.0 / ids.numel(), layers=3)
    for penalized in (True, False):
        model.zero_grad()
        set_penalty(model, c if penalized else None)
        model(input_ids=ids, labels=ids).loss.backward()
        same = [torch.equal(ffn.gate_proj.weight.grad, g) for ffn, g in zip(sparse_ffns(model), plain, strict=True)]
        assert not any(same) if penalized else all(same)
    assert c.statistics[:, COUNT].tolist() == [24 * 48] * 3 and (c.statistics[:, NONZERO] > 0).all()


def test_bf16_gradients_keep_their_dtype():
    x1 = torch.ones(1, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    inject_l1(x1, context(1.0), 0).sum().backward()
    assert x1.grad.dtype is torch.bfloat16
