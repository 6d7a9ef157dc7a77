"""Measurements of activity, of top-k and of CETT against plain re-computation in fp64, on one rank and on two."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, _port, make_tiny, prosparse, tiny_llama
from safetensors import safe_open
from test_models import base_model

from prosparse.activity import Activity
from prosparse.cli import compose
from prosparse.ffn import substitute
from prosparse.sparsity import cett_curve, measure, pooled, top_k_curve
from prosparse.verbs import RUN

CONTEXT = 24


@pytest.fixture(scope="module")
def model():
    made = tiny_llama(hidden_act="relu").eval()
    with torch.no_grad():
        for layer in made.model.layers:  # some neurons never fire, and the FFNs matter to the loss
            layer.mlp.up_proj.weight[:3] = 0
            layer.mlp.down_proj.weight *= 20
            layer.mlp.gate_proj.weight *= 5
    return made.double()


def text(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, (rows, CONTEXT), dtype=np.int32)


def chat(rows: int) -> list[np.ndarray]:
    """Rows of a chat source: two documents and padding."""
    made = []
    for row in text(rows):
        positions = np.concatenate([np.arange(9), np.arange(11), np.full(CONTEXT - 20, -1)])
        made.append(np.stack([row, np.where(positions < 3, -100, row), positions]).astype(np.int32))
    return made


def intermediates(model, rows) -> list[list[torch.Tensor]]:
    """x1 [tokens, neurons] by row and layer."""
    found = []
    for row in rows:
        ids = torch.from_numpy(row[0] if row.ndim == 2 else row).long()[None]
        hidden = []
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda m, given, to=hidden: to.append(given[0][0]))
            for layer in model.model.layers
        ]
        extra = {}
        if row.ndim == 2:
            kept = torch.from_numpy(row[2]) >= 0
            extra = {
                "position_ids": torch.where(kept, torch.from_numpy(row[2]), torch.arange(4 - CONTEXT, 4)).long()[None]
            }
        with torch.no_grad():
            model(ids, use_cache=False, **extra)
        for hook in hooks:
            hook.remove()
        kept = slice(None) if row.ndim == 1 else torch.from_numpy(row[2]) >= 0
        mlps = [layer.mlp for layer in model.model.layers]
        found.append([(F.relu(m.gate_proj(h)) * m.up_proj(h))[kept] for m, h in zip(mlps, hidden, strict=True)])
    return found


@pytest.mark.parametrize("make", [text, chat])
def test_activity_equals_a_plain_count(model, make):
    rows, batch = make(7), 2
    activity = Activity(3)
    measure(model, rows, batch=batch, activity=activity)
    seen, x1 = activity.to_dict(), intermediates(model, rows)
    tokens = sum(len(layers[0]) for layers in x1)

    counts = sorted(sum(int((layer[p] != 0).sum()) for layer in layers) for layers in x1 for p in range(len(layers[0])))
    per_token = seen["active_per_token"]
    assert per_token["mean"] == pytest.approx(sum(counts) / tokens / 3, rel=1e-12)
    assert per_token["p50"] == counts[math.ceil(0.5 * tokens) - 1] / 3
    assert per_token["p95"] == counts[math.ceil(0.95 * tokens) - 1] / 3
    assert per_token["neurons"] == 48 and seen["dead"]["tokens"] == activity.tokens() == tokens

    for layer in range(3):
        active = [layers[layer] != 0 for layers in x1]
        fired = [sum(bool(row[p, j]) for row in active for p in range(len(row))) for j in range(48)]
        assert seen["dead"]["by_layer"][layer] == sum(count == 0 for count in fired) / 48 >= 3 / 48
        assert activity.frequency()[layer].tolist() == pytest.approx([count / tokens for count in fired])
        pairs = [(now, then) for row in active for now, then in pairwise(row)]
        again = sum(int((now & then).sum()) for now, then in pairs) / sum(int(now.sum()) for now, _ in pairs)
        assert seen["reuse"]["by_layer"][layer] == pytest.approx(again)
    assert seen["dead"]["share"] == pytest.approx(np.mean(seen["dead"]["by_layer"]))

    for size in (1, 2, 4, 8, 16):
        shares = []
        for layer in range(3):
            united, of = 0, 0
            for start in range(0, len(rows), batch):
                active = torch.cat([layers[layer] != 0 for layers in x1[start : start + batch]])
                stride = len(active) // 16
                for first in range(stride):
                    for group in range(16 // size):
                        members = [first + stride * (group + k * 16 // size) for k in range(size)]
                        united, of = united + int(active[members].any(0).sum()), of + 48
            shares.append(united / of)
        assert seen["union"][str(size)] == pytest.approx(np.mean(shares)), size
    assert seen["union"]["1"] < seen["union"]["4"] < seen["union"]["16"]


def test_texts_together_equal_one_text_of_both(model):
    rows, activities = [text(4), text(4, seed=1)], [Activity(3) for _ in range(3)]
    parts = [measure(model, part, activity=seen) for part, seen in zip(rows, activities, strict=False)]
    whole = measure(model, np.concatenate(rows), activity=activities[2])
    for key, value in pooled(parts).to_dict().items():
        assert value == pytest.approx(whole.to_dict()[key], rel=1e-12), key
    assert (activities[0] + activities[1]).to_dict() == activities[2].to_dict()


def test_experts_have_active_neurons_per_token_and_what_is_not_told_apart_is_none():
    experts = base_model("mixtral").eval()
    substitute(experts, "relu")
    activity = Activity(experts.config.num_hidden_layers)
    result = measure(experts, text(3) % 64, activity=activity)
    seen = activity.to_dict()
    per_token = seen.pop("active_per_token")
    assert seen == {"dead": None, "reuse": None, "union": None}
    assert per_token["mean"] == pytest.approx((1 - result.sparsity) * per_token["neurons"])
    with pytest.raises(ValueError, match="experts are not told apart"):
        activity.frequency()
    with pytest.raises(ValueError, match="experts are not told apart"):
        cett_curve(experts, text(3) % 64)


def cut_perplexity(model, rows, keep) -> float:
    """Perplexity when each FFN's x1 is keep(layer, x1)."""
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, given, n=number: keep(n, given[0]))
        for number, layer in enumerate(model.model.layers)
    ]
    losses = []
    for row in rows:
        ids = torch.from_numpy(row).long()[None]
        with torch.no_grad():
            losses += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    for hook in hooks:
        hook.remove()
    return math.exp(np.mean(losses))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_top_k_curve_equals_a_plain_one(model, activation):
    rows = text(5)
    substitute(model, activation)
    try:
        curve = top_k_curve(model, rows, [100, 50, 10, 1], batch=2)
        for point, kept in zip(curve, (48, 24, 5, 1), strict=True):

            def keep(layer, x1, kept=kept):
                smallest = x1.abs().sort(dim=-1, descending=True).values[..., kept - 1 : kept]
                return torch.where(x1.abs() >= smallest, x1, 0.0)

            assert point["perplexity"] == pytest.approx(cut_perplexity(model, rows, keep), rel=1e-6)
            assert point["tokens"] == 5 * (CONTEXT - 1)
        assert curve[0]["perplexity"] != pytest.approx(curve[-1]["perplexity"], rel=1e-3)
    finally:
        substitute(model, "relu")


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_cett_is_what_its_definition_says_and_stays_within_its_budget(model, activation):
    rows = text(6)
    substitute(model, activation)
    try:
        found = cett_curve(model, rows, 1.0, batch=3)
        downs = [layer.mlp.down_proj.weight for layer in model.model.layers]
        small = [
            lambda x1, at=at, w=w: x1.abs() * w.norm(dim=0) < at
            for at, w in zip(found["thresholds"], downs, strict=True)
        ]
        zeros = [[], [], []]

        def keep(layer, x1):
            kept = torch.where(small[layer](x1), 0.0, x1)
            zeros[layer].append((kept == 0).double().mean().item())
            return kept

        assert found["perplexity"] == pytest.approx(cut_perplexity(model, rows, keep), rel=1e-4)
        assert found["sparsity_by_layer"] == pytest.approx([np.mean(part) for part in zeros], abs=2e-3)
        assert found["sparsity"] == pytest.approx(np.mean(found["sparsity_by_layer"]))
        dense = cut_perplexity(model, rows, lambda layer, x1: x1)
        assert found["dense_perplexity"] == pytest.approx(dense, rel=1e-6)
        assert found["perplexity"] <= 1.01 * dense and found["cett"] > 0
        before = float(np.mean([(layer == 0).double().mean() for row in seen_by(model, rows) for layer in row]))
        assert found["sparsity"] > before + 0.01

        ratios = [[], [], []]  # of the dense model, token by token
        for row in seen_by(model, rows):
            for layer, x1 in enumerate(row):
                for token in x1:
                    left_out = (token * small[layer](token)) @ downs[layer].T
                    ratios[layer].append((left_out.norm() / (token @ downs[layer].T).norm()).item())
        assert found["cett_by_layer"] == pytest.approx([np.mean(part) for part in ratios], rel=1e-3)
        assert found["cett_by_layer"] == pytest.approx([found["cett"]] * 3, rel=0.25)  # interpolated, on other rows
    finally:
        substitute(model, "relu")


def seen_by(model, rows) -> list[list[torch.Tensor]]:
    """The x1 that enters each down projection, by row and layer."""
    found = []
    for row in rows:
        found.append([])
        cut_perplexity(model, [row], lambda layer, x1: found[-1].append(x1[0]))
    return found


def test_two_ranks_measure_what_one_does_and_several_texts_stand_side_by_side(tiny, tmp_path):
    (tmp_path / "other.txt").write_text("the gate rests while a sparse layer fires. " * 60)
    texts = (
        f"texts={{own: {{path: '{tiny['text']}', held_out: 0.2, rows: 9}}, other: {{path: '{tmp_path}/other.txt'}}}}"
    )
    arguments = ["measure", f"checkpoint={tiny['model']}", texts, f"cache={tiny['cache']}", "context=32", "batch=2"]
    arguments += ["dtype=fp32", "curves=true", "curve_rows=5", "top_k=[100,20]", "threads=1"]
    done = prosparse(*arguments, "neurons=true", f"out={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", _port()]
    both = [*torchrun, "-m", "prosparse.cli", *arguments, "neurons=true", f"out={tmp_path / 'two'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = subprocess.run(both, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ranks.returncode == 0, ranks.stderr
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == (1, 2) and json.loads(done.stdout.splitlines()[-1]) == one
    assert set(one["texts"]) == {"own", "other"} and one["texts"]["own"]["rows"] == 9
    for key in ("active_per_token", "dead", "reuse", "union", "sparsity", "tokens", "activation"):
        assert one[key] == two[key], key  # integers, added up
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-12)
    assert two["top_k"][1]["perplexity"] == pytest.approx(one["top_k"][1]["perplexity"], rel=1e-12)
    assert two["cett"]["sparsity"] == one["cett"]["sparsity"] and two["cett"]["text"] == "own"
    assert ranks.stderr.count("perplexity") == 2  # one rank speaks
    files = [safe_open(tmp_path / name / "neurons.safetensors", "pt") for name in ("one", "two")]
    assert "other.layers.2.frequency" in files[0].keys()  # noqa: SIM118
    assert all(torch.equal(files[0].get_tensor(key), files[1].get_tensor(key)) for key in files[0].keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["texts={a: {path: x}}", "text=stdlib"], "give either text=PATH or texts="),
        ([], "give either text=PATH or texts="),
        (["texts={a: {path: x, held_out: 2}}"], "texts.a.held_out is 2"),
        (["texts={a: {path: x}}", "held_out=0.1"], "texts.NAME.held_out"),
        (["texts={a: {path: x}}", "rows=3"], "texts.NAME.rows"),
        (["text=x", "rows=0"], "rows is 0"),
        (["text=x", "top_k=[0]"], "top_k has 0"),
        (["text=x", "cett_percent=-1"], "cett_percent is -1"),
    ],
)
def test_what_cannot_be_measured_is_told(arguments, told):
    with pytest.raises(ValueError, match=told):
        compose("measure", ["checkpoint=y", *arguments])


def test_experts_are_refused_before_anything_is_measured(tmp_path):
    folder = make_tiny(tmp_path, base_model("mixtral"))["model"]
    for arguments in (["neurons=true", f"out={tmp_path / 'out'}"], ["curves=true"]):
        with pytest.raises(ValueError, match="set neurons=false, and with curves=true cett_percent=null"):
            RUN["measure"](compose("measure", [f"checkpoint={folder}", "text=no_such", "dtype=fp32", *arguments]))


def test_an_empty_text_is_told(tiny, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    where = [f"cache={tiny['cache']}", f"out={tmp_path / 'out'}"]
    done = prosparse("measure", f"checkpoint={tiny['model']}", f"text={tmp_path}/empty.txt", *where)
    assert done.returncode == 2 and "empty.txt" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "result.json").exists()
