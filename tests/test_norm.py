"""The fused RMSNorm: bit-equal outputs, the gradients of the formula, only where a module is one."""

import copy

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from prosparse.kernels.norm import fuse


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_bit_equal_and_gradients_those_of_the_formula(kind, dtype):
    torch.manual_seed(0)
    module, gradient = kind(64, eps=1e-5), torch.randn(2, 7, 64).to(dtype)
    module.weight.data = torch.randn(64).to(dtype)
    x = torch.randn(2, 7, 64).to(dtype).requires_grad_()
    plain = module(x)
    wide, weight = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    exact = weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    exact.backward(gradient.double())
    assert fuse(module)
    fused = module(x)
    fused.backward(gradient)
    assert torch.equal(fused, plain)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(x.grad.double(), wide.grad, **tolerance)
    torch.testing.assert_close(module.weight.grad.double(), weight.grad, **tolerance)


def test_a_norm_of_another_kind_stays():
    module, x = GemmaRMSNorm(16), torch.randn(3, 16)
    before = module(x)
    assert not fuse(module) and torch.equal(module(x), before) and "forward" not in vars(module)
    assert not fuse(torch.nn.LayerNorm(16))


def test_what_is_kept_for_backward_is_the_input_and_a_number_a_token():
    module, x, kept = LlamaRMSNorm(512).bfloat16(), torch.randn(8, 512).bfloat16().requires_grad_(), []
    assert fuse(module)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert sum(t.numel() * t.element_size() for t in kept if t is not x and t is not module.weight) <= 8 * 4


def test_a_copy_of_a_fused_norm_has_its_own_weight():
    module, x = LlamaRMSNorm(16), torch.randn(3, 16)
    fuse(module)
    twin = copy.deepcopy(module)
    twin.weight.data.fill_(2.0)
    assert torch.equal(twin(x), 2 * module(x))
