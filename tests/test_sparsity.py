"""Measurements against a plain re-computation, and the shift that is built on them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama

from prosparse.config import Shift
from prosparse.ffn import activation_of, round_bf16, sparse_ffns, substitute
from prosparse.sparsity import measure, spread
from prosparse.threshold import shift


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (7, 24), dtype=np.int32)


def brute_force(model, rows) -> tuple[float, list[float]]:
    """(perplexity, sparsity by layer), one row at a time in fp64."""
    model = model.double()
    losses, zeros = [], [[] for _ in model.model.layers]
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64))[None]
        hidden = []
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda m, x, h=hidden: h.append(x[0])) for layer in model.model.layers
        ]
        logits = model(ids).logits[0]
        for hook in hooks:
            hook.remove()
        losses += F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
        for layer, h in enumerate(hidden):
            mlp = model.model.layers[layer].mlp
            zeros[layer].append(((F.relu(mlp.gate_proj(h)) * mlp.up_proj(h)) == 0).double().mean().item())
    return math.exp(np.mean(losses)), [float(np.mean(z)) for z in zeros]


@pytest.mark.parametrize("substituted", [False, True])
def test_perplexity_and_sparsity_equal_a_plain_recomputation(rows, substituted):
    model = tiny_llama(hidden_act="relu").eval()
    if substituted:
        substitute(model, "relu")
    result = measure(model, rows, batch=3)
    perplexity, by_layer = brute_force(model, rows)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.sparsity_by_layer == pytest.approx(by_layer, abs=1e-6)
    assert result.sparsity == pytest.approx(np.mean(by_layer)) and result.tokens == 7 * 23


def test_a_silu_model_has_no_sparsity(rows):
    assert measure(tiny_llama(), rows).sparsity == 0


def test_rows_are_spread_evenly_from_first_to_last():
    assert spread(10, 4) == [0, 3, 6, 9] and spread(3, 5) == [0, 1, 2] and spread(3, None) == [0, 1, 2]


def test_measuring_leaves_the_model_as_it_was(rows):
    model = tiny_llama().train()
    measure(model, rows)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


def test_no_rows_are_an_error(rows):
    with pytest.raises(ValueError, match="no rows"):
        measure(tiny_llama(), rows[:0])


@pytest.mark.parametrize(("activation", "shifted"), [("relu", "fatrelu"), ("drelu", "drelu")])
def test_a_fixed_threshold_is_rounded_to_bf16_and_measured(rows, activation, shifted):
    model = tiny_llama()
    substitute(model, activation)
    result = shift(model, rows, Shift(threshold=0.01))
    assert activation_of(model) == (shifted, round_bf16(0.01)) == (shifted, result.threshold)
    assert [point.threshold for point in result.sweep] == [0.0, round_bf16(0.01)]
    assert result.sweep[1].sparsity > result.sweep[0].sparsity


def sensitive():
    """A model that feels the absence of its FFNs."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5
    substitute(model, "relu")
    return model


def test_a_budget_takes_the_largest_threshold_tried_that_stays_within_it(rows):
    model = sensitive()
    result = shift(model, rows, Shift(budget=0.01, start=0.001, refinements=6))
    limit = result.sweep[0].perplexity * 1.01
    within = [point.threshold for point in result.sweep if point.perplexity <= limit]
    assert result.threshold == max(within) > 0
    assert min(p.threshold for p in result.sweep if p.perplexity > limit) <= result.threshold * (1 + 2**-5)
    assert measure(model, rows).perplexity <= limit


def test_a_budget_that_nothing_meets_leaves_the_model_as_it_came(rows):
    model = sensitive()
    start = next(t for t in (2.0, 4.0, 8.0, 16.0) if _costs(t, rows))
    result = shift(model, rows, Shift(budget=1e-12, start=start, refinements=0))
    assert result.threshold == 0 and activation_of(model) == ("relu", 0.0)


def _costs(threshold: float, rows) -> bool:
    sweep = shift(sensitive(), rows, Shift(threshold=threshold)).sweep
    return sweep[1].perplexity > sweep[0].perplexity * 1.001


def test_a_trained_threshold_is_only_raised(rows):
    model = tiny_llama()
    substitute(model, "fatrelu", 0.5)
    result = shift(model, rows, Shift(budget=0.01, start=0.01))
    assert result.threshold >= 0.5 and min(point.threshold for point in result.sweep) == 0.5


def test_an_activation_without_a_threshold_is_refused(rows):
    model = tiny_llama()
    substitute(model, "silu")
    with pytest.raises(ValueError, match="activation is silu"):
        shift(model, rows, Shift(threshold=0.01))
    assert all(ffn.activation == "silu" for ffn in sparse_ffns(model))
