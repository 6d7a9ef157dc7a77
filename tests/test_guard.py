"""The spike guard, and where values stop to be finite."""

import random
from statistics import fmean, pstdev

import pytest
import torch
from conftest import tiny_llama

from prosparse import guard
from prosparse.config import Guard


def test_the_running_mean_and_deviation_are_the_plain_ones_until_there_is_something_to_forget():
    noise, memory, how = random.Random(0), {}, Guard(memory=100, after=10)
    values = [noise.gauss(3, 0.5) for _ in range(30)]
    for number, value in enumerate(values):
        expected = None if number < 10 else (value - fmean(values[:number])) / pstdev(values[:number])
        assert guard.deviations(memory, value, how) == (None if expected is None else pytest.approx(expected))
        guard.remember(memory, value, how)
    assert memory["count"] == 30


def test_old_losses_are_forgotten():
    memory, how = {}, Guard(memory=10, after=2)
    for value in [9.0] * 50 + [2.0] * 100:
        guard.remember(memory, value, how)
    assert memory["mean"] == pytest.approx(2.0, abs=1e-3)


def test_a_falling_loss_is_no_spike_and_a_jump_is():
    memory, how, noise = {}, Guard(), random.Random(1)
    for step in range(600):
        loss = 3 + 5 / (1 + step) + noise.gauss(0, 0.05)
        away = guard.deviations(memory, loss, how)
        assert away is None or away < how.deviations
        guard.remember(memory, loss, how)
    assert guard.deviations(memory, 4.5, how) > how.deviations


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_the_first_place_where_values_are_not_finite_is_named(checkpointing):
    model = tiny_llama().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    ids = torch.arange(20)[None]
    with guard.watching(model) as places:
        model(ids, labels=ids).loss.backward()
    assert places[0] == "output of model.layers.1.mlp.up_proj"
    assert sum(place.startswith("output") for place in places) <= 3
    with guard.watching(tiny_llama()) as none:
        pass
    assert none == []


def test_a_gradient_that_is_not_finite_is_named_too():
    model = tiny_llama().train()
    ids = torch.arange(20)[None]
    with guard.watching(model) as places:
        loss = model(ids, labels=ids).loss
        (loss * 1e38 * 1e38).backward()  # the loss is finite, its gradient overflows
    assert places and all(place.startswith("gradient of ") for place in places)
