"""What makes a step fast changes nothing but the time: the loss, the switches, reading ahead, the profile."""

import gzip
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_llama
from test_models import base_model
from torch.utils.flop_counter import FlopCounterMode

from prosparse.cli import compose
from prosparse.config import Auto, Checkpointing, Compile, FfnMemory, Kernel, Profile, Speed
from prosparse.ffn import set_penalty, sparse_ffns, substitute
from prosparse.kernels import loss as loss_kernel
from prosparse.kernels.loss import summed_cross_entropy
from prosparse.penalty import PenaltyContext, new_statistics
from prosparse.sparsity import language_loss
from prosparse.speed import Ahead, Profiler, described, ffn_kernel, ffn_memory, make_ready, uses_liger

CPU = torch.device("cpu")


def train_config(*overrides):
    return compose("train", ["experiment=demo", "run_dir=x", *overrides])


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [2**8, 2**22])
def test_the_chunked_loss_and_its_gradient_are_those_of_cross_entropy(monkeypatch, dtype, chunk):
    monkeypatch.setitem(loss_kernel.CHUNK_BYTES, "cpu", chunk)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16).to(dtype), torch.randn(50, 16).to(dtype)
    labels = torch.randint(50, (2, 9))
    labels[0, 3:6] = -100
    gradients = []
    for function in (language_loss, summed_cross_entropy):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = function(h @ w.T, labels)
        (value / 7).backward()
        gradients.append((value.detach(), h.grad, w.grad))
    for plain, ours in zip(*gradients, strict=True):
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(ours, plain, **tolerance)


def test_a_label_that_is_next_to_impossible_has_a_finite_loss():
    logits = torch.tensor([[[0.0, 500.0], [0.0, 0.0]]], requires_grad=True)
    assert summed_cross_entropy(logits, torch.tensor([[0, -100]])).item() == pytest.approx(500.0)


def test_the_gradient_takes_the_place_of_the_logits_only_where_nobody_needs_them():
    head, hidden, labels = torch.nn.Linear(8, 30), torch.randn(1, 6, 8), torch.randint(30, (1, 6))
    for wrap, keep, overwritten in ((torch.nn.Identity(), False, True), (torch.nn.Identity(), True, False),
                                    (torch.tanh, False, False)):  # tanh keeps its output for backward  # fmt: skip
        logits = wrap(head(hidden))
        before = logits.detach().clone()
        summed_cross_entropy(logits, labels, keep_logits=keep).backward()
        assert torch.equal(logits, before) != overwritten


# --- the switches -----------------------------------------------------------------------------------------------------


def test_auto_takes_what_the_device_can_and_the_header_says_what_that_is():
    config = train_config()
    assert ffn_kernel(Speed(), CPU) == "eager" and ffn_kernel(Speed(), torch.device("cuda")) in ("triton", "eager")
    assert ffn_kernel(Speed(ffn=FfnMemory.stock), CPU) is None
    assert ffn_memory(config, CPU) is FfnMemory.recompute_x1
    assert ffn_memory(config, torch.device("cuda")) is FfnMemory.save_x1
    assert not uses_liger(Speed(), CPU, "llama")
    assert not uses_liger(Speed(liger=Auto.none), torch.device("cuda"), "llama")
    model = base_model("llama")
    substitute(model, "relu")
    make_ready(model, config, CPU)
    said = described(config, CPU, model)
    assert said == "ffn recompute_x1 (eager), loss chunked, norm fused, without Liger, checkpointing none"
    for family, activation, words in (
        ("opt", "relu", "ffn stock, loss chunked, norm stock"),
        ("llama", "relu2", "ffn stock, loss chunked, norm fused"),
    ):
        model = base_model(family)
        substitute(model, activation)
        make_ready(model, config, CPU)
        assert described(config, CPU, model).startswith(words)
    with pytest.raises(
        ValueError, match=r"speed.kernel eager, which LlamaForCausalLM with relu2 cannot: set both to auto"
    ):
        make_ready(model, train_config("speed.kernel=eager"), CPU)
    config.checkpointing = Checkpointing.selective
    assert ffn_memory(config, CPU) is FfnMemory.save_x1  # checkpointing frees x1 anyway


def test_what_cannot_be_is_an_error_that_names_the_key(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"speed.kernel is triton, which needs a GPU"):
        ffn_kernel(Speed(kernel=Kernel.triton), CPU)
    with pytest.raises(ValueError, match=r"speed.compile is layers, which ZeRO-3"):
        train_config("speed.compile=layers", "zero=zero3")
    with pytest.raises(ValueError, match=r"profile.steps is -1: give at least 0"):
        train_config("profile.steps=-1")


def gradients(model, config, ids):
    make_ready(model, config, CPU)
    told = PenaltyContext(torch.tensor(0.1), new_statistics(len(sparse_ffns(model))))
    set_penalty(model, told, ffn_kernel(config.speed, CPU))
    summed_cross_entropy(model.train()(ids, use_cache=False).logits, ids).backward()
    return [p.grad for p in model.parameters()], told.statistics


@pytest.mark.parametrize("checkpointing", list(Checkpointing))
@pytest.mark.parametrize("ffn", ["auto", "save_x1", "stock"])
def test_no_switch_changes_gradients_or_statistics(checkpointing, ffn):
    ids, found = torch.arange(60).view(2, 30), []
    plain = train_config("speed.ffn=stock", "speed.norm=stock", "speed.loss=stock")
    for config in (plain, train_config(f"speed.ffn={ffn}", f"checkpointing={checkpointing}")):
        model = tiny_llama()
        substitute(model, "relu")
        found.append(gradients(model, config, ids))
    for ours, theirs in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=0)


def test_selective_checkpointing_recomputes_no_matrix_product():
    ids, counts = torch.arange(60).view(2, 30), {}
    for how in (Checkpointing.none, Checkpointing.selective, Checkpointing.non_reentrant):
        model = tiny_llama()
        substitute(model, "relu")
        config = train_config(f"checkpointing={how}")
        with FlopCounterMode(display=False) as counter:
            gradients(model, config, ids)
        counts[how] = counter.get_total_flops()
    assert counts[Checkpointing.selective] == counts[Checkpointing.none] < counts[Checkpointing.non_reentrant]


def test_compiled_layers_are_bit_close():
    torch._dynamo.reset()
    ids, found = torch.arange(60).view(2, 30), []
    for compiled in Compile:
        model = tiny_llama(num_hidden_layers=10)  # more than dynamo compiles one function for
        substitute(model, "relu")
        found.append(gradients(model, train_config(f"speed.compile={compiled}"), ids))
    for ours, theirs in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1][1][:, 1:], found[0][1][:, 1:])


def test_experts_and_ungated_ffns_keep_x1_under_auto_and_refuse_to_recompute_it():
    model = base_model("opt")
    substitute(model, "relu")
    make_ready(model, train_config(), CPU)
    with pytest.raises(ValueError, match=r"speed.ffn is recompute_x1 .* which OPTForCausalLM with relu cannot"):
        make_ready(model, train_config("speed.ffn=recompute_x1"), CPU)


# --- around the step --------------------------------------------------------------------------------------------------


class Rows:
    """Row i is [i, i]; remembers the threads that read."""

    def __init__(self):
        self.readers = []

    def __getitem__(self, number):
        self.readers.append((number, threading.current_thread() is threading.main_thread()))
        return np.full(2, number)


def test_the_next_window_is_read_ahead_and_a_wrong_guess_costs_nothing():
    rows, ahead = Rows(), Ahead(Speed())
    first = ahead.rows(rows, [range(0, 2)], (rows, [range(2, 4)]))
    second = ahead.rows(rows, [range(2, 4)], (rows, [range(4, 6)]))
    third = ahead.rows(rows, [range(8, 10)], None)  # not what was expected
    assert [b[0].input_ids[:, 0].tolist() for b in (first, second, third)] == [[0, 1], [2, 3], [8, 9]]
    mains = {number for number, main in rows.readers if main}
    assert mains == {0, 1, 8, 9}
    alone = Rows()
    Ahead(Speed(prefetch=False)).rows(alone, [range(0, 2)], (alone, [range(2, 4)]))
    assert [number for number, _ in alone.readers] == [0, 1]


def test_a_row_that_cannot_be_read_ahead_is_an_error_when_it_is_wanted():
    class Broken(Rows):
        def __getitem__(self, number):
            if number > 1:
                raise OSError("gone")
            return super().__getitem__(number)

    rows, ahead = Broken(), Ahead(Speed())
    ahead.rows(rows, [range(0, 2)], (rows, [range(2, 4)]))
    with pytest.raises(OSError, match="gone"):
        ahead.rows(rows, [range(2, 4)], None)


def test_the_profile_covers_its_steps_and_no_other(tmp_path):
    profiler = Profiler(Profile(first=2, steps=2), tmp_path, rank=0)
    for step in range(1, 6):
        profiler.before(step)
        torch.ones(step + 100) + 1
        file = profiler.after(step)
        assert (file is not None) == (step == 3)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "rank-0.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::add" for event in trace["traceEvents"]) == 2
    assert Profiler(Profile(), tmp_path / "none", 0).after(10) is None
    cut = Profiler(Profile(first=2, steps=2), tmp_path / "cut", 0)
    (tmp_path / "cut").mkdir()
    cut.before(2)
    assert cut.after(2) is None and cut.end().exists() and cut.end() is None


def test_settling_freezes_what_lives_and_freeing_the_engine_thaws_it():
    code = (
        "import gc, torch; from prosparse.config import Speed; from prosparse.speed import settle, thaw_gc\n"
        "cpu, frozen = torch.device('cpu'), gc.get_freeze_count\n"
        "settle(Speed(freeze_gc=False), cpu); print(frozen())\n"
        "settle(Speed(), cpu); print(frozen() > 1000); thaw_gc(); print(frozen())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "0"]


def test_the_benchmark_of_the_ffn_runs_under_the_interpreter_and_compares_first(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "ffn.py"), "64", "96", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kernel"] == "triton" and set(result["seconds"]) >= {"silu_eager", "save_x1", "recompute_x1"}
    fault = "import prosparse.kernels.glu_triton as glu\nwhole = glu.backward\n"
    fault += "glu.backward = lambda *given: whole(*given[:5], 0 * given[5], *given[6:])\n"
    (tmp_path / "sitecustomize.py").write_text(fault)
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "nothing is timed" in done.stderr
