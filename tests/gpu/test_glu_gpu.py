"""The fused FFN's Triton kernel on a real GPU: the formula's gradients and counts, the same every time."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from prosparse.activations import intermediate
from prosparse.kernels.glu import FUSED, gated
from prosparse.penalty import PenaltyContext, inject_l1, new_statistics


@pytest.mark.parametrize("shape", [(3, 17, 1001), (2, 256, 11008)])
@pytest.mark.parametrize("name", FUSED)
def test_gradients_and_counts_are_those_of_the_formula_and_repeat_bit_for_bit(name, shape):
    torch.manual_seed(0)
    gate, up, gradient = (torch.randn(shape, device="cuda").bfloat16() for _ in range(3))
    mask = torch.rand(shape[:-1], device="cuda") > 0.2
    param = 0.25 if name == "fatrelu" else 0.0

    def fused():
        told = PenaltyContext(torch.tensor(50.0, device="cuda"), new_statistics(1, "cuda"), mask)
        g, u = (part.clone().requires_grad_() for part in (gate, up))
        x1 = gated(g, u, name, param, "triton", told, 0)
        x1.backward(gradient)
        return x1.detach(), g.grad, u.grad, told.statistics

    told = PenaltyContext(torch.tensor(50.0, device="cuda").double(), new_statistics(1, "cuda"), mask)
    g, u = (part.double().requires_grad_() for part in (gate, up))
    x1 = inject_l1(intermediate(name, param, g, u), told, 0)
    x1.backward(gradient.double())
    first, second = fused(), fused()
    for ours, again, theirs in zip(first, second, (x1.detach(), g.grad, u.grad), strict=False):
        assert torch.equal(ours, again)
        assert (ours.double() - theirs).norm() < 1e-2 * theirs.norm()
    assert torch.equal(first[3][:, 1:], told.statistics[:, 1:])
