"""Folders in the layout of the public releases load without remote code, compute what they should, and train."""

import json
from pathlib import Path

import pytest
import torch
from test_export import tokenizer
from test_models import SIZES, TOKEN_IDS, base_model, logits
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import prosparse
from prosparse.ffn import activation_of, sparse_ffns, substitute
from prosparse.models import SPARSE_CLASSES
from prosparse.models.bamboo import BambooForSequenceClassification, BambooModel
from prosparse.models.llama import SparseLlamaConfig
from prosparse.models.load import load_model
from prosparse.models.minicpm import MiniCPMForCausalLM

# config.json of the releases, their activation, and the number of parameters that these shapes give
LLAMA = {
    "architectures": ["SparseLlamaForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
        "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
    },
    **{"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.01, "vocab_size": 32000},
}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
RELEASES = {
    "SparseLLM/prosparse-llama-2-7b": (LLAMA | LLAMA_7B, ("fatrelu", 0.01), 6.74e9),
    "SparseLLM/prosparse-llama-2-13b": (LLAMA | LLAMA_13B, ("fatrelu", 0.01), 13.02e9),
    "PowerInfer/Bamboo-base-v0_1": (
        {
            "architectures": ["BambooForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_bamboo.BambooConfig",
                "AutoModelForCausalLM": "modeling_bamboo.BambooForCausalLM",
            },
            **{"model_type": "bamboo", "hidden_act": "relu", "hidden_size": 4096, "intermediate_size": 14336},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
            **{"rope_theta": 10000.0, "sliding_window": 4096},
        },
        ("drelu", 0.0),
        7.24e9,
    ),
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
LAYOUTS = [  # those that differ
    *(name for name in RELEASES if "13b" not in name),
    "SparseLLM/ReluLLaMA-7B",
    "openbmb/MiniCPM-S-1B-sft-llama-format",
]
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


def write_layout(folder: Path, name: str) -> tuple[str, float]:
    """A tiny folder in the layout of one of LAYOUTS; returns its activation."""
    if name in RELEASES:
        write_release(folder, name)
        return RELEASES[name][1]
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, hidden_act="relu")).save_pretrained(folder)
    return "relu", 0.0


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
        assert key in ("auto_map", "architectures", "rope_scaling", "rope_theta") or getattr(config, key) == value


@pytest.mark.parametrize("name", [name for name in RELEASES if "13b" not in name])
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


def test_the_threshold_may_stand_in_the_name_of_the_activation(tmp_path):
    name = "SparseLLM/prosparse-llama-2-7b"
    write_release(tmp_path / "release", name)
    expected = logits(load_model(tmp_path / "release", dtype=torch.float32))
    config = json.loads((tmp_path / "release" / "config.json").read_text())
    del config["hidden_act_param"]
    (tmp_path / "release" / "config.json").write_text(json.dumps(config | {"hidden_act": "fatrelu_0.01"}))
    model = load_model(tmp_path / "release", dtype=torch.float32)
    assert activation_of(model) == ("fatrelu", 0.01) and torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (kept["hidden_act"], kept["hidden_act_param"]) == ("fatrelu", 0.01)
    with pytest.raises(ValueError, match="hidden_act is fatrelu_high"):
        AutoModelForCausalLM.from_config(SparseLlamaConfig(**TINY, hidden_act="fatrelu_high"))


# --- Bamboo -----------------------------------------------------------------------------------------------------------


def test_bamboo_answers_in_chatml(tmp_path):
    write_release(tmp_path / "release", "PowerInfer/Bamboo-base-v0_1")
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    words.save_pretrained(tmp_path / "release")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    words = AutoTokenizer.from_pretrained(tmp_path / "release")
    messages = [{"role": "user", "content": "The model"}]
    prompt = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nThe model<|im_end|>\n<|im_start|>assistant\n"
    inputs = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, inputs["input_ids"].shape[1] + 5)


def test_bamboo_without_a_head_is_the_same_model(tmp_path):
    write_release(tmp_path / "release", "PowerInfer/Bamboo-base-v0_1")
    whole, inner = (made.from_pretrained(tmp_path / "release").eval() for made in (AutoModelForCausalLM, AutoModel))
    assert type(inner) is BambooModel and [ffn.activation for ffn in sparse_ffns(inner)] == ["drelu"] * 2
    with torch.no_grad():
        assert torch.equal(whole.lm_head(inner(TOKEN_IDS).last_hidden_state), whole(TOKEN_IDS).logits)


def test_bamboo_learns_a_toy_classification(tmp_path):
    write_release(tmp_path / "release", "PowerInfer/Bamboo-base-v0_1")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "release", num_labels=2, pad_token_id=0)
    assert type(model) is BambooForSequenceClassification and len(sparse_ffns(model)) == 2
    ids = torch.randint(10, 96, (32, 8), generator=torch.Generator().manual_seed(1))
    labels = (ids[:, -1] > 52).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < losses[0]
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
        assert (again(ids).logits.argmax(-1) == labels).float().mean() > 0.95


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
