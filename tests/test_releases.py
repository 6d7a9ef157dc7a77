"""Folders in the layout of the public releases load without remote code, compute what they should, and train."""

import json
from pathlib import Path

import pytest
import torch
from test_models import SIZES, TOKEN_IDS, base_model, logits
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import prosparse
from prosparse.ffn import activation_of, sparse_ffns, substitute
from prosparse.models import SPARSE_CLASSES
from prosparse.models.load import load_model
from prosparse.models.minicpm import MiniCPMForCausalLM

# config.json of the releases, their activation, and the number of parameters that these shapes give
RELEASES = {
    "openbmb/MiniCPM-S-1B-sft": (
        {
            "architectures": ["MiniCPMForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_minicpm.MiniCPMConfig",
                "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
            },
            **{"model_type": "minicpm", "hidden_act": "fatrelu", "hidden_act_param": 0.03, "hidden_size": 1536},
            **{"intermediate_size": 3840, "num_hidden_layers": 52, "num_attention_heads": 24, "vocab_size": 73440},
            **{"num_key_value_heads": 8, "max_position_embeddings": 4096, "rope_scaling": None},
            **{"scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4},
        },
        ("fatrelu", 0.03),
        1.36e9,
    ),
}
TINY = {key: value for key, value in SIZES.items() if key != "initializer_range"}


def write_release(folder: Path, name: str) -> dict:
    """The release's folder with its config.json, cut down to a tiny size, and random weights under its names."""
    values = RELEASES[name][0] | TINY | {"dtype": "float32"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    (folder / f"{values['auto_map']['AutoModelForCausalLM'].split('.')[0]}.py").write_text("raise SystemExit('ran')\n")
    torch.manual_seed(0)
    model = SPARSE_CLASSES[values["model_type"]](AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder / "weights")
    (folder / "weights" / "model.safetensors").rename(folder / "model.safetensors")
    return values


@pytest.mark.parametrize("name", RELEASES)
def test_a_published_config_has_its_class_activation_and_size(name, tmp_path):
    values, activation, parameters = RELEASES[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == values["architectures"][0] and type(model).__module__.startswith("prosparse.")
    assert activation_of(model) == activation and len(sparse_ffns(model)) == values["num_hidden_layers"]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
    for key, value in values.items():
        assert key in ("auto_map", "architectures", "rope_scaling", "hidden_act") or getattr(config, key) == value


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_folder_loads_without_its_code_trains_exports_and_loads_again(name, tmp_path):
    values = write_release(tmp_path / "release", name)
    model = load_model(tmp_path / "release", dtype=torch.float32)
    assert type(model) is SPARSE_CLASSES[values["model_type"]] and activation_of(model) == RELEASES[name][1]
    before = logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(TOKEN_IDS, labels=TOKEN_IDS, use_cache=False).loss.backward()
    optimizer.step()
    after = logits(model.eval())
    assert not torch.equal(after, before)
    result = prosparse.export(model, None, tmp_path / "export", torch.float32)
    assert result["model_type"] == values["model_type"]
    again = load_model(tmp_path / "export", dtype=torch.float32)
    assert torch.equal(logits(again), after)
    kept = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {key: kept[key] for key in ("model_type", "hidden_act", "architectures")} == {
        key: values[key] for key in ("model_type", "hidden_act", "architectures")
    }
    assert kept.get("hidden_act_param") == values.get("hidden_act_param")


# --- MiniCPM ----------------------------------------------------------------------------------------------------------


def test_minicpm_is_llama_with_three_scalings():
    model = base_model("minicpm")
    config, inner = model.config, model.model
    hidden = inner.embed_tokens.weight[TOKEN_IDS] * config.scale_emb
    positions = inner.rotary_emb(hidden, torch.arange(TOKEN_IDS.shape[1])[None])
    depth = config.scale_depth / config.num_hidden_layers**0.5
    undone = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in inner.layers]
    for projections in undone:
        for projection in projections:
            projection._forward_hooks.clear()
    inner.norm._forward_hooks.clear()
    for layer in inner.layers:
        attended = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=positions, attention_mask=None)[0]
        hidden = hidden + attended * depth
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden)) * depth
    expected = inner.norm(hidden) / (config.hidden_size / config.dim_model_base) @ model.lm_head.weight.T
    torch.testing.assert_close(logits(base_model("minicpm")), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "param", "model_type"), [("relu", 0.0, "llama"), ("fatrelu", 0.03, "sparsellama")]
)
def test_a_folded_minicpm_has_equal_logits(activation, param, model_type):
    model = base_model("minicpm")
    substitute(model, activation, param)
    expected, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = prosparse.fold_minicpm(model)
    assert isinstance(folded, LlamaForCausalLM) and not isinstance(folded, MiniCPMForCausalLM)
    assert folded.config.model_type == model_type and activation_of(folded) == activation_of(model)
    assert not any(hasattr(folded.config, key) for key in ("scale_emb", "scale_depth", "dim_model_base"))
    assert (logits(folded) - expected).abs().max() <= 1e-4
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="is no MiniCPM"):
        prosparse.fold_minicpm(folded)
