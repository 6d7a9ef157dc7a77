"""Exported folders load without prosparse and compute what was trained."""

import ast
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import BASES, TOKEN_IDS, base_model, logits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

from prosparse.exporters import hf
from prosparse.ffn import ACTIVATION_KEYS, SeparateFFN, activation_key, substitute
from prosparse.models import SPARSE_CLASSES
from prosparse.models.formats import STOCK_ACTIVATIONS
from prosparse.models.load import build_model, load_model, load_tokenizer

EXPORTS = {  # name: base, activation, param, dtype, architecture in config.json
    "llama-silu": ("llama", "silu", 0.0, torch.float32, "LlamaForCausalLM"),
    "llama-relu": ("llama", "relu", 0.0, torch.float32, "LlamaForCausalLM"),
    "llama-fatrelu": ("llama", "fatrelu", 0.125, torch.float32, "SparseLlamaForCausalLM"),
    "llama-fatrelu-bf16": ("llama_special", "fatrelu", 0.125, torch.bfloat16, "SparseLlamaForCausalLM"),
    "llama-drelu": ("llama_special", "drelu", 0.0, torch.float32, "BambooForCausalLM"),
    "llama-biased-drelu": ("llama_biased", "drelu", 0.0, torch.float32, "AnySparseLlamaForCausalLM"),
    "llama-shifted_relu": ("llama", "shifted_relu", 0.125, torch.float32, "AnySparseLlamaForCausalLM"),
    "mistral-relu": ("mistral", "relu", 0.0, torch.float32, "MistralForCausalLM"),
    "mistral-fatrelu": ("mistral", "fatrelu", 0.125, torch.float32, "SparseMistralForCausalLM"),
    "mistral-drelu": ("mistral", "drelu", 0.0, torch.float32, "BambooForCausalLM"),
    "qwen2-relu": ("qwen2", "relu", 0.0, torch.float32, "Qwen2ForCausalLM"),
    "qwen2-fatrelu": ("qwen2", "fatrelu", 0.125, torch.float32, "SparseQwen2ForCausalLM"),
    "qwen2-drelu": ("qwen2", "drelu", 0.0, torch.bfloat16, "SparseQwen2ForCausalLM"),
    "qwen3-relu": ("qwen3", "relu", 0.0, torch.bfloat16, "Qwen3ForCausalLM"),
    "qwen3-fatrelu": ("qwen3", "fatrelu", 0.125, torch.float32, "SparseQwen3ForCausalLM"),
    "qwen3-drelu": ("qwen3", "drelu", 0.0, torch.float32, "SparseQwen3ForCausalLM"),
    "qwen3-relu2": ("qwen3", "relu2", 0.0, torch.float32, "SparseQwen3ForCausalLM"),
    "gemma-gelu": ("gemma", "gelu_pytorch_tanh", 0.0, torch.float32, "GemmaForCausalLM"),
    "gemma-relu": ("gemma", "relu", 0.0, torch.float32, "GemmaForCausalLM"),
    "gemma-fatrelu": ("gemma", "fatrelu", 0.125, torch.float32, "SparseGemmaForCausalLM"),
    "gemma3_text-relu": ("gemma3_text", "relu", 0.0, torch.float32, "Gemma3ForCausalLM"),
    "gemma3_text-fatrelu": ("gemma3_text", "fatrelu", 0.125, torch.bfloat16, "SparseGemma3ForCausalLM"),
    "phi3-relu": ("phi3", "relu", 0.0, torch.float32, "Phi3ForCausalLM"),
    "phi3-fatrelu": ("phi3", "fatrelu", 0.125, torch.float32, "SparsePhi3ForCausalLM"),
    "phi3-drelu": ("phi3", "drelu", 0.0, torch.bfloat16, "SparsePhi3ForCausalLM"),
    "opt-relu": ("opt", "relu", 0.0, torch.float32, "OPTForCausalLM"),
    "opt-fatrelu": ("opt", "fatrelu", 0.125, torch.float32, "SparseOPTForCausalLM"),
    "gpt_neox-relu": ("gpt_neox", "relu", 0.0, torch.float32, "GPTNeoXForCausalLM"),
    "gpt_neox-shifted_relu": ("gpt_neox", "shifted_relu", 0.125, torch.float32, "SparseGPTNeoXForCausalLM"),
    "falcon-relu": ("falcon", "relu", 0.0, torch.float32, "FalconForCausalLM"),
    "falcon-fatrelu": ("falcon", "fatrelu", 0.125, torch.bfloat16, "SparseFalconForCausalLM"),
    "minicpm-relu": ("minicpm", "relu", 0.0, torch.float32, "MiniCPMForCausalLM"),
    "minicpm-fatrelu": ("minicpm", "fatrelu", 0.125, torch.float32, "MiniCPMForCausalLM"),
    "minicpm-silu": ("minicpm", "silu", 0.0, torch.bfloat16, "MiniCPMForCausalLM"),
    "mixtral-relu": ("mixtral", "relu", 0.0, torch.float32, "MixtralForCausalLM"),
    "mixtral-drelu": ("mixtral", "drelu", 0.0, torch.float32, "SparseMixtralForCausalLM"),
    "qwen3_moe-relu": ("qwen3_moe", "relu", 0.0, torch.bfloat16, "Qwen3MoeForCausalLM"),
    "qwen3_moe-fatrelu": ("qwen3_moe", "fatrelu", 0.125, torch.float32, "SparseQwen3MoeForCausalLM"),
}


def sparse_model(base: str, activation: str, param: float, dtype: torch.dtype = torch.float32):
    model = base_model(base)
    model = build_model(model.config, model.state_dict(), dtype)  # .to(dtype) would round the rotary frequencies, too
    substitute(model, activation, param)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "The": 3, "model": 4, "return": 5}, unk_token="<unk>")
    )
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, dict]:
    """Every export of EXPORTS, all loaded by one fresh process: folder, the process's logits and what it says."""
    torch.set_num_threads(1)
    root, scratch = tmp_path_factory.mktemp("exports"), tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "verify", lambda *arguments: {})
        for name, (base, activation, param, dtype, _) in EXPORTS.items():
            hf.export_hf_model(sparse_model(base, activation, param), None, root / name, dtype)
    jobs = [
        {
            "folder": str(root / name),
            "trust_remote_code": architecture in {made.__name__ for made in SPARSE_CLASSES.values()},
            "dtype": str(dtype).removeprefix("torch."),
            "threads": 1,
            "token_ids": TOKEN_IDS.tolist(),
            "text": None,
            "logits": str(scratch / f"{name}.safetensors"),
        }
        for name, (*_, dtype, architecture) in EXPORTS.items()
    ]
    seen = hf.reload_in_fresh_process(jobs, scratch)
    return {
        name: {"folder": root / name, "logits": load_file(job["logits"])["logits"].float(), **said}
        for name, job, said in zip(EXPORTS, jobs, seen, strict=True)
    }


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_computes_the_same_in_a_fresh_process_without_prosparse(exports, name):
    base, activation, param, dtype, architecture = EXPORTS[name]
    expected = logits(sparse_model(base, activation, param, dtype))
    assert torch.equal(exports[name]["logits"], expected)
    assert exports[name]["class"] == architecture
    assert exports[name]["activations"] == [[activation, param]] * 2
    assert not exports[name]["imports_prosparse"] and not exports[name]["problems"]


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_loads_with_prosparse_and_without_its_code(exports, name):
    base, activation, param, dtype, architecture = EXPORTS[name]
    model = load_model(exports[name]["folder"], dtype=dtype)
    assert type(model).__name__ == architecture and type(model).__module__.startswith(("prosparse.", "transformers."))
    assert torch.equal(logits(model), logits(sparse_model(base, activation, param, dtype)))


@pytest.mark.parametrize("name", EXPORTS)
def test_a_config_says_what_the_published_formats_say(exports, name):
    base, activation, param, dtype, architecture = EXPORTS[name]
    folder = exports[name]["folder"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [architecture] and config["dtype"] == str(dtype).removeprefix("torch.")
    for key, value in BASES[base].to_dict().items():
        unsaid = ("architectures", "dtype", *ACTIVATION_KEYS, "hidden_act_param", "model_type", "transformers_version")
        foreign = ("attention_bias", "mlp_bias", "pretraining_tp") if architecture == "BambooForCausalLM" else ()
        assert key in (*unsaid, *foreign) or key not in config or config[key] == value
    assert not {"quantization_config", "_name_or_path", "_attn_implementation"} & set(config)
    if architecture == "SparseLlamaForCausalLM":
        assert (config["model_type"], config["hidden_act"]) == ("sparsellama", "fatrelu")
        assert config["auto_map"] == {
            "AutoConfig": "modeling_sparsellama.SparseLlamaConfig",
            "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
        }
    elif architecture == "BambooForCausalLM":
        assert (config["model_type"], config["hidden_act"]) == ("bamboo", "relu")
        assert config["sliding_window"] == (8 if base == "mistral" else None)
    else:
        assert config[activation_key(BASES[base])] == activation
    stock = activation in STOCK_ACTIVATIONS and base != "minicpm"
    if stock:
        assert "auto_map" not in config and not list(folder.glob("*.py"))
    else:
        assert [path.name for path in folder.glob("*.py")] == [f"modeling_{config['model_type']}.py"]
    in_bamboo = architecture == "BambooForCausalLM"
    assert config.get("hidden_act_param") == (None if stock or in_bamboo else param)


@pytest.mark.parametrize("model_class", SPARSE_CLASSES.values())
def test_a_modeling_file_imports_only_torch_and_transformers(model_class):
    tree = ast.parse(hf.modeling_source(model_class))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} == {"collections", "contextlib", "torch", "transformers"}


@pytest.mark.parametrize("activation", ["silu", "relu", "fatrelu", "drelu", "shifted_relu", "relu2"])
def test_training_the_exported_file_and_the_stock_class_share_one_ffn(activation):
    scope: dict = {"__name__": "exported"}
    exec(hf.modeling_source(SPARSE_CLASSES["sparsellama"]), scope)
    config = deepcopy(BASES["llama"])
    config.hidden_act = {"silu": "silu", "relu2": "relu2"}.get(activation, "relu")
    torch.manual_seed(0)
    stock, hidden = LlamaMLP(config), torch.randn(5, 7, 32)
    param = 0.125 if activation in ("fatrelu", "drelu", "shifted_relu") else 0.0
    ours, theirs = (made(stock, activation, param) for made in (SeparateFFN, scope["SeparateFFN"]))
    assert torch.equal(ours(hidden), theirs(hidden))
    if activation != "drelu":  # the stock class has no activation on up
        ours.param = 0.0
        assert torch.equal(ours(hidden), stock(hidden))


def test_an_export_is_checked_and_complete(tmp_path):
    model = sparse_model("llama_special", "fatrelu", 0.125)
    model.generation_config.update(temperature=0.6, do_sample=True)
    words = tokenizer()
    out = tmp_path / "new" / "export"
    result = hf.export_hf_model(model, words, out, torch.float32, max_shard_size="40KB")
    assert (result["model_type"], result["class"]) == ("sparsellama", "SparseLlamaForCausalLM")
    assert (result["activation"], result["param"], result["dtype"]) == ("fatrelu", 0.125, "float32")
    assert result["max_logit_difference"] == 0 and result["logit_difference_bound"] > 0
    assert {path.name for path in out.iterdir()} == {*result["files"], "result.json"}
    assert json.loads((out / "result.json").read_text()) == result
    assert result["bytes"] == sum((out / name).stat().st_size for name in result["files"])
    assert "model.safetensors.index.json" in result["files"] and len(list(out.glob("*.safetensors"))) > 1
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # the weights are as readable as the rest
    assert torch.equal(logits(load_model(out, dtype=torch.float32)), logits(model))
    assert load_model(out, dtype=torch.float32).generation_config.temperature == 0.6
    assert load_tokenizer(out)("The model")["input_ids"] == words("The model")["input_ids"] == [3, 4]
    assert load_tokenizer(out).chat_template == words.chat_template
    assert [path.name for path in out.parent.iterdir()] == ["export"]


def test_a_state_dict_exports_like_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "verify", lambda *arguments: {})
    model = base_model("llama_special")
    config = deepcopy(BASES["llama_special"])
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    hf.export_hf(state_dict, config, "fatrelu", 0.125, None, None, tmp_path / "export", torch.float32)
    expected = logits(sparse_model("llama_special", "fatrelu", 0.125))
    assert torch.equal(logits(load_model(tmp_path / "export", dtype=torch.float32)), expected)
    again = load_model(tmp_path / "export", dtype=torch.float32)
    hf.export_hf_model(again, None, tmp_path / "again", torch.float32)
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "export" / "config.json").read_text()
    del state_dict["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lacks weights .*: model\.norm\.weight"):
        hf.export_hf(state_dict, config, "fatrelu", 0.125, None, None, tmp_path / "short", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "export"]


def test_an_export_that_does_not_load_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "modeling_source", lambda model_class: "raise ImportError('no such thing')\n")
    with pytest.raises(RuntimeError, match=r"does not load in a fresh process.*no such thing") as error:
        hf.export_hf_model(sparse_model("llama", "fatrelu", 0.125), None, tmp_path / "export", torch.float32)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("activations", [["fatrelu", 0.1], ["fatrelu", 0.125]], "its activations are"),
        ("imports_prosparse", True, "imports prosparse"),
        ("problems", ["model.norm.weight"], r"missing or surplus: model\.norm\.weight"),
        ("text_ids", [1], "other token ids"),
        ("shift", 0.1, "a logit differs by 0.1"),
    ],
)
def test_an_export_that_loads_as_another_model_is_refused(key, value, message, tmp_path, monkeypatch):
    model = sparse_model("llama", "fatrelu", 0.125)
    reload = {"class": "SparseLlamaForCausalLM", "activations": [["fatrelu", 0.125]] * 2, "problems": []}
    reload |= {"text_ids": None, "imports_prosparse": False, key: value}

    def reloaded(jobs: list[dict], scratch: Path) -> list[dict]:
        with torch.no_grad():
            seen = model(torch.tensor(jobs[0]["token_ids"])).logits + reload.get("shift", 0)
        save_file({"logits": seen}, jobs[0]["logits"])
        return [reload]

    monkeypatch.setattr(hf, "reload_in_fresh_process", reloaded)
    with pytest.raises(RuntimeError, match=message):
        hf.export_hf_model(model, None, tmp_path / "export", torch.float32)
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "verify", lambda *arguments: {})
    model, out = sparse_model("qwen3", "relu2", 0.0), tmp_path / "export"

    def export() -> dict:
        return hf.export_hf_model(model, None, out, torch.float32)

    out.mkdir()
    assert export()["model_type"] == "sparse_qwen3"  # an empty folder may be used
    substitute(model, "relu")
    (out / "result.json").write_text(
        json.dumps({"verb": "shift", "export": json.loads((out / "result.json").read_text())})
    )
    assert export()["model_type"] == "qwen3" and not list(out.glob("*.py"))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        export()
    (out / "result.json").unlink()
    with pytest.raises(ValueError, match="no part of an earlier export"):
        export()
    assert (out / "notes.txt").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["export"]


def test_the_card_is_a_file_of_the_export_from_its_writing_to_its_replacement(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "verify", lambda *arguments: {"class": "SparseLlamaForCausalLM"})
    model, out, seen = sparse_model("llama", "fatrelu", 0.125), tmp_path / "export", []

    def card(said: dict) -> str:
        seen.append(said)
        return f"card {len(seen)}: {'measured ' * len(seen)}"

    def export() -> dict:
        return hf.export_hf_model(model, None, out, torch.float32, card=card)

    first = export()
    assert (out / "README.md").read_text() == "card 1: measured "
    assert seen[0]["activation"] == "fatrelu" and "modeling_sparsellama.py" in seen[0]["files"]
    second = hf.put_card(out, card)
    assert (out / "README.md").read_text() == "card 2: measured measured "
    assert json.loads((out / "result.json").read_text()) == second
    assert {path.name for path in out.iterdir()} == {*second["files"], "result.json"} and "README.md" in second["files"]
    assert second["files"] == first["files"]
    assert (
        second["bytes"] == first["bytes"] + len("measured ") == sum((out / f).stat().st_size for f in second["files"])
    )
    export()  # which replaces only what an export wrote
    assert (out / "README.md").read_text().startswith("card 3")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    model = sparse_model("llama", "relu", 0.0)
    for out in (tmp_path / "file", tmp_path / "file" / "export"):
        with pytest.raises(ValueError, match=f"out={out}"):
            hf.export_hf_model(model, None, out, torch.float32)
