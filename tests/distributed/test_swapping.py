"""fp32 weights and moments in swap files: the same run as without, its checkpoints those of every other run.

What swaps is compiled for it in some two minutes: `python -m pytest -m slow tests/distributed/test_swapping.py`.
"""

import shutil
import subprocess

import pytest
from conftest import make_tiny, metrics, prosparse, tiny_overrides, trained
from test_long_context import assert_equal

from prosparse.cli import compose
from prosparse.offload import check_swap

pytestmark = pytest.mark.timeout(600)
# Two sub-groups of more than 1 MB a rank, and one of less, which stays in memory.
HOST = ("zero=zero3", "zero.offload=cpu", "+zero.extra.sub_group_size=300000")
NVME = ("zero=zero3", "zero.offload=nvme", HOST[2])
TARGET = ("stage@recipe.stages.rise=target", "recipe.stages.rise.l1={factor: 0, sparsity: 0.45}")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A tiny model whose matrices take more than 1 MB of a rank, the least that is swapped, and not whole sectors."""
    sizes = {"hidden_size": 120, "intermediate_size": 4374, "num_hidden_layers": 1}
    return make_tiny(tmp_path_factory.mktemp("large"), **sizes)


@pytest.fixture(scope="module")
def go(nursery, large, tmp_path_factory):
    """go(name, *overrides): one start of the run of that name up to the end of its stages, in fp32 on two ranks."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's async_io cannot be built here: install libaio-dev")
    AsyncIOBuilder().load(verbose=False)  # two minutes, once; the ranks would compile it side by side
    root = tmp_path_factory.mktemp("swapping")

    def start(name: str, *overrides: str, codes: tuple[int, ...] = (0, 0), **inject) -> str:
        own = [*tiny_overrides(large, root / name), "evaluate.every=5", "dtype=fp32", "until=hold"]
        own += [f"zero.offload_path={root / 'disk'}"] * ("zero.offload=nvme" in overrides)
        group = nursery.run([*own, *overrides], ranks=len(codes), log=root / f"{name}.log", **inject)
        assert group.codes == list(codes), group.text()[-4000:]
        return group.text()

    start.root = root
    start("plain")
    return start


@pytest.fixture(scope="module")
def swapped(go) -> str:
    return go("swapped", *NVME)


def left(go) -> list[str]:
    return sorted(path.name for path in (go.root / "disk").iterdir())


@pytest.mark.slow
def test_a_run_with_swap_files_is_the_plain_run(go, swapped):
    assert "with masters and moments in swap files" in swapped
    assert_equal(go, "swapped")
    assert left(go) == []


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_bit_for_bit_and_its_files_go_too(go, swapped):
    """The ninth forward pass of a rank's evaluations is the first after step 5."""
    go("killed", *NVME, codes=(1, -9), die_in_evaluation=9, rank=1)
    (name,) = left(go)  # the rank that lives has removed its own
    sizes = [path.stat().st_size for path in (go.root / "disk" / name).rglob("*.swp")]
    assert sizes and all(size % 4096 == 0 for size in sizes)  # sectors of every disk
    shutil.copytree(go.root / "disk" / name, go.root / "disk" / name.replace("rank-00001", "rank-00007"))
    assert "/checkpoints/step-00000004\n" in go("killed", *NVME, "zero.offload_weights=true")
    assert trained(go.root / "killed") == trained(go.root / "swapped")
    assert left(go) == []


@pytest.mark.slow
def test_a_checkpoint_goes_into_swap_files_and_out_of_them_again_with_other_ranks(go):
    go("in and out", "until=substitution")
    go("in and out", *NVME, "until=rise", codes=(0,))
    go("in and out", "zero=zero2", "zero.offload=cpu")
    assert_equal(go, "in and out")


@pytest.mark.slow
def test_a_sweep_is_taken_back_moments_are_forgotten_and_a_spike_is_left_out_in_swap_files(go):
    """The spike is in the second window of `hold`: 3 windows come before the sweep, it has 2 x 2, `rise` has 2."""
    how = [*TARGET, "recipe.stages.rise.steps=2", "recipe.stages.hold.steps=3"]
    how += ["recipe.stages.hold.reset_optimizer=true", "guard=rewind", "guard.after=4", "guard.deviations=20"]
    told = [go(where[1], *how, *where, spike={"11": 50.0}) for where in (HOST, NVME)]
    for text in told:
        assert text.count("taken back") == 2 and "back to step 6; windows [6] are left out" in text
    assert trained(go.root / HOST[1]) == trained(go.root / NVME[1])
    sweeps = [[row["probes"] for row in metrics(go.root / n[1]) if row["kind"] == "sweep"] for n in (HOST, NVME)]
    assert sweeps[0] == sweeps[1] and len(sweeps[0]) == 1


@pytest.mark.slow
def test_a_disk_that_is_too_small_for_the_copies_of_a_sweep_is_refused_before_training(go, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk: mount: {mounted.stderr.decode().strip()}")
    try:
        text = go("small disk", *NVME, *TARGET, f"zero.offload_path={tmp_path}", codes=(2, 2))
        if "does not take direct writes" in text:
            pytest.skip("no small disk: this kernel's tmpfs takes no direct writes")
        assert "has 0.0 GB free on host" in text and "make room, or start more hosts" in text
        assert list(tmp_path.iterdir()) == [] and not (go.root / "small disk" / "metrics.jsonl").exists()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_what_a_disk_has_to_hold_is_told(large, tmp_path):
    own = [*tiny_overrides(large, tmp_path / "run"), *NVME, f"zero.offload_path={tmp_path / 'disk'}"]
    check_swap(compose("train", ["experiment=demo", *own]), 1000)
    for target, needed in (((), "12600000.0"), (TARGET, "25200000.0")):
        with pytest.raises(ValueError, match=rf"GB free on host .* {needed} GB of swap files belong there: make room"):
            check_swap(compose("train", ["experiment=demo", *own, *target]), 10**15)


def test_a_machine_without_libaio_is_told_so_before_anything_is_written(large, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-laio*) exit 1 ;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    own = [*tiny_overrides(large, tmp_path / "run"), *NVME, f"zero.offload_path={tmp_path / 'disk'}"]
    done = prosparse("train", *own, CC=str(compiler), DS_ACCELERATOR="cpu")
    assert done.returncode == 2 and "async_io cannot be compiled here" in done.stderr.splitlines()[-1]
    assert "install libaio-dev" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists() and not (tmp_path / "disk").exists()
