"""A target stage: λ is steered until sparsity is what was asked for, and goes on so after a stop."""

import json
import signal

import pytest
from conftest import metrics, tiny_overrides, trained

pytestmark = pytest.mark.timeout(300)
RECIPE = [
    "recipe=target",
    "recipe.stages.substitution.steps=40",
    "recipe.stages.rise.steps=80",
    "recipe.stages.hold.steps=60",
    "recipe.batch.context=32",
    "recipe.lr.peak=1e-3",
    "recipe.stages.rise.l1.sparsity=0.45",
    "recipe.stages.hold.l1.sparsity=0.45",
    "save.every=50",
    "micro_batch=2",
]


@pytest.fixture(scope="module")
def go(nursery, tiny, tmp_path_factory):
    """go(name, *overrides): one start of the run of that name, with 2 ranks."""
    root = tmp_path_factory.mktemp("target")

    def start(name: str, *overrides: str):
        if (root / name / "report" / "report.json").is_file():
            return root / name
        kept = [o for o in tiny_overrides(tiny, root / name) if not o.startswith(("recipe.", "save."))]
        group = nursery.run([*kept, *RECIPE, "evaluate.every=0", *overrides], log=root / f"{name}.log")
        assert group.codes == [0, 0], group.text()[-4000:]
        return root / name

    return start


def test_sparsity_ends_where_it_was_asked_to(go):
    run = go("whole")
    rows = [row for row in metrics(run) if row["kind"] == "train"]
    (sweep,) = [row for row in metrics(run) if row["kind"] == "sweep"]
    assert [row["target"] for row in rows[:40]] == [None] * 40 and rows[40]["l1_factor"] == sweep["l1_factor_mean"]
    goals = [row["target"] for row in rows[40:]]
    assert goals == sorted(goals) and goals[0] < sweep["before"] + 0.01 and goals[79:] == pytest.approx([0.45] * 61)
    assert sum(row["sparsity"] for row in rows[-10:]) / 10 == pytest.approx(0.45, abs=0.025)
    assert len({row["l1_factor"] for row in rows[40:]}) == 140
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["models"]["trained"]["sparsity"] == pytest.approx(0.45, abs=0.03)


@pytest.mark.parametrize("zero", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_steered_run_that_was_stopped_is_bit_equal_and_its_sweep_leaves_no_trace(go, zero):
    whole = go("whole" if zero == "zero2" else f"whole {zero}", f"zero={zero}", "evaluate.rows=4")
    parts = go(f"parts {zero}", f"zero={zero}", "until=substitution")
    go(f"parts {zero}", f"zero={zero}", "until=rise")
    go(f"parts {zero}", f"zero={zero}")
    assert trained(parts) == trained(whole)
    kinds = [row["kind"] for row in metrics(parts)]
    assert kinds.count("sweep") == 1


def test_a_sweep_is_taken_back_under_zero3_too(go):
    few = ["recipe.stages.rise.steps=2", "recipe.stages.hold.steps=1", "until=rise"]
    runs = [go(f"few {zero}", f"zero={zero}", *few) for zero in ("zero2", "zero3")]
    sweeps = [next(row for row in metrics(run) if row["kind"] == "sweep") for run in runs]
    assert len(sweeps[0]["probes"]) > 2
    for one, other in zip(*(sweep["probes"] for sweep in sweeps), strict=True):
        assert one == pytest.approx(other, abs=5e-3)
    first = [trained(run)[40] for run in runs]  # after the sweep
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_stop_in_the_sweep_leaves_the_checkpoint_before_it(go, nursery, tiny, tmp_path):
    whole = go("whole")
    kept = [o for o in tiny_overrides(tiny, tmp_path / "run") if not o.startswith(("recipe.", "save."))]
    group = nursery.start([*kept, *RECIPE, "evaluate.every=0"], log=tmp_path / "log")
    assert group.wait_for("sweep    λ 0.01 ")
    group.signal(signal.SIGTERM, rank=1)
    assert group.wait(60) == [75, 75], group.text()[-2000:]
    assert "stopped after step" in group.text()
    again = nursery.run([*kept, *RECIPE, "evaluate.every=0"], log=tmp_path / "log")
    assert again.codes == [0, 0] and trained(tmp_path / "run") == trained(whole)
