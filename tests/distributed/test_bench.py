"""`prosparse bench what=train`: its rivals compute the same, take turns, and a wrong answer is refused."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prosparse import training_benchmark

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": "true",
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_ours_and_the_hooks_walk_the_same_way_and_their_ratios_are_written(tmp_path, ranks):
    shape = ",".join(f"{key}: {value}" for key, value in SHAPE.items())
    given = ["what=train", f"out={tmp_path}", f"model.shape={{{shape}}}", "device=cpu", "threads=1", f"ranks={ranks}"]
    given += ["rounds=3", "warmup=2", "micro_batch=2", "recipe.batch.sequences=8", "recipe.batch.context=16"]
    command = [sys.executable, "-m", "prosparse.cli", "bench", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1])["vs_hooks"] == result["vs_hooks"]
    assert result["vs_hooks"]["largest_loss_difference"] < 5e-3 and result["vs_hooks"]["largest_l1_difference"] < 5e-3
    for ratio in (result["vs_silu"]["step_time"], result["vs_hooks"]["tokens_per_second"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    arms = result["arms"]
    assert set(arms) == {"ours", "silu", "hooks"} and all(len(arm["seconds"]) == 3 for arm in arms.values())
    assert all(len(arm["losses"]) == 5 and arm["memory_bytes"] > 1e8 for arm in arms.values())
    assert set(arms["ours"]["parts"]) == {"ffn", "loss", "optimizer", "communication"}
    assert all(0 <= share < 1 for share in arms["ours"]["parts"].values())
    assert ranks == 1 or arms["ours"]["parts"]["communication"] > 0
    assert arms["hooks"]["options"]["optim"] == "adamw_torch_fused" and "hooks" in done.stderr
    assert (tmp_path / "train.png").stat().st_size > 10_000


def test_a_rival_that_computes_something_else_is_refused():
    rows = [{"loss": 5.0, "l1": 0.1}, {"loss": 4.9, "l1": 0.1}]
    arms = {"ours": SimpleNamespace(rows=rows), "hooks": SimpleNamespace(rows=[rows[0], {"loss": 4.9, "l1": 0.11}])}
    with pytest.raises(RuntimeError, match="do not compute the same: their l1 differs by 9"):
        training_benchmark._compare(arms)
