"""The divergence to a teacher: its value, its gradient, its memory; what does not fit is refused."""

from copy import deepcopy
from math import prod

import pytest
import torch
import torch.nn.functional as F
from test_models import BASES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config

from prosparse import distillation
from prosparse.cli import compose
from prosparse.distillation import Teacher, check_head, divergence, freeze, take_head


def example(rows: int, context: int, vocabulary: int, dtype: torch.dtype = torch.float32, biased: bool = False):
    """Logits, hidden states, weight, bias, labels; half of the last row is not labeled."""
    torch.manual_seed(0)
    logits, hidden = torch.randn(rows, context, vocabulary), torch.randn(rows, context, 16)
    weight, bias = torch.randn(vocabulary, 16) / 4, torch.randn(vocabulary) if biased else None
    labels = torch.randint(vocabulary, (rows, context))
    labels[-1, context // 2 :] = -100
    cast = [None if x is None else x.to(dtype) for x in (logits, hidden, weight, bias)]
    cast[0].requires_grad_()
    return *cast, labels


def written_out(logits, hidden, weight, bias, labels, temperature: float) -> tuple[float, torch.Tensor]:
    """Summed KL and its gradient in fp64, from the formula."""
    leaf = logits.detach().double().requires_grad_()
    teacher = F.linear(hidden, weight, bias).double()
    kept = labels != -100
    share = (teacher[kept] / temperature).softmax(-1)
    total = (share * (share.log() - (leaf[kept] / temperature).softmax(-1).log())).sum()
    total.backward()
    return total.item(), leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, 19, 256])  # 30 positions are counted
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradient_are_those_of_the_formula_for_any_chunk(monkeypatch, temperature, chunk, biased):
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    given = example(2, 20, 50, biased=biased)
    total = divergence(*given, temperature)
    (3 * total).backward()
    expected, gradient = written_out(*given, temperature)
    assert total.dtype == torch.float32 and total.item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(given[0].grad.double(), 3 * gradient, rtol=1e-4, atol=1e-6)


def test_bf16_logits_get_a_gradient_of_their_own_precision():
    given = example(2, 20, 50, torch.bfloat16)
    total = divergence(*given, 2.0)
    total.backward()
    expected, gradient = written_out(*given, 2.0)
    assert given[0].grad.dtype == torch.bfloat16 and total.item() == pytest.approx(expected, rel=1e-4)
    assert (given[0].grad.double() - gradient).norm() < 2**-8 * gradient.norm()


def test_rows_without_a_label_add_nothing():
    given = example(1, 6, 9)
    total = divergence(*given[:-1], torch.full((1, 6), -100), 1.0)
    total.backward()
    assert total.item() == 0 and not given[0].grad.any()


class Largest(TorchDispatchMode):
    """Counts the results of operations of at least so many elements, that are not views, by dtype."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements, self.found = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            whole = isinstance(x, torch.Tensor) and prod(x.shape) >= self.elements
            if whole and x.untyped_storage().data_ptr() not in before:
                self.found.append((str(func), x.dtype))
        return result


def test_nothing_as_large_as_the_logits_is_made_but_their_gradient():
    logits, hidden, weight, _, labels = example(2, 600, 3000, torch.bfloat16)
    with Largest(512 * 3000) as largest:
        divergence(logits, hidden, weight, None, labels, 1.0).backward()
    assert [dtype for _, dtype in largest.found] == [torch.bfloat16], largest.found
    assert logits.grad is not None


def headless(config) -> tuple[Teacher, torch.Tensor, torch.Tensor]:
    """A random model as a teacher, with what it gave as a whole for some tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    teacher, ids = Teacher(model, freeze(model)), torch.arange(2, 18).view(2, 8)
    logits = model(input_ids=ids).logits.detach()
    take_head(model)
    return teacher, logits, ids


@pytest.mark.parametrize("family", BASES)
def test_every_family_can_teach(family):
    teacher, logits, ids = headless(deepcopy(BASES[family]))
    check_head(teacher, logits, ids)
    head = teacher.head
    assert teacher.hidden(input_ids=ids).shape[-1] == head.in_features
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert divergence(logits, teacher.hidden(input_ids=ids), head.weight, head.bias, ids, 1.0).item() == pytest.approx(
        0, abs=1e-4
    )


def test_a_teacher_with_a_soft_cap_after_its_head_is_refused():
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.1)
    with pytest.raises(ValueError, match="its logits are not what its output head gives"):
        check_head(*headless(config))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.stages.rise.distillation.weight=-1", "recipe.stages.rise.distillation.weight is -1"),
        ("recipe.stages.rise.distillation.weight=inf", "recipe.stages.rise.distillation.weight is inf"),
        ("recipe.stages.rise.distillation.temperature=0", "recipe.stages.rise.distillation.temperature is 0"),
        ("teacher=somebody", "teacher=somebody, but no stage distills: set recipe.stages.NAME.distillation.weight"),
    ],
)
def test_what_makes_no_sense_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        compose("train", ["experiment=demo", override])
