"""Predictors learn what can be learned, are judged on other documents, and what they skip is what is measured."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from chains import fill, small_disk
from conftest import make_tiny, tiny_llama
from safetensors import safe_open
from test_models import base_model

from prosparse.activity import hot
from prosparse.cli import main
from prosparse.config import Auto, Source
from prosparse.ffn import substitute
from prosparse.models.load import load_model, load_tokenizer
from prosparse.predictor import Predictor, Recording, fit, judge, load_predictors, only_predicted, places, record
from prosparse.preparation import text_splits
from prosparse.sparsity import measure
from prosparse.verb_configs import Predict


def learnable():
    """A model whose gates lie in a space of 3 dimensions, so that few features decide which neurons fire."""
    model = tiny_llama(hidden_act="relu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5 if parameter.dim() == 2 else 1
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.copy_(torch.randn(48, 3) @ torch.randn(3, 32))
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    return make_tiny(tmp_path_factory.mktemp("learnable"), learnable())


def overrides(small: dict, out, **changes) -> list[str]:
    keys = {"checkpoint": small["model"], "text": small["text"], "cache": small["cache"], "out": out}
    keys |= {
        "context": 32,
        "held_out": 0.2,
        "rows": 150,
        "evaluate_rows": 100,
        "dtype": "fp32",
        "tokens": 256,
        "device": "cpu",
    }
    return [f"{key}={value}" for key, value in (keys | changes).items()]


@pytest.fixture(scope="module")
def made(small, tmp_path_factory) -> dict:
    """The predictors of the learnable model, and what `predict` said of them."""
    out = tmp_path_factory.mktemp("made") / "predictors"
    assert main(["predict", *overrides(small, out, epochs=30, lr=1e-2, rank=16)]) == 0
    return {"folder": out, "result": json.loads((out / "result.json").read_text())}


def test_predictors_learn_which_neurons_fire(made):
    result = made["result"]
    for layer in result["by_layer"]:
        assert layer["recall"] > 0.85 and layer["recall"] - (1 - layer["predicted_sparsity"]) > 0.3, layer
        assert abs(layer["predicted_sparsity"] - layer["sparsity"]) < 0.15 and layer["rank"] == 16
    sweep = result["sweep"]
    for worse, better in zip(sweep[1:], sweep, strict=False):  # the higher the cutoff, the less is found and computed
        assert better["recall"] >= worse["recall"] and better["predicted_sparsity"] <= worse["predicted_sparsity"]
    assert sweep[0]["perplexity"] == pytest.approx(result["perplexity_all_neurons"], rel=0.05)


def test_the_folder_is_what_powerinfer_reads_and_nothing_else(made):
    found = sorted(str(path.relative_to(made["folder"])) for path in made["folder"].rglob("*") if path.is_file())
    layers = range(3)
    wanted = [f"activation/activation_{n}.pt" for n in layers] + ["config.json"]
    assert found == [*wanted, *(f"model_{n}.pt" for n in layers), "result.json"]
    assert json.loads((made["folder"] / "config.json").read_text()) == {"sparse_threshold": 0.0}
    for layer in layers:
        weights = torch.load(made["folder"] / f"model_{layer}.pt", weights_only=True)
        assert {key: tuple(value.shape) for key, value in weights.items()} == {
            "fc1.weight": (16, 32),
            "fc2.weight": (48, 16),
        }
        frequency = torch.load(made["folder"] / "activation" / f"activation_{layer}.pt", weights_only=True)
        assert frequency.shape == (48,) and 0 <= frequency.min() < frequency.max() <= 1


def splits(small):
    tokenizer = load_tokenizer(small["model"])
    options = {"bos": Auto.auto, "cache": str(small["cache"]), "held_out": 0.2}
    return tokenizer, text_splits(Source(path=str(small["text"])), tokenizer, 32, **options)


def test_no_document_is_both_learned_from_and_judged_on(small):
    tokenizer, both = splits(small)
    streams = ["".join(tokenizer.convert_ids_to_tokens(np.concatenate(list(rows)).tolist())) for rows in both]
    names = [set(re.findall(r"documentĠ(\d+)Ċ", stream)) for stream in streams]
    assert len(names[0]) > 20 and len(names[1]) > 5 and not names[0] & names[1]


def test_what_is_reported_is_what_the_saved_predictors_find_and_cost(small, made):
    """Recomputed from the files, in plain loops over the layers."""
    model = load_model(small["model"], dtype=torch.float32)
    rows = splits(small)[1][1]
    predictors, cutoff = load_predictors(made["folder"], 3, 32, 48)
    ids = torch.from_numpy(np.stack([rows[i] for i in range(len(rows))]).astype(np.int64))
    assert len(rows) <= 100 and cutoff == 0.0
    with torch.no_grad():
        hidden = [state for state in model(ids, output_hidden_states=True).hidden_states[:-1]]
        for layer, block in enumerate(model.model.layers):
            h = hidden[layer]
            cos_sin = model.model.rotary_emb(h, torch.arange(32)[None])
            mask = torch.full((32, 32), -torch.inf).triu(1)[None, None]
            attended = block.self_attn(block.input_layernorm(h), position_embeddings=cos_sin, attention_mask=mask)[0]
            h = h + attended
            gate = block.mlp.gate_proj(block.post_attention_layernorm(h))
            fires = (gate.relu() * block.mlp.up_proj(block.post_attention_layernorm(h))) != 0
            fc1, fc2 = predictors[layer].fc1.weight, predictors[layer].fc2.weight
            predicted = (h @ fc1.T).relu() @ fc2.T >= 0
            said = made["result"]["by_layer"][layer]
            assert (predicted & fires).sum() / fires.sum() == pytest.approx(said["recall"], abs=2e-3)
            assert 1 - predicted.float().mean() == pytest.approx(said["predicted_sparsity"], abs=2e-3)
            assert 1 - fires.float().mean() == pytest.approx(said["sparsity"], abs=2e-3)


def test_with_all_neurons_predicted_nothing_changes_and_with_none_the_ffns_are_silent(small, made):
    model = load_model(small["model"], dtype=torch.float32)
    rows = splits(small)[1][1]
    predictors, _ = load_predictors(made["folder"], 3, 32, 48)
    whole = measure(model, rows)
    with only_predicted(model, predictors, -math.inf):
        assert measure(model, rows) == whole
    with only_predicted(model, predictors, math.inf):
        none = measure(model, rows).perplexity
    assert measure(model, rows) == whole  # the hooks are gone
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert none == pytest.approx(measure(model, rows).perplexity, rel=1e-6) and none != whole.perplexity


def test_training_stops_when_nothing_improves(small, tmp_path):
    assert main(["predict", *overrides(small, tmp_path, lr=1e-12, patience=2, epochs=9, rows=10, cutoffs="[0]")]) == 0
    assert {layer["epochs"] for layer in json.loads((tmp_path / "result.json").read_text())["by_layer"]} == {3}


def test_a_recall_target_doubles_the_rank_until_it_is_reached_or_full(small, tmp_path):
    few = {"epochs": 1, "rank": 3, "rows": 10, "evaluate_rows": 4, "cutoffs": "[0]"}
    for recall, rank in ((0.9999, 32), (0.01, 3)):
        assert main(["predict", *overrides(small, tmp_path, recall=recall, **few)]) == 0
        assert {layer["rank"] for layer in json.loads((tmp_path / "result.json").read_text())["by_layer"]} == {rank}


def test_the_top_share_labels_the_largest_that_fire(small, tmp_path):
    model = load_model(small["model"], dtype=torch.float32)
    rows = splits(small)[1][0]
    how = Predict(top=0.15)
    seen: list[torch.Tensor] = []
    handle = places(model)[1][1].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    recorded = record(model, rows, [0, 3, 5], tmp_path / "rows", how)
    handle.remove()
    x1 = torch.cat(seen)
    labels = recorded.unpacked(recorded.labels(1)[:]) == 1
    for row, label in zip(x1, labels, strict=True):
        largest = row.abs().argsort(descending=True)[:7]
        assert set(label.nonzero().flatten().tolist()) == set(largest[row[largest] != 0].tolist())
    assert recorded.labeled[1] == labels.sum() and torch.equal(recorded.active[1], (x1 != 0).sum(0))
    assert recorded.tokens == len(x1) == 96


def test_a_layer_in_which_nothing_fires_is_no_error(small, tmp_path):
    model = load_model(small["model"], dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(small["model"]).save_pretrained(tmp_path / "model")
    assert main(["predict", *overrides(small, tmp_path / "out", checkpoint=tmp_path / "model", epochs=1, rows=10)]) == 0
    dead = json.loads((tmp_path / "out" / "result.json").read_text())["by_layer"][1]
    assert dead["sparsity"] == 1.0 and dead["recall"] == 1.0


@pytest.mark.parametrize(
    ("base", "activation", "message"),
    [
        ("llama", "silu", "the model's activation is silu"),
        ("opt", "relu", "OPTForCausalLM: predictors need layers like Llama's"),
        ("gpt_neox", "relu", "GPTNeoXForCausalLM: predictors need"),
        ("mixtral", "relu", "MixtralForCausalLM: predictors need layers like Llama's.*ExpertsFFN"),
        ("gemma3_text", "relu", "predictors need layers like Llama's.*pre_feedforward_layernorm"),
    ],
)
def test_other_models_are_refused_by_name(base, activation, message, tmp_path):
    from prosparse.predictor import predict

    model = base_model(base)
    substitute(model, activation)
    rows = np.zeros((2, 8), dtype=np.int32)
    with pytest.raises(ValueError, match=message):
        predict(model, rows, rows, Predict(out=str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", ["mistral", "qwen2", "qwen3", "gemma", "phi3", "minicpm"])
def test_layers_like_llamas_have_their_places(base):
    model = base_model(base)
    substitute(model, "relu")
    assert len(places(model)) == 2 and all(down.weight.shape[0] == len(norm.weight) for norm, down in places(model))


BAD = [
    ("top=1.5", "top is 1.5"),
    ("recall=0", "recall is 0"),
    ("held_out=0", "held_out is 0"),
    ("rank=0", "rank is 0"),
    ("epochs=0", "epochs is 0"),
    ("lr=0", "lr is 0"),
    ("cutoff=inf", "cutoff is inf"),
    ("rank=33", "rank is 33, more than the model's 32"),
    ("evaluate_rows=0", "evaluate_rows is 0"),
]


@pytest.mark.parametrize(("override", "message"), BAD)
def test_a_mistake_is_one_line_and_leaves_nothing(override, message, small, tmp_path, capsys):
    assert main(["predict", *overrides(small, tmp_path / "out"), override]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prosparse predict: ")]
    assert len(said) == 1 and message in said[0] and not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(small, tmp_path, capsys):
    (tmp_path / "model_0.pt").write_text("mine")
    assert main(["predict", *overrides(small, tmp_path)]) == 2
    assert "holds model_0.pt" in capsys.readouterr().err and (tmp_path / "model_0.pt").read_text() == "mine"


def test_a_failure_leaves_no_scratch_files(small, tmp_path, monkeypatch):
    monkeypatch.setattr("prosparse.predictor.fit", lambda *arguments: 1 / 0)
    assert main(["predict", *overrides(small, tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_leaves_no_folder(small, tmp_path, capsys):
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("no small disk: mount is not allowed here")
        filler, out = fill(tmp_path / "disk", 65536), tmp_path / "disk" / "out"
        assert main(["predict", *overrides(small, out)]) == 1
        assert f"prosparse predict: out={out} cannot be written: No space left on device" in capsys.readouterr().err
        assert list((tmp_path / "disk").iterdir()) == [filler]


def test_judging_in_chunks_counts_every_token(small, tmp_path, monkeypatch):
    model = load_model(small["model"], dtype=torch.float32)
    rows = record(model, splits(small)[1][0], range(4), tmp_path / "rows", Predict())
    torch.manual_seed(0)
    predictor = Predictor(32, 8, 48)
    whole = judge(predictor, rows, 1, [-0.1, 0.0])
    monkeypatch.setattr("prosparse.predictor.CHUNK", 7)
    assert judge(predictor, rows, 1, [-0.1, 0.0]) == whole


def recording(folder: Path, hidden: torch.Tensor, labels: torch.Tensor) -> Recording:
    """One layer's residuals [tokens, hidden] and labels [tokens, neurons] as `record` writes them."""
    folder.mkdir()
    (folder / "hidden-0").write_bytes(hidden.numpy().tobytes())
    (folder / "labels-0").write_bytes(np.packbits(labels.numpy(), axis=1).tobytes())
    return Recording(folder, torch.float32, len(hidden), labels.sum(0)[None], labels.sum()[None])


def test_what_the_training_scales_is_folded_into_the_weights(tmp_path):
    """Without a step the predictor is its first draw, seen through the scaling of its inputs."""
    torch.manual_seed(0)
    hidden = torch.randn(300, 16) * torch.logspace(-1.5, 1.5, 16) * torch.logspace(-1, 1, 300)[:, None]
    hidden[:, 3] = 0.0  # a dimension that is never used
    seen = recording(tmp_path / "rows", hidden, torch.rand(300, 24) < 0.3)
    predictor, _ = fit(seen, seen, 0, 8, Predict(epochs=1, lr=1e-12), torch.device("cpu"))
    torch.manual_seed(0)
    drawn = Predictor(16, 8, 24)
    rms = hidden.square().mean(-1, keepdim=True).sqrt()
    size = (hidden / rms).square().mean(0).sqrt()
    expected = drawn(hidden / rms / size.clamp(min=1e-3 * size.mean())) * rms / rms.mean()
    assert (predictor(hidden) - expected).abs().max() < 2e-3 * expected.abs().max()
    assert all(torch.equal(weight, weight.half().float()) for weight in predictor.state_dict().values())


def test_small_dimensions_are_learned_from_beside_large_ones(tmp_path):
    torch.manual_seed(0)
    hidden = torch.randn(2000, 16)
    labels = hidden[:, :4] @ torch.randn(4, 24) > 0.5
    hidden[:, 8:] *= 1000
    seen = recording(tmp_path / "rows", hidden, labels)
    predictor, _ = fit(seen, seen, 0, 16, Predict(epochs=20, lr=1e-2, tokens=200), torch.device("cpu"))
    judged = judge(predictor, seen, 0, [0.0])
    assert judged.recall[0] > 0.9 and judged.predicted_sparsity[0] > 0.45, judged


# --- neuron statistics ------------------------------------------------------------------------------------------------


def test_neuron_frequencies_are_those_of_a_plain_count(small, tmp_path, capsys):
    keys = {"checkpoint": small["model"], "text": small["text"], "cache": small["cache"], "out": tmp_path}
    arguments = [f"{key}={value}" for key, value in (keys | {"context": 32, "dtype": "fp32", "device": "cpu"}).items()]
    assert main(["measure", *arguments, "rows=9", "batch=2", "neurons=true"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    with safe_open(tmp_path / "neurons.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for layer in range(3):
        frequency, warm = (tensors[f"text.layers.{layer}.{name}"] for name in ("frequency", "hot"))
        assert 1 - frequency.mean().item() == pytest.approx(result["sparsity_by_layer"][layer], abs=1e-6)
        assert frequency.max() > frequency.min() and torch.equal(warm, hot(frequency))
        assert result["neurons"]["texts"]["text"]["hot_by_layer"][layer] == pytest.approx(warm.float().mean().item())
    assert main(["measure", *[a for a in arguments if not a.startswith("out=")], "neurons=true"]) == 2
    assert "give out=DIR" in capsys.readouterr().err


def test_hot_neurons_are_the_fewest_that_make_up_four_fifths():
    assert hot(torch.tensor([0.1, 0.0, 0.6, 0.3])).tolist() == [False, False, True, True]
    assert hot(torch.tensor([0.81, 0.0, 0.1, 0.09])).tolist() == [True, False, False, False]
    assert not hot(torch.zeros(4)).any()


# --- what is read back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "cutoff", "message"),
    [
        ({"fc1.bias": torch.zeros(4)}, 0.0, "model_0.pt holds more than fc1.weight and fc2.weight"),
        ({"fc2.weight": torch.full((16, 4), torch.nan)}, 0.0, "model_0.pt or the cutoff, 0.0, has a number not finite"),
        ({"fc1.weight": torch.full((4, 8), torch.inf)}, 0.0, "not finite"),
        ({}, math.nan, "the cutoff, nan, has a number not finite"),
    ],
)
def test_predictors_of_other_weights_or_no_numbers_are_refused(weights, cutoff, message, tmp_path):
    whole = {"fc1.weight": torch.zeros(4, 8), "fc2.weight": torch.zeros(16, 4)}
    (tmp_path / "activation").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"sparse_threshold": cutoff}))
    torch.save(whole | weights, tmp_path / "model_0.pt")
    torch.save(torch.zeros(16), tmp_path / "activation" / "activation_0.pt")
    with pytest.raises(ValueError, match=message):
        load_predictors(tmp_path, 1, 8, 16)
