"""Thresholds by layer or neuron: what a zero costs, where to cut, and what comes of it."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import make_tiny, prosparse, tiny_llama
from test_models import base_model

from prosparse.allocation import (
    Costs,
    cut_apart,
    fisher_costs,
    fold,
    load_thresholds,
    save_thresholds,
    thresholds_at,
)
from prosparse.config import Granularity, Shift
from prosparse.ffn import activation_of, substitute
from prosparse.sparsity import measure
from prosparse.threshold import shift
from prosparse.ulysses import RowGroup


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (6, 24), dtype=np.int32)


def sensitive(activation: str = "relu", param: float = 0.0):
    """A model to which its FFNs matter, some neurons more than others."""
    model = tiny_llama().double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight *= 20
            layer.mlp.down_proj.weight *= torch.linspace(0.1, 40, 48)
        model.lm_head.weight *= 5  # the embeddings too
    substitute(model, activation, param)
    return model


@pytest.mark.parametrize(("activation", "param"), [("relu", 0.0), ("fatrelu", 0.5), ("drelu", 0.0)])
def test_costs_equal_a_plain_count_of_squared_gradients(rows, activation, param):
    model = sensitive(activation, param)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    costs = fisher_costs(model, rows, batch=4)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training

    counts = [torch.zeros(48, len(costs.edges)).double() for _ in range(3)]
    sums = [torch.zeros(48, len(costs.edges)).double() for _ in range(3)]
    for row in rows:
        ids = torch.from_numpy(row).long()[None]
        kept: list[tuple] = []

        def made(layer, x1, kept=kept):
            x1.retain_grad()
            kept.append((layer, x1))

        hidden = []
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda m, given, to=hidden: to.append(given[0][0].detach()))
            for layer in model.model.layers
        ]
        hooks += [
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, given, n=n: made(n, given[0]))
            for n, layer in enumerate(model.model.layers)
        ]
        logits = model(ids, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        for layer, x1 in kept:
            gate = model.model.layers[layer].mlp.gate_proj(hidden[layer]).detach()
            cost = (x1.grad[0] * x1[0].detach()) ** 2
            for place, edge in enumerate(costs.edges):
                below = costs.edges[place - 1] if place else -torch.inf
                between = (x1[0] != 0) & (gate.float() < edge) & (gate.float() >= below)
                counts[layer][:, place] += between.sum(0)
                sums[layer][:, place] += (cost * between).sum(0)
    for layer in range(3):
        assert torch.equal(costs.counts[layer], counts[layer]) and counts[layer].sum() > 100
        assert torch.allclose(costs.costs[layer], sums[layer], rtol=1e-6, atol=1e-18)
    assert param == 0 or costs.edges[0] > param


def test_ranks_share_the_rows_and_poll_as_often(rows):
    whole, parts, polls = fisher_costs(sensitive(), rows, batch=2), [], []
    for rank in range(2):  # three batches: two of the first rank, one of the second
        polls.append([])
        progress = lambda *at: polls[-1].append(at)  # noqa: E731
        parts.append(fisher_costs(sensitive(), rows, batch=2, progress=progress, group=RowGroup(rank, 2)))
    assert polls == [[(1, 2), (2, 2)]] * 2
    for layer in range(3):
        assert torch.equal(parts[0].counts[layer] + parts[1].counts[layer], whole.counts[layer])
        assert torch.allclose(parts[0].costs[layer] + parts[1].costs[layer], whole.costs[layer], rtol=1e-9)


def test_padding_costs_nothing_and_is_not_counted(rows):
    positions = np.concatenate([np.arange(20), np.full(4, -1)])
    padded = [np.stack([row, np.where(positions < 0, -100, row), positions]).astype(np.int32) for row in rows]
    short = fisher_costs(sensitive(), rows[:, :20])
    seen = fisher_costs(sensitive(), padded)
    for layer in range(3):
        assert torch.equal(seen.counts[layer], short.counts[layer])
        assert torch.allclose(seen.costs[layer], short.costs[layer], rtol=1e-6, atol=1e-18)


def test_a_budget_that_no_price_meets_leaves_the_model_as_it_came(rows):
    result = shift(sensitive(), rows, Shift(budget=-0.5, start=4.0, granularity=Granularity.neuron, refinements=0))
    assert result.thresholds is None and result.threshold == 0 and len(result.allocations) < 40


def test_costs_that_cannot_be_told_are_an_error(rows):
    model = sensitive()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= 0
    with pytest.raises(ValueError, match="0 active elements"):
        shift(model, rows, Shift(budget=0.01, granularity=Granularity.neuron, start=4.0, refinements=0))


def test_a_threshold_is_where_the_price_is_no_longer_worth_it():
    edges = torch.tensor([1.0, 2.0, 4.0])
    counts = torch.tensor([[100.0, 100, 100], [100, 0, 100], [0, 0, 0]]).double()
    cost = torch.tensor([[100.0, 300, 100], [900, 0, 50], [0, 0, 0]]).double()
    costs = Costs(edges, [counts], [cost])
    free = Costs(edges, [counts * 1e6], [cost * 1e6])  # so many that a neuron's own costs are all that counts
    by_neuron = thresholds_at(free, 2.0, Granularity.neuron)[0]
    # the first: 1 and 3 and 1 an element: all three together cost 5/3; the second: 9 and then 0.5: together 4.75
    assert by_neuron.tolist() == [4.0, 0.5, 0.5]
    by_layer = thresholds_at(costs, 2.0, Granularity.layer)[0]
    assert by_layer.tolist() == [0.5] * 3  # 1000 / 200, 300 / 100, 150 / 200: 1450 / 500 in all
    assert thresholds_at(costs, 3.0, Granularity.layer)[0].tolist() == [4.0] * 3
    assert thresholds_at(costs, 1e-9, Granularity.neuron)[0].tolist() == [0.5] * 3
    drawn = thresholds_at(costs, 4.0, Granularity.neuron)[0]  # 116 elements of which 16 cost as the layer's
    assert drawn[0] == 4.0


def test_prices_rise_with_sparsity(rows):
    model = sensitive()
    costs = fisher_costs(model, rows)
    zeros = []
    for granularity in (Granularity.layer, Granularity.neuron):
        for price in (1e-12, 1e-8, 1e-4, 1.0):
            with cut_apart(model, thresholds_at(costs, price, granularity)):
                zeros.append(measure(model, rows).sparsity)
    assert zeros[:4] == sorted(zeros[:4]) and zeros[4:] == sorted(zeros[4:]) and zeros[7] > zeros[4] + 0.1
    assert activation_of(model) == ("relu", 0.0)


@pytest.mark.parametrize("granularity", [Granularity.layer, Granularity.neuron])
def test_the_dearest_price_within_the_budget_is_taken_and_the_model_stays(rows, granularity):
    model = sensitive()
    before = measure(model, rows)
    result = shift(model, rows, Shift(budget=0.01, start=0.001, granularity=granularity))
    assert measure(model, rows) == before
    limit = before.perplexity * 1.01
    within = max((point for point in result.allocations if point.perplexity <= limit), key=lambda point: point.price)
    beyond = min((point for point in result.allocations if point.perplexity > limit), key=lambda point: point.price)
    assert beyond.price <= within.price * 2 ** (1 / 16) * 1.0001
    with cut_apart(model, result.thresholds):
        assert measure(model, rows).sparsity == within.sparsity > before.sparsity
    told = result.to_dict()
    assert told["granularity"] == granularity and "thresholds" not in told and len(told["allocations"]) > 4
    assert json.loads(json.dumps(told))["sweep"][0]["threshold"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_what_was_allocated_rounds_nothing(rows, dtype):
    model = sensitive().float()
    thresholds = thresholds_at(fisher_costs(model, rows), 1e-4, Granularity.neuron)
    assert len({at for part in thresholds for at in part.tolist()}) > 4
    apart = deepcopy(model).to(dtype)
    ids = torch.from_numpy(rows).long()
    with torch.no_grad(), cut_apart(apart, thresholds):
        expected = apart(ids).logits
    told = fold(model, thresholds, token_ids=ids, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model.to(dtype)(ids).logits, expected)
    assert told.difference_fp32 == 0


def test_thresholds_of_experts_are_their_own(rows):
    model = base_model("mixtral")
    substitute(model, "relu")
    costs = fisher_costs(model, rows % 64)
    experts, neurons = model.model.layers[0].mlp.experts.down_proj.shape[::2]
    assert costs.counts[0].shape[0] == experts * neurons
    before = measure(model, rows % 64).sparsity
    with cut_apart(model, thresholds_at(costs, 1e9, Granularity.neuron)):
        assert measure(model, rows % 64).sparsity > before + 0.1


def test_ungated_models_have_one_threshold(rows):
    model = base_model("opt")
    substitute(model, "relu")
    with pytest.raises(ValueError, match="granularity=model"):
        shift(model, rows % 64, Shift(budget=0.01, granularity=Granularity.neuron))


def test_thresholds_are_kept_beside_a_checkpoint(tmp_path):
    thresholds = [torch.rand(5), torch.rand(5)]
    (tmp_path / "skeleton").mkdir()
    assert load_thresholds(tmp_path) is None
    save_thresholds(thresholds, tmp_path / "skeleton")
    assert all(torch.equal(a, b) for a, b in zip(load_thresholds(tmp_path), thresholds, strict=True))


def test_the_verb_folds_and_measures_what_it_has_folded(tmp_path):
    tiny = make_tiny(tmp_path, hidden_act="relu")
    where = [f"checkpoint={tiny['model']}", f"text={tiny['text']}", f"cache={tiny['cache']}", f"out={tmp_path / 'out'}"]
    how = ["granularity=neuron", "budget=0.001", "context=32", "calibration_rows=8", "start=0.0001", "dtype=fp32"]
    done = prosparse("shift", *where, *how)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])["shift"]
    chosen = max(
        (p for p in told["allocations"] if p["perplexity"] <= told["sweep"][0]["perplexity"] * 1.001),
        key=lambda p: p["price"],
    )
    assert told["folded"]["sparsity"] == pytest.approx(chosen["sparsity"], abs=1e-3)
    assert told["folded"]["perplexity"] == pytest.approx(chosen["perplexity"], rel=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_act"] == "fatrelu" and config["hidden_act_param"] == told["folded"]["threshold"] > 0
    refused = prosparse("shift", *where[:-1], f"out={tmp_path / 'other'}", "granularity=neuron", "threshold=0.1")
    assert refused.returncode == 2 and "granularity is neuron" in refused.stderr and "budget" in refused.stderr
