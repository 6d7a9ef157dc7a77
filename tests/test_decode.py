"""The sparse operators in every implementation against fp64 on every neuron, at the edges of shapes and values."""

import math
import os
import re
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from prosparse.activations import intermediate
from prosparse.config import Implementation
from prosparse.kernels import decode
from prosparse.kernels.decode import choose, dense, sparse_down, sparse_up

CPU = torch.device("cpu")
HERE = ["cpp", "eager"]
if find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":  # see conftest.py; else tests/gpu does it
    HERE.append("triton")
ACTIVATIONS = [("relu", 0.0), ("fatrelu", 0.5), ("fatrelu", 0.0), ("drelu", 0.0), ("drelu", 0.5)]
SHAPES = [(1, 37, 75), (3, 130, 64), (8, 33, 129)]  # tokens, neurons, hidden: no multiple of a block
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=HERE)
def implementation(request):
    if request.param == "cpp":
        choose("cpp", CPU)  # without a compiler: an error, not a skip
    return request.param


def numbers(batch: int, neurons: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"gate": (batch, neurons), "hidden": (batch, hidden), "up": (neurons, hidden), "down": (neurons, hidden)}
    shapes |= {"up_bias": (neurons,), "down_bias": (hidden,)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def reference(activation: str, threshold: float, n: dict[str, torch.Tensor], bias: bool = True) -> torch.Tensor:
    """x1 of every neuron in fp64."""
    up = F.linear(n["hidden"].double(), n["up"].double(), n["up_bias"].double() if bias else None)
    return intermediate(activation, threshold, n["gate"].double(), up)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= TOLERANCE[found.dtype], error.item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("activation", "threshold"), ACTIVATIONS)
def test_the_operators_equal_fp64_over_every_neuron(implementation, activation, threshold, shape, dtype):
    if implementation == "triton" and dtype is not torch.bfloat16:
        pytest.skip("the interpreter is slow: of every dtype it runs the shapes of many blocks, below")
    for bias in (True, False):
        n = numbers(*shape, dtype)
        n["gate"][:, 3] = threshold  # kept by >=, and 0 for ReLU
        x1 = sparse_up(
            n["gate"], n["hidden"], n["up"], activation, threshold, n["up_bias"] if bias else None, implementation
        )
        expected = reference(activation, threshold, n, bias)
        assert x1.dtype == dtype and x1.shape == expected.shape
        assert_near(x1, expected)
        assert not x1[~decode.passes(n["gate"], activation, threshold)].any()
        out = sparse_down(x1, n["down"], n["down_bias"] if bias else None, implementation)
        assert out.dtype == dtype
        assert_near(out, x1.double() @ n["down"].double() + (n["down_bias"].double() if bias else 0))


@pytest.mark.parametrize("batch", range(1, decode.MOST_TOKENS + 1))
def test_tokens_that_lie_apart_in_memory_one_to_eight(implementation, batch):
    shapes = [(37, 75)] if implementation == "triton" else [(37, 75), (1, 5), (3, 300)]  # 5: less than a vector
    for neurons, hidden in shapes:
        n = numbers(batch, neurons, hidden, torch.float32)
        n["gate"][0] += 9.0  # where there is one neuron, it fires
        expected = reference("relu", 0.0, n)
        down = expected @ n["down"].double() + n["down_bias"].double()
        apart = {name: torch.stack([t, -t], -1)[..., 0] for name, t in n.items() if name not in ("up", "down")}
        assert not any(t.is_contiguous() for t in apart.values() if t.numel() > 1)
        x1 = sparse_up(
            apart["gate"], apart["hidden"], n["up"], "relu", bias=apart["up_bias"], implementation=implementation
        )
        assert_near(x1, expected)
        x1 = torch.stack([x1, -x1], -1)[..., 0]
        assert_near(sparse_down(x1, n["down"], apart["down_bias"], implementation), down)
        gate = dense(apart["hidden"], n["up"], apart["up_bias"], Implementation(implementation))
        assert_near(gate, F.linear(*(n[name].double() for name in ("hidden", "up", "up_bias"))))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.skipif("triton" not in HERE, reason="Triton's interpreter is off: tests/gpu has shapes of many blocks")
def test_triton_adds_up_the_blocks_of_a_row_and_the_shares_of_the_neurons(monkeypatch, dtype):
    from prosparse.kernels import decode_triton

    for name, value in {"COLUMNS": 64, "ROWS": 4, "SPLITS": 2}.items():
        monkeypatch.setattr(decode_triton, name, value)
    n = numbers(3, 70, 129, dtype)
    x1 = sparse_up(n["gate"], n["hidden"], n["up"], "relu", 0.0, n["up_bias"], "triton")
    assert_near(x1, reference("relu", 0.0, n))
    out = sparse_down(x1, n["down"], n["down_bias"], "triton")
    assert_near(out, x1.double() @ n["down"].double() + n["down_bias"].double())


@pytest.mark.parametrize("shift", [9.0, -9.0], ids=["all", "none"])
def test_all_neurons_or_none(implementation, shift):
    n = numbers(3, 130, 64, torch.float32)
    n["gate"] += shift
    x1 = sparse_up(n["gate"], n["hidden"], n["up"], "relu", implementation=implementation)
    assert_near(x1, reference("relu", 0.0, n, bias=False))
    out = sparse_down(x1, n["down"], n["down_bias"], implementation)
    assert_near(out, x1.double() @ n["down"].double() + n["down_bias"].double())
    assert bool(x1.any()) == (shift > 0)


@pytest.mark.parametrize(("activation", "threshold"), ACTIVATIONS)
def test_minus_zero_nan_and_infinity_in_the_gate_are_what_the_activation_makes_of_them(
    implementation, activation, threshold
):
    n = numbers(3, 37, 75, torch.float32)
    n["gate"][0, :5] = torch.tensor([-0.0, 0.0, math.nan, math.inf, -math.inf])
    n["gate"][2, 4] = 2.0  # another token needs that neuron
    x1 = sparse_up(n["gate"], n["hidden"], n["up"], activation, threshold, implementation=implementation)
    torch.testing.assert_close(x1, reference(activation, threshold, n, bias=False).float(), equal_nan=True)
    out = sparse_down(x1, n["down"], implementation=implementation)
    torch.testing.assert_close(out, x1 @ n["down"], equal_nan=True)


def test_the_rows_of_cut_neurons_are_not_read(implementation):
    n = numbers(2, 130, 64, torch.bfloat16)
    cut = (n["gate"] <= 0).all(0)
    n["up"][cut] = n["down"][cut] = math.nan
    x1 = sparse_up(n["gate"], n["hidden"], n["up"], "relu", implementation=implementation)
    assert (
        cut.any() and x1.isfinite().all() and sparse_down(x1, n["down"], implementation=implementation).isfinite().all()
    )


def test_the_threshold_is_rounded_as_torch_compares(implementation):
    n = numbers(1, 37, 64, torch.bfloat16)
    n["gate"][:] = 0.01  # in bf16 0.0100098, and so is a threshold of 0.01
    kept = sparse_up(n["gate"], n["hidden"], n["up"], "fatrelu", 0.01, implementation=implementation)
    cut = sparse_up(n["gate"], n["hidden"], n["up"], "fatrelu", 0.0101, implementation=implementation)
    assert kept.all() and not cut.any()


def test_weights_above_two_gigabytes_are_addressed(implementation):
    if implementation != "cpp":
        pytest.skip("once is enough, in the fastest")
    neurons, hidden = 70_000, 16_000  # 2.24 GB, of which one row is written
    rows = torch.empty(neurons, hidden, dtype=torch.bfloat16)
    rows[-1] = 1
    x1 = torch.zeros(1, neurons, dtype=torch.bfloat16)
    x1[0, -1] = 2
    assert (sparse_down(x1, rows, implementation=implementation) == 2).all()


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_dense_projection_equals_torch(batch):
    for dtype in TOLERANCE:
        n = numbers(batch, 37, 75, dtype)
        found = dense(n["hidden"], n["up"], n["up_bias"], choose("cpp", CPU))
        assert_near(found, F.linear(*(n[name].double() for name in ("hidden", "up", "up_bias"))))


def test_sums_do_not_depend_on_the_number_of_threads():
    n = numbers(3, 1000, 640, torch.float32)
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x1 = sparse_up(n["gate"], n["hidden"], n["up"], "relu", implementation="cpp")
        outs.append(sparse_down(x1, n["down"], implementation="cpp"))
    torch.set_num_threads(1)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_what_cannot_be_computed_is_one_clear_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choose.cache_clear()
    n = numbers(2, 37, 64, torch.float32)
    with pytest.raises(ValueError, match=r"activation is silu: only relu, fatrelu, drelu"):
        sparse_up(n["gate"], n["hidden"], n["up"], "silu")
    with pytest.raises(ValueError, match="give 1 to 8 tokens of 64 numbers"):
        sparse_up(n["gate"], n["hidden"].repeat(5, 1), n["up"], "relu")
    with pytest.raises(ValueError, match=r"gate has the shape \[2, 36\], not \[2, 37\]"):
        sparse_up(n["gate"][:, 1:], n["hidden"], n["up"], "relu")
    with pytest.raises(ValueError, match="not contiguous"):
        sparse_down(n["hidden"][:, :64], torch.randn(32, 64).t())
    with pytest.raises(ValueError, match="dtypes are"):
        sparse_down(n["gate"].bfloat16(), n["down"])
    with pytest.raises(ValueError, match="the tensors are on cpu, meta: give all on one device"):
        sparse_down(n["gate"], n["down"].to("meta"))
    with pytest.raises(ValueError, match="the tensors are on cpu, meta"):
        sparse_up(n["gate"].to("meta"), n["hidden"], n["up"], "relu")
    with pytest.raises(ValueError, match="the tensors are on cpu, meta"):
        sparse_down(n["gate"], n["down"], n["down_bias"].to("meta"))
    for shape in [(37, 0), (0, 64), (37,)]:
        with pytest.raises(ValueError, match=r"a weight has the shape .*: give \[neurons, hidden\]"):
            sparse_up(n["gate"], n["hidden"], torch.empty(shape), "relu")
        with pytest.raises(ValueError, match=r"a weight has the shape .*: give \[neurons, hidden\]"):
            sparse_down(n["gate"], torch.empty(shape))
    for wrong in (torch.ones(1), torch.ones(3), torch.ones(1, 37), torch.ones(())):
        said = re.escape(f"the bias has the shape {list(wrong.shape)}, not [")
        with pytest.raises(ValueError, match=said + "37"):
            sparse_up(n["gate"], n["hidden"], n["up"], "relu", bias=wrong, implementation="cpp")
        with pytest.raises(ValueError, match=said + "64"):
            sparse_down(n["gate"], n["down"], wrong, "cpp")
        with pytest.raises(ValueError, match=said + "37"):
            dense(n["hidden"], n["up"], wrong, Implementation.cpp)
    with pytest.raises(ValueError, match="implementation is triton, but the weights are on cpu: choose cpp or eager"):
        sparse_down(n["gate"], n["down"], implementation="triton")


def test_without_a_compiler_auto_says_so_and_cpp_is_an_error(monkeypatch, capsys):
    assert choose("auto", CPU) is Implementation.cpp and capsys.readouterr().err == ""

    def none():
        raise OSError("there is no c++")

    monkeypatch.setattr(decode, "_compiled", none)
    choose.cache_clear()
    with pytest.raises(ValueError, match=r"implementation cpp needs a C\+\+ compiler and ninja \(there is no c\+\+\)"):
        choose("cpp", CPU)
    assert choose("auto", CPU) is Implementation.eager
    assert "implementation is eager, which gathers rows through torch and is slower" in capsys.readouterr().err
    choose.cache_clear()
