import json
import os
import subprocess
import sys
import time
from math import inf, nan

import pytest
from matplotlib.figure import Figure

from prosparse.cli import compose
from prosparse.config import Tracking, Wandb
from prosparse.telemetry import Eta, Metrics, Tracker, duration, progress_line, read_metrics, redact, text_lines

TRAIN = {
    "kind": "train",
    "step": 42,
    "stage": "rise",
    "loss": 2.914,
    "l1_factor": 0.125,
    "sparsity": 0.712,
    "sparsity_by_layer": [0.7, 0.724],
    "lr": 3e-4,
    "tokens_per_second": 312.4,
    "mfu": None,
}
EVALUATION = {"kind": "evaluation", "step": 42, "split": "held_out", "loss": 2.9, "perplexity": 18.174, "sparsity": 0.7}
EVALUATION["seconds"] = 13.0


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def steps(run_dir):
    return [(row["kind"], row["step"]) for row in read_metrics(run_dir)]


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_a_resume_cuts_the_rows_after_its_step(tmp_path):
    metrics = Metrics(tmp_path, -1)
    for step in (1, 2, 3):
        metrics.append({"kind": "train", "step": step})
        metrics.append({"kind": "evaluation", "step": step})
    Metrics(tmp_path, 2).append({"kind": "train", "step": 3})
    kept = [("train", 1), ("evaluation", 1), ("train", 2), ("evaluation", 2), ("train", 3)]
    assert steps(tmp_path) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    Metrics(tmp_path, -1)
    assert steps(tmp_path) == []


@pytest.mark.parametrize("part", [b'{"kind": "tra', b'{"kind": "train", "step": 2', '{"λ'.encode()[:-1], b"\0\0\0"])
def test_a_half_written_last_line_is_left_out_and_removed_by_a_resume(tmp_path, part):
    Metrics(tmp_path, -1).append({"kind": "train", "step": 1})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(part)
    assert steps(tmp_path) == [("train", 1)]
    Metrics(tmp_path, 5).append({"kind": "train", "step": 2})
    assert steps(tmp_path) == [("train", 1), ("train", 2)]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("line", ["", '{"st'])
def test_a_reader_that_takes_damage_is_told_each_line_that_is_left_out(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    damaged = []
    assert read_metrics(tmp_path, damaged) == [{"step": 1}, {"step": 3}]
    assert [told.split("metrics.jsonl, ")[1] for told in damaged] == ["line 2 is not JSON: it is left out"]
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(tmp_path)


def test_a_row_is_strict_json_and_in_the_file_at_once(tmp_path):
    row = {"kind": "train", "step": 1, "loss": nan, "sparsity_by_layer": [inf, 0.5], "mfu": None}
    Metrics(tmp_path, 0).append(row)
    assert strict((tmp_path / "metrics.jsonl").read_text()) == row | {"loss": None, "sparsity_by_layer": [None, 0.5]}


# --- what the terminal shows ------------------------------------------------------------------------------------------


def test_a_progress_line_shows_step_stage_loss_factor_sparsity_rate_and_time():
    line = progress_line(TRAIN, 150, 490.0)
    for part in ("42/150 rise", "loss  2.914", "λ 0.1250", "71.2 %", "lr 3.0e-04", "312 tok/s", "ETA 8 min 10 s"):
        assert part in line


def test_progress_lines_keep_their_columns():
    other = TRAIN | {"step": 150, "stage": "substitution", "loss": 11.2, "l1_factor": 5e-5, "lr": 1e-6, "sparsity": 0.0}
    lost = TRAIN | {"loss": None, "tokens_per_second": 98765.0}
    lines = [progress_line(row, 150, None) for row in (TRAIN, other, lost)]
    assert len({len(line) for line in lines}) == 1
    assert len({line.index("λ") for line in lines}) == 1


REPEATS = "stdlib runs out and repeats"
ANEW = "stdlib is begun anew by 2 mixtures"


@pytest.mark.parametrize(
    ("overrides", "sizes", "read", "told", "not_told"),
    [  # 45, 70 and 50 steps of 4 rows
        ([], {256: 1000}, "1,000 rows of 256 tokens, read 0.66 times", [], [REPEATS, ANEW]),
        ([], {256: 600}, "600 rows of 256 tokens, read 1.10 times", [REPEATS], [ANEW]),
        (["+recipe.stages.hold.data.stdlib=2"], {256: 1000}, "read 0.66 times", [ANEW], [REPEATS]),
        (
            ["recipe.stages.hold.batch.context=512"],
            {256: 500, 512: 250},  # 460 of 500 and 200 of 250: neither runs out by itself
            "500 rows of 256 tokens, 250 rows of 512 tokens, read 1.72 times",
            [REPEATS, ANEW],
            [],
        ),
    ],
)
def test_the_header_tells_what_text_runs_out_and_repeats(overrides, sizes, read, told, not_told):
    config = compose("train", ["experiment=demo", *overrides])
    first, *others = text_lines(config, {context: {"stdlib": range(rows)} for context, rows in sizes.items()})
    assert first.startswith("text     stdlib: ") and first.endswith(read)
    assert len(others) == len(told) and all(any(part in line for line in others) for part in told)
    assert not any(part in line for line in others for part in not_told)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (490, "8 min 10 s"),
        (3599.7, "1 h 0 min"),
        (3900, "1 h 5 min"),
        (97200, "1 d 3 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_the_first_two_steps_do_not_count_for_the_remaining_time():
    eta = Eta()
    for seconds in (100.0, 50.0):
        eta.update(seconds)
        assert eta.remaining(10) is None
    for seconds in (2.0, 4.0):
        eta.update(seconds)
    assert eta.remaining(10) == 30.0


def test_the_remaining_time_follows_recent_steps():
    eta = Eta()
    for seconds in [9.0] * 30 + [1.0] * 20:
        eta.update(seconds)
    assert eta.remaining(10) == 10.0


# --- wandb ------------------------------------------------------------------------------------------------------------


def test_disabled_tracking_never_imports_wandb():
    code = (
        "import sys; from prosparse.config import Tracking; from prosparse.telemetry import Tracker\n"
        "tracker = Tracker(Tracking(), 'nowhere', {}, 'an-id'); tracker.log({'kind': 'train', 'step': 1}); "
        "tracker.finish()\n"
        "assert tracker.id is None and 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_offline_run_keeps_its_id_and_its_files_over_a_resume(tmp_path, capfd, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"
    tracking = Tracking(wandb=Wandb.offline, name="test")
    first = Tracker(tracking, run_dir, {"seed": 0}, None)
    if first.id is None:
        pytest.skip(f"wandb does not start here: {capfd.readouterr().err}")
    first.log(TRAIN)
    first.finish()
    second = Tracker(tracking, run_dir, {"seed": 0}, first.id)
    second.log(TRAIN | {"step": 43})
    second.log(EVALUATION | {"step": 43})
    files = []
    for name in ("report.json", "README.md", "layers.png"):
        files.append(tmp_path / name)
        Figure().savefig(files[-1]) if name.endswith("png") else files[-1].write_text("{}")
    second.finish(files)
    assert second.id == first.id
    assert "goes on without wandb" not in capfd.readouterr().err
    runs = list(run_dir.glob(f"wandb/offline-run-*/run-{first.id}.wandb"))
    assert len(runs) == 2
    assert list(run_dir.rglob("layers_*.png"))  # the plot
    wanted, deadline = (f"report-{first.id}".encode(), b"README.md", b"histogram"), time.monotonic() + 20
    while not all(any(part in run.read_bytes() for run in runs) for part in wanted):  # wandb writes on for a moment
        assert time.monotonic() < deadline
        time.sleep(0.1)


class BrokenRun:
    id = "abc"

    def __init__(self):
        self.rows = []

    def log(self, row):
        if self.rows:
            raise OSError("connection lost\nwith details")
        self.rows.append(row)


def test_a_row_becomes_numbers_and_histograms_by_layer_under_its_kind_with_the_step_as_axis(monkeypatch):
    run = BrokenRun()
    monkeypatch.setattr("prosparse.telemetry._start_wandb", lambda *_: run)
    steered = {"target": 0.75, "controller": {"smoothed": 0.7, "error": 0.05}, "mean_abs_by_layer": [0.1, None]}
    Tracker(Tracking(wandb=Wandb.online), ".", {}, None).log(TRAIN | steered)
    row = run.rows[0]
    assert row["step"] == 42
    assert (row["train/loss"], row["train/l1_factor"], row["train/target"]) == (2.914, 0.125, 0.75)
    assert (row["train/controller_smoothed"], row["train/controller_error"]) == (0.7, 0.05)
    histogram = row["train/sparsity_by_layer"]
    assert sum(histogram.histogram) == 2 and (histogram.bins[0], histogram.bins[-1]) == (0, 1)
    assert sum(row["train/mean_abs_by_layer"].histogram) == 1
    assert not any("/00" in key or "/01" in key for key in row)  # of a training row not a number a layer and step


def test_an_evaluation_has_the_number_of_each_layer(monkeypatch):
    run = BrokenRun()
    monkeypatch.setattr("prosparse.telemetry._start_wandb", lambda *_: run)
    Tracker(Tracking(wandb=Wandb.online), ".", {}, None).log(EVALUATION | {"sparsity_by_layer": [0.7, 0.724]})
    assert run.rows[0]["evaluation_sparsity_by_layer/01"] == 0.724
    assert sum(run.rows[0]["evaluation/sparsity_by_layer"].histogram) == 2


def test_a_shifted_model_is_no_point_of_the_training_curve(monkeypatch):
    run = BrokenRun()
    monkeypatch.setattr("prosparse.telemetry._start_wandb", lambda *_: run)
    Tracker(Tracking(wandb=Wandb.online), ".", {}, None).log(EVALUATION | {"model": "shifted"})
    assert run.rows[0]["evaluation_shifted/perplexity"] == 18.174
    assert "evaluation/perplexity" not in run.rows[0]


def test_a_task_has_its_metrics_under_its_model_and_its_name(monkeypatch):
    run = BrokenRun()
    monkeypatch.setattr("prosparse.telemetry._start_wandb", lambda *_: run)
    result = {"metrics": {"acc": 0.3, "acc_stderr": None}, "samples": 1200, "sparsity": 0.7, "tokens": 9, "shots": None}
    row = {"kind": "task", "evaluated": "rise", "task": "piqa", "step": 42, "settings": {"limit": 5}, "result": result}
    Tracker(Tracking(wandb=Wandb.online), ".", {}, None).log(row)
    named = {"acc": 0.3, "samples": 1200, "sparsity": 0.7, "tokens": 9}
    assert run.rows == [{"step": 42} | {f"task_rise/piqa_{key}": value for key, value in named.items()}]


def test_wandb_that_breaks_is_one_warning_and_training_goes_on(monkeypatch, capsys):
    run = BrokenRun()
    monkeypatch.setattr("prosparse.telemetry._start_wandb", lambda *_: run)
    tracker = Tracker(Tracking(wandb=Wandb.online), ".", {}, None)
    for _ in range(4):
        tracker.log(TRAIN)
    tracker.finish()
    warning = "warning: training goes on without wandb (OSError: connection lost)\n"
    assert capsys.readouterr().err == warning
    assert (tracker.id, len(run.rows)) == ("abc", 1)


def test_the_wandb_group_without_a_key_or_a_network_keeps_the_run_on_disk_and_says_so_once(tmp_path):
    pytest.importorskip("wandb")
    assert compose("train", ["experiment=demo", "tracking=wandb"]).tracking.wandb is Wandb.auto
    assert compose("train", ["experiment=demo"]).tracking.wandb is Wandb.disabled
    code = f"""
import os, sys
from prosparse import telemetry
from prosparse.config import Tracking, Wandb
telemetry.WANDB_SECONDS = 3
for name in ("no_key", "no_network"):
    tracker = telemetry.Tracker(Tracking(wandb=Wandb.auto), f"{tmp_path}/{{name}}", {{}}, name)
    tracker.log({{"kind": "train", "step": 1, "loss": 2.0}})
    tracker.finish()
    print(tracker.id)
    print("next", file=sys.stderr)
    os.environ |= {{"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}}
    __import__("wandb").teardown()
"""
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90, check=True)
    assert done.stdout == "no_key\nno_network\n"  # the ids, and nothing of wandb's own
    first, second, _ = done.stderr.split("next\n")
    assert first.count("wandb has no key: the run stays in") == 1
    assert second.count("wandb cannot be reached") == 1
    assert "goes on without" not in done.stderr
    for name in ("no_key", "no_network"):
        assert list(tmp_path.glob(f"{name}/wandb/offline-run-*/run-{name}.wandb"))


def test_online_without_a_login_warns_instead_of_asking_and_keeps_the_id(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "from prosparse.config import Tracking, Wandb; from prosparse.telemetry import Tracker\n"
        f"print(Tracker(Tracking(wandb=Wandb.online), {str(tmp_path)!r}, {{}}, 'kept').id)"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "kept\n"
    assert "training goes on without wandb (RuntimeError: not logged in" in done.stderr


def test_secrets_of_the_environment_and_of_urls_are_not_written(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled-here")
    text = "key 0123456789abcdef at https://me:pass@host/x with hf_abcdefghijklmnopqrstuvwx, disabled-here, hf_name"
    assert redact(text) == "key *** at https://***@host/x with ***, disabled-here, hf_name"
