"""`what=decode` gives every figure that it promises, for small shapes and for a model, and refuses wrong outputs."""

import pytest
import torch
from conftest import make_tiny, tiny_llama

from prosparse import decoding, decoding_benchmark
from prosparse.benchmarking import in_turns, ratio
from prosparse.config import Dtype, Implementation
from prosparse.decoding_benchmark import OPERATORS, break_even_of, decode, draw, random_llama
from prosparse.sparsity import measure
from prosparse.verb_configs import Bench

SMALL = {"hidden": 64, "neurons": 200, "rounds": 2, "device": "cpu", "tokens": 4}


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(decoding_benchmark, "COPIED", 0)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_operators_a_model_and_a_picture(tmp_path, dtype):
    config = Bench(**SMALL, sparsities=[0.0, 0.9], batches=[1, 3], layers=2, dtype=dtype)
    result = decode(config)
    assert [(row["batch"], row["sparsity"]) for row in result["operators"]] == [(1, 0), (1, 0.9), (3, 0), (3, 0.9)]
    for row in result["operators"]:
        assert row["measured_sparsity"] == pytest.approx(row["sparsity"], abs=0.02)
        assert row["skipped"] <= row["measured_sparsity"] + 1e-6
        ways = {"ours", "eager", "dense_float32", *(["dense_bfloat16"] if dtype is Dtype.bf16 else [])}
        for name in OPERATORS:
            assert set(row[name]["microseconds"]) == ways and row[name]["rival"].startswith("dense")
            assert row[name]["speedup"]["low"] <= row[name]["speedup"]["median"] <= row[name]["speedup"]["high"]
        assert row["copy_bytes_per_second"] > 0 and row["dense_share_of_copy"] > 0
    assert set(result["break_even"]) == {"1", "3"}
    draw(result).savefig(tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    model = result["model"]
    assert model["sparsity"] == pytest.approx(0.9, abs=0.07) and model["sparse_layers"] == [True, True]
    assert all(len(model["ffn_microseconds_by_layer"][way]) == 2 for way in ("dense", "sparse"))
    assert model["tokens_per_second"].keys() == {"dense", "sparse"} and model["speedup"]["median"] > 0


def test_a_checkpoint_is_measured_on_the_tokens_that_it_generates(tmp_path):
    tiny = make_tiny(tmp_path, tiny_llama(hidden_act="relu"))
    result = decode(Bench(**SMALL, checkpoint=str(tiny["model"]), dtype=Dtype.fp32))["model"]
    assert result["same_greedy_tokens"] and result["logit_error"] < 1e-4 and len(result["sparsity_by_layer"]) == 3
    assert 0.3 < result["sparsity"] < 0.7


@pytest.mark.parametrize("operator", ["sparse_up", "sparse_down", "dense"])
def test_a_wrong_output_is_not_timed(monkeypatch, operator):
    right = getattr(decoding_benchmark, operator)
    monkeypatch.setattr(decoding_benchmark, operator, lambda *given, **named: right(*given, **named) * 1.1)
    with pytest.raises(RuntimeError, match=r"is off by .* of the largest value: nothing is timed"):
        decode(Bench(**SMALL, sparsities=[0.5], batches=[1]))


@pytest.mark.parametrize("dtype", list(Dtype))
def test_at_99_percent_a_right_chain_is_taken_and_a_slightly_wrong_one_refused(monkeypatch, dtype):
    shapes = {**SMALL, "neurons": 11008, "rounds": 1, "dtype": dtype}
    config = Bench(**shapes, sparsities=[0.99], batches=[1, 3])
    decode(config)
    right = decoding_benchmark.sparse_up

    def larger(x1):
        return x1 * 1.03

    def fewer(x1):
        return x1.where(torch.arange(x1.shape[1]) != x1.abs().amax(0).argmax(), 0)

    for fault in (larger, fewer):

        def wrong(gate, *given, fault=fault, **named):
            x1 = right(gate, *given, **named)
            return x1 if gate._base is not None else fault(x1)  # a gate that was just computed: in the chain only

        monkeypatch.setattr(decoding_benchmark, "sparse_up", wrong)
        with pytest.raises(RuntimeError, match="cpp ffn is off by .*: nothing is timed"):
            decode(config)


@pytest.mark.parametrize("operator", ["dense", "sparse_up", "sparse_down"])
@pytest.mark.parametrize("kind", ["layers", "checkpoint"])
def test_a_model_whose_ffns_are_slightly_wrong_is_not_timed(monkeypatch, tmp_path, kind, operator):
    if kind == "layers":
        config = Bench(**SMALL, sparsities=[0.9], batches=[1], layers=2)
    else:
        config = Bench(**SMALL, checkpoint=str(make_tiny(tmp_path, tiny_llama(hidden_act="relu"))["model"]))
    right = getattr(decoding, operator)
    monkeypatch.setattr(decoding, operator, lambda *given, **named: right(*given, **named) * 1.03)
    with pytest.raises(RuntimeError, match=r"layer 0: its FFN is off by .* of the largest value: nothing is timed"):
        decode(config)


def test_a_right_bf16_model_of_several_layers_is_timed_though_gates_near_the_threshold_flip():
    model = random_llama(128, 4096, 8, 0.9, torch.bfloat16, torch.device("cpu"))
    result = decoding_benchmark.end_to_end(model, torch.arange(16)[None], 4, 1, Implementation.cpp)
    assert 0 < result["logit_error"] < 0.5 and result["sparse_layers"] == [True] * 8


def test_a_random_llama_has_the_sparsity_asked_for():
    model = random_llama(64, 256, 3, 0.89, torch.float32, torch.device("cpu"))
    rows = [torch.arange(i, i + 32).numpy() for i in range(4)]
    assert measure(model, rows).sparsity == pytest.approx(0.89, abs=0.05)


def test_break_even_lies_where_the_line_crosses_one():
    assert break_even_of([(0.0, 1.2), (0.5, 2.0)]) == 0
    assert break_even_of([(0.5, 2.0), (0.0, 0.5)]) == pytest.approx(1 / 6)
    assert break_even_of([(0.0, 1.1), (0.5, 0.8), (0.9, 1.2)]) == pytest.approx(0.7)
    assert break_even_of([(0.0, 0.5), (0.9, 0.9)]) is None


def test_arms_take_turns_and_ratios_are_by_round():
    order = []
    arms = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    assert in_turns(arms, 2) == {name: [1.0, 1.0] for name in "abc"} and order == list("abcbca")
    assert ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
