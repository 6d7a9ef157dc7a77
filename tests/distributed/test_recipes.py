"""Every shipped recipe, scaled down, trains a tiny model through all of its stages."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, metrics, tiny_overrides

from prosparse import schedule
from prosparse.cli import compose

pytestmark = pytest.mark.timeout(200)
SLOW = sorted({path.stem for path in (ROOT / "configs" / "recipe").glob("*.yaml")} - {"prosparse_7b"})


def scaled(tiny: dict[str, Path], run_dir: Path, recipe: str) -> list[str]:
    """Overrides: 1/1000 of the steps, at least one a stage, 4 rows of 64 tokens."""
    kept = [o for o in tiny_overrides(tiny, run_dir) if not o.startswith("recipe.")]
    if recipe == "prosparse_1b":  # names the sources of its own data group
        texts = [f"data.sources.{name}.path={tiny['text']}" for name in ("starcoder", "wikipedia", "pile")]
        kept = ["data=minicpm" if o == "data=files" else o for o in kept if not o.startswith("data.sources.")]
        kept += [*texts, f"data.sources.ultrachat.path={tiny['chat']}", "recipe.stages.sft.batch.sequences=1200"]
        kept.insert(0, f"recipe={recipe}")
    whole = compose("train", [*kept, f"recipe={recipe}"]).recipe
    contexts = [f"recipe.stages.{name}.batch.context=64" for name, s in whole.stages.items() if s.batch.context]
    batch = [f"recipe.scale.batch={4 / whole.batch.sequences}", "recipe.batch.context=64", *contexts]
    return [*kept, f"recipe={recipe}", "recipe.scale.steps=1e-3", "evaluate.every=0", *batch]


@pytest.mark.parametrize("recipe", ["prosparse_7b", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_recipe_scaled_down_goes_through_all_of_its_stages(nursery, tiny, tmp_path, recipe):
    overrides = scaled(tiny, tmp_path / "run", recipe)
    group = nursery.run(overrides, log=tmp_path / "log")
    assert group.codes == [0, 0], group.text()[-3000:]
    small = schedule.scaled(compose("train", overrides).recipe)
    rows = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert [row["stage"] for row in rows] == [schedule.stage_at(small, row["step"]).name for row in rows]
    assert {row["stage"] for row in rows} == set(small.stages)
    known = [row for row in rows if schedule.steered(small, row["step"]) is None]
    assert [row["l1_factor"] for row in known] == [schedule.l1_factor(small, row["step"]) for row in known]
    assert [row["step"] for row in rows if row["target"] is None] == [row["step"] for row in known]
    assert [row["lr"] for row in rows] == [schedule.learning_rate(small, row["step"]) for row in rows]
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["steps"] == schedule.total_steps(small) and "exported" in report["models"]
    assert (tmp_path / "run" / "report" / "training.png").stat().st_size > 10_000
