"""The plan of a training: its formulas against real models, what fits, what it says of a run, what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, metrics, prosparse, tiny_llama, tiny_overrides
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from prosparse import planning
from prosparse.cli import compose, main
from prosparse.config import Checkpointing, Shape
from prosparse.planning import Choice, memory, plan
from prosparse.sizes import meta_model, sizes
from prosparse.telemetry import head_width, training_flops
from runs import a_run

MODELS = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml") if path.stem != "hf")
LLAMA_7B = ["experiment=llama2_7b", "gpus=8"]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_of_every_shape_are_those_of_the_model(name):
    size = sizes(compose("plan", [f"model={name}", "gpus=1"]).model)
    shape = {key: value for key, value in vars(compose("train", [f"model={name}", "run_dir=x"]).model.shape).items()}
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if name.startswith("qwen3") else (LlamaForCausalLM, LlamaConfig)
    with torch.device("meta"):
        model = kind(config(**shape))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert size.parameters == pytest.approx(count, rel=1e-5 if name.startswith("qwen3") else 0)  # its norms of q and k
    assert size.flops(4096) == pytest.approx(training_flops(model, 4096), rel=1e-5)
    assert size.ffn_parameters == sum(p.numel() for n, p in model.named_parameters() if "mlp" in n)


def test_a_model_without_a_shape_is_counted_from_its_config_and_one_without_gated_ffns_is_refused(tiny, tmp_path):
    own = compose("plan", ["model=hf", f"model.source={tiny['model']}", "gpus=1"]).model
    assert sizes(own).parameters == sum(parameter.numel() for parameter in tiny_llama().parameters())
    from transformers import OPTConfig

    OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="plan knows decoders whose layers have one gated FFN"):
        sizes(replace(own, source=str(tmp_path)))


WIDE_HEADS = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 300}  # 4 of 32 are not 64
WIDE_HEADS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def test_heads_whose_widths_do_not_add_up_to_the_hidden_size_are_counted(tmp_path):
    Qwen3Config(**WIDE_HEADS, num_hidden_layers=2).save_pretrained(tmp_path)
    own = compose("plan", ["model=hf", f"model.source={tmp_path}", "gpus=1"]).model
    size, (model, _) = sizes(own), meta_model(own)
    assert (size.queries, size.keys, size.head_norms) == (128, 64, True)
    assert size.flops(128) == training_flops(model, 128)
    with FlopCounterMode(display=False) as counter:
        ids, mask = torch.zeros(1, 128, dtype=torch.long, device="meta"), torch.zeros(1, 1, 128, 128, device="meta")
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    assert size.flops(128) == pytest.approx(counter.get_total_flops() / 128, rel=5e-3)


def test_keys_and_values_of_different_widths_count_by_their_mean():
    config = DeepseekV3Config(num_attention_heads=4, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16)
    assert head_width(config) == (24 + 8 + 16) / 2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_are_what_autograd_keeps(family):
    """Bytes that a forward pass leaves for backward, a layer more against one less."""
    from prosparse.ffn import set_penalty, substitute
    from prosparse.penalty import PenaltyContext, new_statistics
    from prosparse.speed import make_ready

    def kept(layers: int, ffn: str) -> int:
        config = compose("train", ["experiment=demo", f"speed.ffn={ffn}"])
        shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": layers}
        qwen3 = lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE_HEADS | shape, pad_token_id=0))  # noqa: E731
        model = (tiny_llama(**shape) if family == "llama" else qwen3()).bfloat16()
        substitute(model, "relu")
        make_ready(model, config, torch.device("cpu"))
        set_penalty(model, PenaltyContext(torch.zeros(()), new_statistics(layers)), "eager")
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def see(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = tensor  # kept alive, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            model(input_ids=torch.zeros(2, 128, dtype=torch.long), use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    own = {"head": 16, "head_norms": False} if family == "llama" else {"head": 32, "head_norms": True}
    size = replace(sizes(compose("plan", ["gpus=1"]).model), hidden=64, neurons=256, heads=4, kv_heads=2, **own)
    layer, _ = planning.activations(size, 3, Checkpointing.none)
    assert (kept(3, "save_x1") - kept(2, "save_x1")) / 256 == pytest.approx(layer, rel=0.02)


def test_memory_falls_with_the_zero_stage_the_ranks_and_checkpointing_and_grows_with_the_micro_batch():
    config = compose("plan", LLAMA_7B)
    size = sizes(config.model)

    def peak(zero=2, micro=1, how=Checkpointing.none, ranks=8):
        parts = memory(size, config, ranks, Choice(zero, micro, how))
        assert parts["peak"] == pytest.approx(sum(parts.values()) - parts["peak"]) and min(parts.values()) >= 0
        return parts["peak"]

    assert peak(zero=1) > peak(zero=2) > peak(zero=3)
    assert peak(ranks=2) > peak(ranks=8) > peak(ranks=64)
    assert peak(how=Checkpointing.none) > peak(how=Checkpointing.selective) > peak(how=Checkpointing.non_reentrant)
    assert peak(micro=1) < peak(micro=2) < peak(micro=4)


def test_the_published_7b_run_is_predicted_within_a_factor_of_two_and_its_configuration_fits():
    result = plan(compose("plan", [*LLAMA_7B, "gpu=a100_80g", "start=2026-01-01", "price_per_gpu_hour=2"]))
    assert result["total"]["tokens"] == 34_603_008_000 and result["total"]["steps"] == 16500
    assert 0.5 < result["total"]["hours"] / 240 < 2  # about ten days, arXiv 2402.13516
    assert result["recommended"]["bytes"]["peak"] <= result["cluster"]["room"]
    assert all(row["bytes"]["peak"] <= result["cluster"]["room"] for row in result["memory"])
    assert result["total"]["price"] == pytest.approx(2 * 8 * result["total"]["hours"])
    assert result["total"]["end"] == result["stages"][-1]["end"] > result["stages"][0]["end"] > "2026-01-01"


def test_what_is_recommended_composes_as_overrides_of_train():
    words = plan(compose("plan", LLAMA_7B))["recommended"]["overrides"].split()
    config = compose("train", ["experiment=llama2_7b", "run_dir=x", "data.sources.files.path=x", *words])
    assert f"micro_batch={config.micro_batch}" in words and f"zero=zero{config.zero.stage}" in words


def test_slower_links_take_longer_and_a_measured_speed_replaces_all_of_it():
    times = [plan(compose("plan", [*LLAMA_7B, f"link_gb_s={speed}"]))["total"]["hours"] for speed in (50, 300)]
    assert times[0] > times[1]
    result = plan(compose("plan", [*LLAMA_7B, "tokens_per_second=20000"]))
    assert result["total"]["hours"] == pytest.approx(34_603_008_000 / 20000 / 3600)


def test_plan_writes_its_result_and_picture_without_any_text(tmp_path, capsys):
    assert main(["plan", *LLAMA_7B, f"out={tmp_path}", f"run_dir={tmp_path}"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert "paste    zero=zero" in shown.err and "rise_again" in shown.err
    assert main(["plan", "experiment=smollm2_135m", "gpus=2", f"out={tmp_path}"]) == 0  # λ is steered
    assert "to 75.00% zeros" in capsys.readouterr().err


BAD = [
    ([], "gpus is missing"),
    (["gpus=0"], "gpus is 0"),
    (["gpus=8", "nodes=3"], "3 nodes cannot share evenly"),
    (["gpus=8", "gpu=custom"], "gpu is custom, which says nothing of itself: give peak_tflops=VALUE"),
    (["gpus=8", "gpu=v100"], "gpu"),
    (["gpus=8", "mfu=1.5"], "mfu is 1.5"),
    (["gpus=8", "margin=1"], "margin is 1"),
    (["gpus=8", "start=tomorrow"], "start is tomorrow: give a date"),
    (["gpus=7"], "recipe.batch.sequences is 512"),
    (["gpus=1"], "nothing fits: even zero=zero"),
    (["check=nowhere"], "check=nowhere: nowhere is no run folder"),
    (["check=nowhere", "micro_batch=4"], "is reckoned as that run was configured: leave out micro_batch=4"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD)
def test_a_mistake_is_one_line_that_names_the_key(overrides, message, capsys):
    what = [] if "check=nowhere" in overrides else ["experiment=llama2_7b"]
    assert main(["plan", *what, *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("prosparse plan: ")


RUN = ["shift@recipe.shift=none", "+zero.extra.reduce_bucket_size=1000000", "save.every=100"]  # a mapping of any values


def test_a_finished_run_is_put_beside_what_was_predicted(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    done = prosparse("train", "experiment=demo", *tiny_overrides(tiny, run), *RUN)
    assert done.returncode == 0, done.stderr
    assert main(["plan", f"check={run}", "tokens_per_second=1000", f"out={tmp_path / 'out'}"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    row = result["compared"]["peak memory of a rank (bytes)"]
    assert row["measured"] == max(row["memory_bytes"] for row in metrics(run) if row["kind"] == "train")
    assert result["device"] == "1 x CPU" and result["context"] == 32
    assert result["compared"]["FLOPs of a step"]["ratio"] == pytest.approx(1, rel=0.02)
    assert result["compared"]["seconds of a step"]["predicted"] == pytest.approx(4 * 32 / 1000)
    assert all(row["ratio"] == row["predicted"] / row["measured"] for row in result["compared"].values())


def test_a_run_that_never_trained_is_refused(tmp_path):
    a_run(tmp_path / "r")
    (tmp_path / "r" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no training rows"):
        from prosparse.plan_check import check

        check(compose("plan", [f"check={tmp_path / 'r'}"]))


def test_shape_stands_in_the_order_that_sizes_reads():
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    assert list(Shape.__dataclass_fields__) == [*names, "vocab_size", "tie_word_embeddings"]


NVME = ["zero.offload=nvme", "zero.offload_path=/mnt/nvme"]


def test_what_is_offloaded_or_shared_leaves_the_rank_and_is_part_of_what_is_pasted():
    def parts(*more: str) -> dict[str, float]:
        config = compose("plan", [*LLAMA_7B, *more])
        return memory(sizes(config.model), config, 8, Choice(3, 2, Checkpointing.none))

    plain, host = parts(), parts("zero=zero3_offload", "zero.offload_weights=true")
    moved = sum(plain[part] for part in ("weights", "optimizer", "gradients"))
    assert host["host"] == pytest.approx(moved + plain["gradients"]) and plain["host"] == 0
    assert host["peak"] == pytest.approx(plain["peak"] - moved)
    disk, n = parts("zero=zero3", *NVME), 6_738_415_616
    assert disk["peak"] == host["peak"] + plain["weights"] and "disk" not in host
    assert (disk["disk"], disk["host"]) == (12 * n / 8, 4 * n / 8 + 16 * 1e8)
    best = plan(compose("plan", [*LLAMA_7B, "zero=zero3", *NVME]))["recommended"]
    assert best["zero"] == 3 and all(word in best["overrides"].split() for word in NVME)
    assert parts("sequence_parallel=4")["activations"] == pytest.approx(plain["activations"] / 4)
    given = ["zero.offload=cpu", "sequence_parallel=4"]
    best = plan(compose("plan", [*LLAMA_7B, *given]))["recommended"]
    assert best["zero"] > 1 and all(word in best["overrides"].split() for word in given)
    with pytest.raises(ValueError, match="does not divide gpus=6"):
        compose("plan", ["experiment=llama2_7b", "gpus=6", "sequence_parallel=4"])


def test_the_figures_of_a_plan_are_those_reckoned_by_hand():
    """Llama 2 7B, 8 A100, windows of 512 x 4096, ZeRO-2, micro_batch 2: 32 micro-batches of a rank."""
    result, n = plan(compose("plan", LLAMA_7B)), 6_738_415_616
    best = result["recommended"]
    assert best["overrides"] == "zero=zero2 micro_batch=2 checkpointing=none"
    by = best["bytes"]
    assert (by["weights"], by["optimizer"], by["gradients"]) == (2 * n, 12 * n / 8, 4 * n / 8)
    assert by["activations"] == 8192 * (32 * (16 * 4096 + 4 * 34 + 6 * 11008) + 4 * 4096)
    stage = result["stages"][0]
    links = 2 * (2 * 32 + 1) * n * 7 / 8 / (300e9 * 0.75)
    flops = 512 * 4096 * (6 * (n - 32000 * 4096) + 12 * 32 * 4096 * 4096)
    assert stage["communication_seconds"] == pytest.approx(links)
    assert stage["computing_seconds"] == pytest.approx(flops / (8 * 312e12 * 0.45))
    hours = 16500 * (links + flops / (8 * 312e12 * 0.45)) / 3600
    assert result["total"]["hours"] == pytest.approx(hours)
    assert result["total"]["energy_kwh"] == pytest.approx(hours * 8 * 0.4 * 1.2)
    saved = result["checkpoints"]
    assert saved["bytes"] == 12 * n and saved["kept_bytes"] == saved["kept"] * 12 * n and saved["kept"] > 2
    recomputed = planning.hours(
        sizes(compose("plan", LLAMA_7B).model), compose("plan", LLAMA_7B), Choice(2, 2, Checkpointing.non_reentrant)
    )
    assert recomputed == pytest.approx(16500 * (links + 4 / 3 * flops / (8 * 312e12 * 0.45)) / 3600)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dtype=fp32"], "does not reckon with dtype=fp32: leave"),
        (["attention=eager", "+zero.extra.reduce_bucket_size=5"], "reckon with attention=eager, zero.extra: leave"),
        (["gpus=64", "sequence_parallel=64"], "sequence_parallel is 64, which does not divide"),
    ],
)
def test_what_the_formulas_do_not_know_is_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        plan(compose("plan", [*LLAMA_7B, *overrides]))
