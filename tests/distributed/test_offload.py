"""fp32 weights and moments in host memory: the same run as without, in and out of it."""

import pytest
from conftest import prosparse, tiny_overrides
from test_long_context import assert_equal

from prosparse.cli import compose
from prosparse.engine import deepspeed_config

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def go(nursery, tiny, tmp_path_factory):
    """go(name, *overrides): one start of the run of that name up to the end of its stages, in fp32 on two ranks."""
    root = tmp_path_factory.mktemp("offload")

    def start(name: str, *overrides: str, code: int = 0) -> str:
        own = [*tiny_overrides(tiny, root / name), "evaluate.every=5", "dtype=fp32", "until=hold", *overrides]
        group = nursery.run(own, log=root / f"{name}.log")
        assert group.codes == [code] * 2, group.text()[-4000:]
        return group.text()

    start.root = root
    start("plain")
    return start


@pytest.mark.parametrize(
    "how", [("zero=zero2", "zero.offload=cpu"), ("zero=zero3_offload", "zero.offload_weights=true")]
)
def test_a_run_in_host_memory_is_the_plain_run(go, how):
    text = go(how[0], *how)
    assert "with masters and moments in host memory" in text
    assert ("and weights in host memory" in text) == (len(how[1]) > 20)
    assert_equal(go, how[0])


def test_a_checkpoint_goes_into_host_memory_and_out_of_it_again(go):
    offloaded = ["zero=zero3_offload"]
    go("in and out", "until=substitution")
    go("in and out", *offloaded, "until=rise")
    go("in and out", "zero=zero3")
    assert_equal(go, "in and out")


def test_moments_can_be_forgotten_and_a_sweep_taken_back_in_host_memory(go):
    how = ["stage@recipe.stages.rise=target", "recipe.stages.rise.l1={factor: 0, sparsity: 0.6}", "until=rise"]
    how += ["recipe.stages.rise.reset_optimizer=true"]
    go("steered", *how)
    go("steered offloaded", *how, "zero=zero3_offload")
    assert_equal(go, "steered offloaded", "steered")


def test_a_key_of_deepspeed_that_contradicts_a_typed_one_is_refused():
    for overrides, words in {
        ("+zero.extra.offload_optimizer.device=cpu",): "zero.extra.offload_optimizer contradicts zero.offload: set",
        ("zero=zero3", "+zero.extra.offload_param.device=cpu"): "contradicts zero.offload_weights: set",
    }.items():
        with pytest.raises(ValueError, match=words):
            deepspeed_config(compose("train", ["experiment=demo", *overrides]), 1)


def test_a_machine_without_a_compiler_is_told_so_before_anything_is_written(go, tiny, tmp_path):
    own = [*tiny_overrides(tiny, tmp_path / "run"), "zero.offload=cpu"]
    folder = str(tmp_path / "extensions")
    done = prosparse("train", *own, CXX="no-compiler", TORCH_EXTENSIONS_DIR=folder, DS_ACCELERATOR="cpu")
    assert done.returncode == 2 and "DeepSpeed's CPU Adam cannot be compiled here" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
