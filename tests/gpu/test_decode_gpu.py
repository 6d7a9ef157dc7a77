"""The Triton operators on a real GPU: equal to fp64, the same every time, faster than dense, inside a CUDA graph."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from transformers import LlamaConfig, LlamaForCausalLM

from prosparse.config import Implementation
from prosparse.decoding import enable_sparse_decoding
from prosparse.decoding_benchmark import decode
from prosparse.kernels.decode import sparse_down, sparse_up
from prosparse.verb_configs import Bench


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("neurons", "hidden"), [(11008, 4096), (1001, 777)])
def test_the_operators_equal_fp64_and_repeat_bit_for_bit(batch, neurons, hidden, dtype):
    torch.manual_seed(0)
    state, gate = torch.randn(batch, hidden), torch.randn(batch, neurons)
    up, down = torch.randn(neurons, hidden) / hidden**0.5, torch.randn(neurons, hidden) / neurons**0.5
    state, gate, up, down = (t.to("cuda", dtype) for t in (state, gate, up, down))
    for activation, threshold in (("relu", 0.0), ("fatrelu", 1.25), ("drelu", 0.5)):
        x1 = sparse_up(gate, state, up, activation, threshold, implementation="triton")
        eager = sparse_up(
            gate.double().float(), state.float(), up.float(), activation, threshold, implementation="eager"
        )
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-3}[dtype]
        torch.testing.assert_close(x1.float(), eager, rtol=tolerance, atol=tolerance)
        out = sparse_down(x1, down, implementation="triton")
        expected = x1.double() @ down.double()
        assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()
        assert torch.equal(out, sparse_down(x1, down, implementation="triton"))


def test_a_model_decodes_the_same_tokens():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 500}
    config = LlamaConfig(hidden_size=256, intermediate_size=700, hidden_act="relu", **heads)
    model = LlamaForCausalLM(config).eval().cuda()
    ids = torch.arange(12, device="cuda")[None]
    how = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **how)
    assert enable_sparse_decoding(model) is Implementation.triton
    assert torch.equal(model.generate(ids, **how), expected)


def test_the_operators_of_a_7b_model_are_three_times_as_fast_as_dense():
    result = decode(Bench(sparsities=[0.8932], batches=[1], rounds=5))
    for name in ("up", "down"):
        assert result["operators"][0][name]["speedup"]["median"] >= 3, result
