"""Requests to stop, ranks that die or hang, disks and memory that run out: what a run does, with real processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, metrics, prosparse, tiny_overrides, trained

from prosparse import checkpoint

pytestmark = pytest.mark.timeout(300)
LONG = ["recipe.stages.hold.steps=3000", "save.every=1000", "evaluate.every=0"]


@pytest.fixture(scope="module")
def start(nursery, tiny, tmp_path_factory):
    """start(name, *overrides, ranks=2, ...) -> (group, run folder)"""
    root = tmp_path_factory.mktemp("stops")

    def begin(name: str, *overrides: str, **more):
        arguments = [*tiny_overrides(tiny, root / name), *overrides]
        return nursery.start(arguments, log=root / f"{name}.log", **more), root / name

    return begin


def last_step(run_dir: Path) -> int:
    return trained(run_dir)[-1]["step"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow), signal.SIGINT]
)
def test_a_signal_to_one_rank_saves_the_last_step_and_ends_all_with_75(start, number):
    group, run_dir = start(f"signal {number}", *LONG, "recipe.batch.sequences=16")
    assert group.wait_for("step    8/")
    group.signal(number, rank=1)
    assert group.wait(60) == [75, 75], group.text()[-3000:]
    folder = checkpoint.find(run_dir)
    assert int(folder.name[5:]) == last_step(run_dir) >= 8
    assert "asked to stop" in group.text() and f"stopped after step {last_step(run_dir)}" in group.text()
    assert "Traceback" not in group.text()


def test_a_rank_that_another_one_stopped_ends_with_75_whatever_its_launcher_sends(start):
    group, _ = start("asked again", *LONG)
    assert group.wait_for("step    4/")
    group.signal(signal.SIGTERM, rank=1)
    assert group.wait_for("stopped after step")
    while not group.ended(0):  # as launchers do when the first rank has ended
        group.signal(signal.SIGTERM, rank=0)
    assert group.wait(60) == [75, 75]


def test_a_stop_file_stops_and_is_removed_and_the_run_is_bit_equal_in_the_end(start):
    quick = ["recipe.stages.hold.steps=80", "evaluate.every=5", "save.every=1000", "until=hold"]
    group, run_dir = start("stop file", *quick)
    assert group.wait_for("step   12/")
    (run_dir / "STOP").touch()
    assert group.wait(60) == [75, 75]
    assert not (run_dir / "STOP").exists() and last_step(run_dir) < 87
    again, _ = start("stop file", *quick)
    assert again.wait(60) == [0, 0]
    whole, undisturbed = start("not stopped", *quick)
    assert whole.wait(60) == [0, 0]
    assert trained(run_dir) == trained(undisturbed)
    rows, others = ([r["step"] for r in metrics(d) if r.get("model") == "training"] for d in (run_dir, undisturbed))
    assert rows == others


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("words", "step"),
    [
        slow("GB at most", 0),
        slow("held out  base", 0),
        ("held out  training", 3),
        slow("held out  trained", 10),
        slow("threshold 0.0001", 10),
        ("held out  shifted", 10),
    ],
)
def test_a_stop_in_an_evaluation_the_shift_or_before_the_first_step_can_be_resumed(start, words, step):
    name = words.replace(" ", "-")
    more = ["evaluate.every=3", "save.every=100", "evaluate.rows=60", "recipe.shift.calibration_rows=60"]
    group, run_dir = start(name, *more)
    assert group.wait_for(words)
    group.signal(signal.SIGUSR1, rank=0)
    codes = group.wait(60)
    assert codes == [75, 75], group.text()[-3000:]
    found = checkpoint.find(run_dir)
    assert (0 if found is None else int(found.name[5:])) >= step
    again, _ = start(name, *more)
    assert again.wait(100) == [0, 0], again.text()[-3000:]
    assert [row["step"] for row in trained(run_dir)] == list(range(1, 11))
    assert (run_dir / "model" / "config.json").is_file() and (run_dir / "report" / "report.json").is_file()


def test_a_stop_while_text_is_prepared_ends_all_ranks(start, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"document {number}: " + "a sparse neuron rests. " * 50_000)
    group, run_dir = start("preparing", *LONG, f"data.sources.files.path={text}", f"data.cache={tmp_path / 'cache'}")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob(".preparing-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (run_dir / "STOP").touch()
    assert group.wait(60) == [75, 75], group.text()[-3000:]
    assert "prosparse train: stopped (a STOP file)" in group.text() and "Traceback" not in group.text()
    assert not list((tmp_path / "cache").glob("*")) and not (run_dir / "STOP").exists()


def test_other_verbs_stop_too_and_leave_nothing_half_written(nursery, tiny, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("a sparse neuron rests while a dense one fires. " * 200_000)
    where = [f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'out'}"]
    asked = [f"checkpoint={tiny['model']}", f"text={text}", *where, "context=16", "batch=1", "threads=1"]
    group = nursery.start(asked, 1, tmp_path / "log", "measure")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    group.signal(signal.SIGTERM, rank=0)
    assert group.wait(60) == [75] and group.text().splitlines()[-1].startswith("prosparse measure: stopped (SIGTERM)")
    assert "\n{" not in group.text() and not (tmp_path / "out" / "result.json").exists()
    assert not list((tmp_path / "cache").glob(".preparing-*"))


def test_a_rank_that_dies_takes_the_run_down_with_one_message(start):
    group, _ = start("killed", *LONG)
    assert group.wait_for("step    5/")
    group.signal(signal.SIGKILL, rank=1)
    assert group.wait(60) == [1, -signal.SIGKILL] and not group.hung
    assert group.text().count("rank 1 ended without a word") == 1, group.text()[-3000:]


def test_the_death_of_rank_zero_is_told_too(start):
    group, _ = start("killed zero", *LONG)
    assert group.wait_for("step    5/")
    group.signal(signal.SIGKILL, rank=0)
    assert group.wait(60) == [-signal.SIGKILL, 1]
    assert group.text().count("rank 0 ended without a word") == 1, group.text()[-3000:]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_tells_its_own_reason_once(start, rank):
    group, _ = start(f"failed {rank}", *LONG, fail=4, rank=rank)
    assert group.wait(60) == [1, 1]
    assert group.text().count("Traceback") == 1 and f"[rank {rank}] Traceback" in group.text()
    assert "ZeroDivisionError: made to fail" in group.text() and "without a word" not in group.text()


def test_a_rank_that_fails_within_a_sweep_tells_its_own_reason(start):
    group, _ = start("failed in a sweep", "recipe=target", "evaluate.every=0", fail=5, rank=1)
    assert group.wait(60)[1] == 1 and not group.hung, group.text()[-3000:]
    assert "made to fail" in group.text()


def test_the_only_rank_that_is_left_speaks(start):
    group, _ = start("two of three", *LONG, "recipe.batch.sequences=6", ranks=3)
    assert group.wait_for("step    5/")
    for rank in (1, 0):
        group.signal(signal.SIGKILL, rank)
    assert group.wait(60)[2] == 1
    assert group.text().count("ended without a word") == 1, group.text()[-3000:]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_ends_the_run_after_the_steady_timeout(start, rank):
    group, _ = start(f"hung {rank}", *LONG, "timeouts.steady_seconds=4")
    assert group.wait_for("step    5/")
    group.signal(signal.SIGSTOP, rank)
    began = time.monotonic()
    while not group.ended(1 - rank) and time.monotonic() - began < 60:
        time.sleep(0.1)
    waited = time.monotonic() - began
    group.signal(signal.SIGKILL, rank)
    group.wait(20)
    assert group.codes[1 - rank] == 1 and waited < 40
    assert f"rank {rank} ended without a word or did not answer" in group.text(), group.text()[-3000:]
    assert "raise timeouts.steady_seconds" in group.text()


def test_two_interrupts_end_a_rank_that_waits_inside_a_collective(start):
    group, _ = start("two interrupts", *LONG)
    assert group.wait_for("step    5/")
    group.signal(signal.SIGSTOP, rank=1)
    time.sleep(1)
    group.signal(signal.SIGINT, rank=0)
    time.sleep(1.5)
    group.signal(signal.SIGINT, rank=0)
    deadline = time.monotonic() + 10
    while not group.ended(0):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    group.signal(signal.SIGKILL, rank=1)
    assert group.wait(20) == [130, -signal.SIGKILL]


def test_a_request_ends_a_rank_that_waits_for_ranks_that_never_come(start, tiny, tmp_path):
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29677"}
    command = [sys.executable, "launch/train.py", *tiny_overrides(tiny, tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not _listens(29677):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 75


def test_memory_that_runs_out_ends_with_the_key_to_set(start):
    group, _ = start(
        "memory", *LONG, "recipe.batch.context=256", "micro_batch=2", "recipe.batch.sequences=8", memory=1, rank=1
    )
    codes = group.wait(60)
    assert sorted(codes) == [1, 2] or codes == [2, 2], group.text()[-3000:]
    assert "rank 1 ran out of memory" in group.text() and "set micro_batch=1" in group.text()


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_file_that_cannot_be_written_fails_the_save_on_all_ranks(start, asynchronous):
    name = f"full {asynchronous}"
    group, run_dir = start(name, "evaluate.every=0", "until=substitution")
    assert group.wait(60) == [0, 0]
    group, _ = start(name, "evaluate.every=0", f"save.asynchronous={asynchronous}", full=20000, rank=1)
    assert group.wait(60) == [1, 1]
    last = [line for line in group.text().splitlines() if line.startswith("prosparse train")]
    assert len(last) == 1 and "could not be saved: rank 1: [Errno 27]" in last[0]
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
    assert checkpoint.find(run_dir).name == "step-00000003"
    group, _ = start(name, "evaluate.every=0", "until=hold")
    assert group.wait(60) == [0, 0] and last_step(run_dir) == 10


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(start, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk: mount: {mounted.stderr.decode().strip()}")
    try:
        group, _ = start("small disk", f"run_dir={tmp_path}/run")
        assert group.wait(60) == [2, 2]
        assert "has room for" in group.text() and "lower save.keep" in group.text()
        assert not list((tmp_path / "run").rglob("step-*"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_run_says_how_much_it_writes(start):
    group, _ = start("volume", "evaluate.every=0", "until=hold")
    assert group.wait(60) == [0, 0]
    assert "GB are written a day" in group.text() and "GB each" in group.text()


def test_no_secret_is_written(tiny, tmp_path):
    secret = "hf_" + "x1Y2z3" * 6
    overrides = [
        *tiny_overrides(tiny, tmp_path / "run"),
        "until=substitution",
        "tracking=wandb",
        "tracking.wandb=offline",
    ]
    environment = {"MY_API_KEY": "swordfish-2026", "WANDB_MODE": "offline"}
    done = prosparse("train", *overrides, f"tracking.name={secret}-swordfish-2026", **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert secret.encode() not in path.read_bytes() and b"swordfish" not in path.read_bytes(), path
    assert secret not in done.stderr + done.stdout
    assert "***" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_launcher_leaves_no_orphans_no_shared_memory_and_needs_no_compiler(tiny, tmp_path):
    shared = set(os.listdir("/dev/shm"))
    overrides = [*tiny_overrides(tiny, tmp_path / "run"), *LONG]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "29655"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*launcher, "launch/train.py", *overrides], cwd=ROOT, stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")},
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while "step    5/" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    while (left := _processes(str(tmp_path / "run"))) and time.monotonic() < deadline + 60:
        time.sleep(0.2)
    while (more := set(os.listdir("/dev/shm")) - shared) and time.monotonic() < deadline + 60:
        time.sleep(0.2)  # other tests have shared memory for a moment too
    assert left == [] and not more and not (tmp_path / "ops").exists()
    folder = checkpoint.find(tmp_path / "run")
    assert folder is not None and int(folder.name[5:]) == last_step(tmp_path / "run")


def _listens(port: int) -> bool:
    tables = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    return re.search(rf":{port:04X} [0-9A-F]+:0000 0A ", tables) is not None


def _processes(words: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found
