"""The scripts of launch/ start what they say."""

import os
import re
import subprocess

import pytest
from conftest import ROOT, tiny_overrides

SCRIPTS = [path for path in sorted((ROOT / "launch").iterdir()) if path.read_text().startswith("#!")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_torchrun_sh_starts_two_ranks_with_a_log_each_and_preflight_only_leaves_nothing(tiny, tmp_path):
    run_dir = tmp_path / "run"
    done = subprocess.run(
        ["bash", "launch/torchrun.sh", *tiny_overrides(tiny, run_dir), "preflight=only"],
        cwd=ROOT, env=os.environ | {"LOGS": str(tmp_path / "logs")}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    logs = {path.parent.name: path.read_text() for path in (tmp_path / "logs" / "node-0").rglob("stderr.log")}
    assert set(logs) == {"0", "1"}
    found = r"preflight 2 ranks on 1 host in [\d.]+ s: same code, config and versions; clocks within \d+ ms; all-reduce"
    assert re.search(found, logs["0"]) and "prosparse" not in logs["1"] and "preflight" not in logs["1"]
    assert re.search(found, done.stderr)  # and on the terminal
    assert not run_dir.exists()
