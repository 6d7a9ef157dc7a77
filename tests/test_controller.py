"""Steering λ: a simulated model whose sparsity follows log λ slowly and noisily, and the estimate of a sweep."""

import random
from math import log

import pytest

from prosparse import controller


def simulate(tau: float, slope: float, wrong: float, steps: int = 80, hold: int = 60) -> tuple[list, list]:
    """(set-points, sparsities) of a model that goes to 0.74 + slope · log λ with time constant tau (steps)."""
    noise, sparsity, share = random.Random(0), 0.68, 0.0
    memory = controller.begin("rise", sparsity, 0.1 * wrong, slope / tau)
    wanted, found = [], []
    for step in range(1, steps + hold + 1):
        share = min(1.0, step / steps)
        wanted.append(0.68 + share * 0.07)
        before = memory["log"]
        sparsity += (max(0.74 + slope * log(controller.factor(memory)), 0.6) - sparsity) / tau
        controller.observe(memory, sparsity + noise.gauss(0, 0.008), wanted[-1], steps if step <= steps else hold)
        assert abs(memory["log"] - before) <= controller.FASTEST + 1e-12
        assert controller.LOWEST * 0.999 <= controller.factor(memory) <= controller.HIGHEST * 1.001
        found.append(sparsity)
    return wanted, found


@pytest.mark.parametrize(("tau", "slope"), [(40, 0.03), (60, 0.043), (150, 0.06)])
@pytest.mark.parametrize("wrong", [0.1, 1, 10])
def test_sparsity_follows_the_set_point_whatever_the_first_factor(tau, slope, wrong):
    wanted, found = simulate(tau, slope, wrong)
    assert abs(found[-1] - 0.75) < 0.01
    assert max(abs(a - b) for a, b in zip(wanted[40:], found[40:], strict=True)) < 0.045


def test_what_is_out_of_reach_leaves_the_factor_at_its_bound_and_comes_back_at_once():
    memory = controller.begin("rise", 0.5, 1.0, 0.01)
    for _ in range(200):
        controller.observe(memory, 0.5, 0.9, 100)
    assert controller.factor(memory) == pytest.approx(controller.HIGHEST)
    assert "sparsity of 90.00%" in controller.told(memory) and "had 50.00%" in controller.told(memory)
    assert controller.told(memory).endswith("its bound")
    for _ in range(30):
        controller.observe(memory, 0.95, 0.9, 100)
    assert controller.factor(memory) < controller.HIGHEST / 2


def test_the_estimate_interpolates_log_factor_between_two_probes():
    probes = [(0.01, 0.50), (0.1, 0.52), (1.0, 0.60)]
    chosen, slope = controller.estimate(0.5, probes, 0.06, 4)
    assert chosen == pytest.approx(10**-0.5) and slope == pytest.approx(0.08 / log(10) / 4)
    assert controller.estimate(0.5, probes, 0.5, 4)[0] == pytest.approx(1.0)  # none suffices
    assert controller.estimate(0.5, probes, -0.01, 4)[0] == pytest.approx(0.01)  # all do
