"""The costs that docs/recipes.md states are those of the recipes, by the formula that runs report with."""

import re

import pytest
import torch
import yaml
from conftest import ROOT
from test_schedule import shipped
from transformers import LlamaConfig, LlamaForCausalLM

from prosparse import schedule
from prosparse.telemetry import PEAK_FLOPS, training_flops

ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| ([\d.]+) ([BMk]) \| ([\d.e]+) \| ([\d,]+|below 1) \|", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "recipes.md").read_text())


def test_every_recipe_has_its_costs():
    recipes = {path.stem for path in (ROOT / "configs" / "recipe").glob("*.yaml")}
    assert recipes == {row[0] for row in ROWS}


@pytest.mark.parametrize(("recipe", "model", "tokens", "unit", "flops", "hours"), ROWS)
def test_tokens_flops_and_hours_follow_from_recipe_and_shapes(recipe, model, tokens, unit, flops, hours):
    shape = yaml.safe_load((ROOT / "configs" / "model" / f"{model}.yaml").read_text())["shape"]
    with torch.device("meta"):
        sized = LlamaForCausalLM(LlamaConfig(**shape))
    chosen = shipped(recipe)
    costs = [(s.stage.steps, *schedule.batch_at(chosen, s.first)) for s in schedule.spans(chosen)]
    whole = sum(steps * rows * context * training_flops(sized, context) for steps, rows, context in costs)
    assert float(tokens) * {"B": 1e9, "M": 1e6, "k": 1e3}[unit] == pytest.approx(
        schedule.total_tokens(chosen), rel=5e-3
    )
    assert float(flops) == pytest.approx(whole, rel=2e-2)
    spent = whole / (0.4 * PEAK_FLOPS["A100"]) / 3600
    assert spent < 1 if hours == "below 1" else int(hours.replace(",", "")) == pytest.approx(spent, rel=3e-2)
