"""`prosparse bench what=train`: its rivals compute the same, take turns, and a wrong answer is refused."""

import json
import os
import subprocess
import sys

import pytest

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": "true",
}  # fmt: skip


def bench(out, environment, *more):
    shape = ",".join(f"{key}: {value}" for key, value in SHAPE.items())
    given = ["what=train", f"out={out}", f"model.shape={{{shape}}}", "device=cpu", "threads=1", *more]
    given += ["micro_batch=2", "recipe.batch.sequences=8", "recipe.batch.context=16"]
    command = [sys.executable, "-m", "prosparse.cli", "bench", *given]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | environment)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ours_and_the_hooks_walk_the_same_way_and_their_ratios_are_written(tmp_path, ranks):
    done = bench(tmp_path, {}, f"ranks={ranks}", "rounds=3", "warmup=2", "rivals=[silu,control,hooks]")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1])["vs_hooks"] == result["vs_hooks"]
    far = result["largest_differences"]
    assert set(far) == {"ours, hooks", "control, silu"}
    assert all(0 <= pair["loss"] < 5e-3 and pair["l1"] < 5e-3 and pair["gradient"] < 0.05 for pair in far.values())
    for ratio in (result["vs_silu"]["step_time"], result["vs_hooks"]["tokens_per_second"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    arms = result["arms"]
    assert set(arms) == {"ours", "silu", "control", "hooks"} and all(len(arm["seconds"]) == 3 for arm in arms.values())
    assert all(len(arm["losses"]) == 5 and arm["memory_bytes"] > 1e8 for arm in arms.values())
    assert set(arms["ours"]["parts"]) == {"ffn", "loss", "optimizer", "communication"}
    assert all(0 <= share < 1 for share in arms["ours"]["parts"].values())
    assert ranks == 1 or arms["ours"]["parts"]["communication"] > 0
    assert arms["hooks"]["options"]["optim"] == "adamw_torch_fused" and "hooks" in done.stderr
    assert (tmp_path / "train.png").stat().st_size > 10_000


NO_GRADIENT = """import prosparse.kernels.glu as glu; whole = glu._backward
glu._backward = lambda *given: (*(0 * part for part in whole(*given)[:2]), whole(*given)[2])"""
NO_PENALTY = """import prosparse.kernels.glu as glu; whole = glu._backward
glu._backward = lambda *given: whole(*given[:5], 0 * given[5], given[6])"""


@pytest.mark.parametrize(
    ("fault", "rivals", "pair"),
    [
        pytest.param(NO_GRADIENT, "hooks", "ours and hooks", marks=pytest.mark.slow),
        (NO_PENALTY, "hooks", "ours and hooks"),
        (NO_PENALTY, "", "ours and plain"),
        pytest.param(NO_GRADIENT, "control,silu", "ours and plain", marks=pytest.mark.slow),
    ],
)
def test_a_faster_wrong_answer_is_refused(tmp_path, fault, rivals, pair):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif sys.argv[0].endswith('rivals.py') or '-m' in sys.argv:\n"
        + "".join(f"    {line}\n" for line in fault.splitlines())
    )
    done = bench(tmp_path, {"PYTHONPATH": str(tmp_path)}, "ranks=1", "rounds=1", "warmup=1", f"rivals=[{rivals}]")
    assert done.returncode == 1 and f"{pair} do not compute the same: the gradient of" in done.stderr
    assert not (tmp_path / "result.json").exists()
