"""A PowerInfer file read back: its tensors, its metadata, and what a runtime that knows only them computes."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from chains import small_disk
from conftest import make_tiny, script, tiny_llama
from test_export import tokenizer as word_tokenizer
from test_models import base_model
from test_releases import LAYOUTS, write_layout
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from prosparse.cli import main
from prosparse.config import Quantization
from prosparse.exporters.powerinfer import export_powerinfer
from prosparse.ffn import substitute
from prosparse.models.formats import released_config
from prosparse.models.load import build_model, load_model, load_tokenizer
from prosparse.predictor import load_predictors, only_predicted

powerinfer = script("powerinfer")  # the file, and what a runtime computes that knows nothing else
TOKEN_IDS = torch.arange(2 * 24).reshape(2, 24) * 37 % 96
CLOSE = 1e-5  # of the largest logit: the weights are numbers of f16, so the file holds them exactly


def strong(model):
    """Weights at which every part of the model moves the logits, all of them f16 numbers."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 if parameter.dim() == 2 else parameter + 0.3)
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(parameter.half())
    return model.eval()


def relu_llama(**changes):
    return strong(tiny_llama(hidden_act="relu", intermediate_size=64, **changes))


def write_predictors(folder: Path, layers: int, hidden: int, neurons: int, rank: int = 8, cutoff: float = 0.5) -> Path:
    torch.manual_seed(4)
    (folder / "activation").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"sparse_threshold": cutoff}))
    for layer in range(layers):
        weights = {"fc1.weight": torch.randn(rank, hidden), "fc2.weight": torch.randn(neurons, rank)}
        torch.save({key: value.half() for key, value in weights.items()}, folder / f"model_{layer}.pt")
        torch.save(torch.rand(neurons), folder / "activation" / f"activation_{layer}.pt")
    return folder


@pytest.fixture
def predictors(tmp_path) -> Path:
    return write_predictors(tmp_path / "predictors", 3, 32, 64)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> PreTrainedTokenizerFast:
    return load_tokenizer(make_tiny(tmp_path_factory.mktemp("bpe"))["model"])


def exported(model, tokenizer, predictors: Path, out: Path, **how) -> tuple:
    result = export_powerinfer(model, tokenizer, predictors, out, **how)
    file = powerinfer.File(out / result["gguf"])
    assert powerinfer.unmet(file) == []
    return file, result


def mistral():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 30, "rope_theta": 500.0}
    model = strong(MistralForCausalLM(MistralConfig(**sizes, **heads)))
    substitute(model, "drelu")
    return model


@pytest.mark.parametrize("make", [relu_llama, mistral, lambda: relu_llama(tie_word_embeddings=False)])
def test_the_runtimes_own_forward_gives_the_models_logits(make, bpe, predictors, tmp_path):
    model = make()
    file, result = exported(model, bpe, predictors, tmp_path / "out")
    learned, cutoff = load_predictors(predictors, 3, 32, 64)
    with torch.no_grad():
        whole = model(TOKEN_IDS).logits
        with only_predicted(model, learned, cutoff):
            predicted = model(TOKEN_IDS).logits
    bound = CLOSE * whole.abs().max()
    assert (file.logits(TOKEN_IDS, False) - whole).abs().max() < bound
    assert (file.logits(TOKEN_IDS, True) - predicted).abs().max() < bound
    assert (whole - predicted).abs().max() > 1000 * bound
    assert result["architecture"] == file.keys["general.architecture"] == ("bamboo" if make is mistral else "llama")
    assert result["context"] == (30 if make is mistral else 256)  # beyond a window PowerInfer would differ


@pytest.mark.parametrize("quantization", [Quantization.f16, Quantization.q4_0])
def test_every_tensor_is_the_models(quantization, bpe, predictors, tmp_path):
    model = relu_llama()
    file, result = exported(model, bpe, predictors, tmp_path / "out", quantization=quantization)
    largest = result["largest_error"]
    assert largest == 0 if quantization is Quantization.f16 else 0 < largest < 0.2  # weights are f16 numbers
    ours, config = model.state_dict(), model.config
    learned, _ = load_predictors(predictors, 3, 32, 64)

    def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:  # as the runtime's own converter writes it
        return rows.reshape(heads, 2, len(rows) // heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    wanted = {"token_embd": ours["model.embed_tokens.weight"], "output_norm": ours["model.norm.weight"]}
    wanted |= {"output": ours["lm_head.weight"]}
    for layer in range(3):
        weight = lambda name, at=layer: ours[f"model.layers.{at}.{name}.weight"]  # noqa: E731
        wanted |= {
            f"blk.{layer}.attn_norm": weight("input_layernorm"),
            f"blk.{layer}.attn_q": permuted(weight("self_attn.q_proj"), config.num_attention_heads),
            f"blk.{layer}.attn_k": permuted(weight("self_attn.k_proj"), config.num_key_value_heads),
            f"blk.{layer}.attn_v": weight("self_attn.v_proj"),
            f"blk.{layer}.attn_output": weight("self_attn.o_proj"),
            f"blk.{layer}.ffn_norm": weight("post_attention_layernorm"),
            f"blk.{layer}.ffn_gate": weight("mlp.gate_proj"),
            f"blk.{layer}.ffn_up": weight("mlp.up_proj"),
            f"blk.{layer}.ffn_down_t": weight("mlp.down_proj").T,
            f"blk.{layer}.fc1": learned[layer].fc1.weight,
            f"blk.{layer}.fc2": learned[layer].fc2.weight,
        }
    assert set(file.tensors) == {f"{name}.weight" for name in wanted}
    for name, values in wanted.items():
        kind, seen = file.kinds[f"{name}.weight"], file.tensors[f"{name}.weight"]
        assert file.shapes[f"{name}.weight"] == list(values.shape)[::-1]
        if "norm" in name:
            assert kind == "F32" and torch.equal(seen, values)
        elif quantization is Quantization.f16 or name == "output" or ".fc" in name:
            assert kind == "F16" and torch.equal(seen, values.half().float())
        else:
            assert kind == "Q4_0"
            blocks = values.reshape(-1, 32)
            assert ((seen.reshape(-1, 32) - blocks).abs() <= blocks.abs().amax(1, keepdim=True) / 7).all()


def test_rows_that_do_not_divide_by_32_stay_f16(bpe, tmp_path):
    model = strong(tiny_llama(hidden_act="relu", hidden_size=16, intermediate_size=64))
    predictors = write_predictors(tmp_path / "predictors", 3, 16, 64)
    file, _ = exported(model, bpe, predictors, tmp_path / "out", quantization=Quantization.q4_0)
    assert set(file.kinds.values()) == {"F16", "F32"}


def test_the_metadata_says_what_the_runtime_asks_for(bpe, predictors, tmp_path):
    model = relu_llama()
    model.config._name_or_path = None  # as a run's checkpoint has it
    file, result = exported(model, bpe, predictors, tmp_path / "out")
    assert file.keys["general.name"] == "prosparse"
    keys = {
        "context_length": 256,
        "embedding_length": 32,
        "block_count": 3,
        "feed_forward_length": 64,
        "rope.dimension_count": 8,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": 10000.0,
    }
    for name, value in keys.items():
        assert file.keys[f"llama.{name}"] == value
    assert file.keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert file.keys["general.file_type"] == 1 and file.keys["powerinfer.sparse_threshold"] == 0.5 == result["cutoff"]
    assert file.keys["tokenizer.ggml.model"] == "gpt2"
    assert file.keys["tokenizer.ggml.tokens"] == bpe.convert_ids_to_tokens(range(300))
    assert file.keys["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and len(file.keys["tokenizer.ggml.merges"]) > 20
    assert (file.keys["tokenizer.ggml.bos_token_id"], file.keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert file.keys["tokenizer.ggml.add_bos_token"] is False


def test_what_the_runtimes_loader_stops_at_is_found(bpe, predictors, tmp_path):
    file, _ = exported(relu_llama(), bpe, predictors, tmp_path / "out")
    kind, shape = file.types.pop("llama.rope.freq_base"), file.shapes["blk.1.ffn_down_t.weight"]
    assert powerinfer.unmet(file) == ["llama.rope.freq_base is None, not FLOAT32"]
    file.types["llama.rope.freq_base"] = kind
    file.shapes["blk.1.ffn_down_t.weight"] = shape[::-1]
    assert powerinfer.unmet(file) == ["blk.1.ffn_down_t is [64, 32], not [32, 64]"]
    file.shapes["blk.1.ffn_down_t.weight"] = shape
    file.kinds["output_norm.weight"] = "F16"
    file.offsets[2] += 1
    assert powerinfer.unmet(file) == ["output_norm is F16", "tensors do not begin at multiples of 32 bytes"]
    file.magic = b"GGUF"
    assert powerinfer.unmet(file) == ["magic b'GGUF', version 3"]


def test_the_folder_holds_what_the_solver_reads(bpe, predictors, tmp_path):
    out = tmp_path / "new" / "small.gguf"
    assert export_powerinfer(relu_llama(), bpe, predictors, out)["predictors_of"] is None
    (predictors / "result.json").write_text(json.dumps({"verb": "predict", "checkpoint": "runs/demo"}))
    result = export_powerinfer(relu_llama(), bpe, predictors, out)
    assert result["predictors_of"] == "runs/demo"
    (predictors / "result.json").unlink()
    found = {str(path.relative_to(out.parent)) for path in out.parent.rglob("*") if path.is_file()}
    assert found == {*result["files"], "result.json"} and "small.gguf" in found
    for path in predictors.rglob("*.*"):
        assert (out.parent / path.relative_to(predictors)).read_bytes() == path.read_bytes()
    assert json.loads((out.parent / "result.json").read_text()) == result
    export_powerinfer(relu_llama(), bpe, predictors, out)  # an earlier export is replaced
    for other in (out.with_name("other.gguf"), out.parent):
        with pytest.raises(ValueError, match="holds an earlier export, small.gguf, and not"):
            export_powerinfer(relu_llama(), bpe, predictors, other)
    assert sorted(path.name for path in (tmp_path / "new").parent.iterdir()) == ["new", "predictors"]


def test_a_file_that_is_not_what_was_to_be_written_is_no_export(bpe, predictors, tmp_path, monkeypatch):
    export = partial(export_powerinfer, relu_llama(), bpe, predictors, tmp_path / "out")
    with monkeypatch.context() as fault:
        fault.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda *_: None)
        with pytest.raises(RuntimeError, match="would not load the file that was written: llama.rope.freq_base is No"):
            export()

    def spoiled(array, file, *_) -> None:
        file.write(array.tobytes()[:-2] + bytes(2))

    for kind in Quantization:
        with monkeypatch.context() as fault:
            fault.setattr("prosparse.exporters.powerinfer._Written.tofile", spoiled)
            with pytest.raises(RuntimeError, match="token_embd.weight does not stand in the file as it was written"):
                export(quantization=kind)
    assert not (tmp_path / "out").exists()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def sentencepiece() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    text = ["the sparse neuron rests while the gate fires", "the dense neuron never rests"] * 20
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=[*special, *(f"<0x{n:02X}>" for n in (0, 1, 10))])
    raw.train_from_iterator(text, trainer)
    raw.decoder = decoders.Replace("▁", " ")
    # As Llama's own file has it: the bytes are no added tokens.
    content = json.loads(raw.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    raw = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def joined_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's BPE as the runtime has it: of all neighbors those with the best joint score first."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        merged = [(at, tokens.index(a + b)) for at, (a, b) in enumerate(pairwise(parts)) if a + b in tokens]
        if not merged:
            return [tokens.index(part) for part in parts]
        at, token = max(merged, key=lambda place: (scores[place[1]], -place[0]))
        parts[at : at + 2] = [tokens[token]]


def test_a_sentencepiece_tokenizer_gives_the_same_ids_by_its_scores(predictors, tmp_path):
    words = sentencepiece()
    file, result = exported(relu_llama(), words, predictors, tmp_path / "out")
    tokens, kinds = file.keys["tokenizer.ggml.tokens"], file.keys["tokenizer.ggml.token_type"]
    assert file.keys["tokenizer.ggml.model"] == "llama" and kinds[:5] == [2, 3, 3, 6, 6] and kinds[-1] == 5
    assert len(tokens) == 300 and tokens[-1] == "[PAD299]" and file.keys["tokenizer.ggml.unknown_token_id"] == 0
    for text in ("the sparse neuron rests", "gate fires never the dense"):
        assert joined_by_score(text, tokens, file.keys["tokenizer.ggml.scores"]) == words(text)["input_ids"]
    assert result["warning"] is None


def test_scores_keep_the_order_of_the_merges(predictors, tmp_path):
    vocabulary = {text: place for place, text in enumerate(["<unk>", "▁", "a", "b", "c", "ab", "bc", "<0x0A>"])}
    raw = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b")], byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Prepend("▁")
    words = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    file, _ = exported(relu_llama(), words, predictors, tmp_path / "out")
    tokens, scores = (file.keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores"))
    assert joined_by_score("abc", tokens, scores) == words("abc")["input_ids"] == [1, 2, 6]


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (["<unk>", "▁", "a"], "no token for the line feed (<0x0A>): PowerInfer"),
        (["<unk>", "<0x0A>", ""], "token 2 is empty"),
        (["<unk>", "<0x0A>", "[PAD3]"], "token 3 is '[PAD3]' like token 2"),
    ],
)
def test_a_vocabulary_that_the_runtime_stops_at_is_refused(vocabulary, message, predictors, tmp_path):
    raw = models.BPE({text: place for place, text in enumerate(vocabulary)}, [], byte_fallback=True, unk_token="<unk>")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(raw), unk_token="<unk>")
    with pytest.raises(ValueError) as error:
        export_powerinfer(relu_llama(), words, predictors, tmp_path / "out")
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_a_tokenizer_that_powerinfer_reads_otherwise_is_warned_of_with_an_example(bpe, predictors, tmp_path, capsys):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])

    def warned(merges: list[tuple[str, str]], normalizer=None, split=digits, whole: bool = False) -> str | None:
        vocabulary = {text: place for place, text in enumerate(["in", *alphabet, *("".join(pair) for pair in merges)])}
        raw = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole))
        raw.pre_tokenizer = split
        if normalizer is not None:
            raw.normalizer = normalizer
        words = PreTrainedTokenizerFast(tokenizer_object=raw)
        return export_powerinfer(relu_llama(), words, predictors, tmp_path / "out")["warning"]

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert warned([("a", "b")]) is None  # other words, but the same tokens
    warning = warned([("\u0120", "\u0120")])
    assert "'in  2024'" in warning and warning in capsys.readouterr().err
    assert "'in 2024'" in warned([("2", "0")])
    assert "caf\u00e9" in warned([("a", "b")], normalizers.NFC(), plain)
    assert "'in 2024'" in warned([("a", "b")], None, plain, whole=True)
    assert export_powerinfer(relu_llama(), bpe, predictors, tmp_path / "out")["warning"] is None
    words = sentencepiece_of(300)
    assert (
        "puts a space before a text" in export_powerinfer(relu_llama(), words, predictors, tmp_path / "out")["warning"]
    )
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert export_powerinfer(relu_llama(), words, predictors, tmp_path / "out")["warning"] is None


# --- refusals, through the command ------------------------------------------------------------------------------------


def saved(folder: Path, model, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def refused(arguments: list[str], message: str, capsys, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["export", "format=powerinfer", f"out={tmp_path}/out", *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prosparse export: ")]
    assert len(said) == 1 and message in said[0], said
    assert sorted(tmp_path.rglob("*")) == before


REFUSED = [
    ("llama", "silu", 0.0, "the model's activation is silu: PowerInfer computes relu and drelu only"),
    ("llama", "relu2", 0.0, "the model's activation is relu2"),
    ("llama", "shifted_relu", 0.125, "the model's activation is shifted_relu"),
    ("llama", "fatrelu", 0.125, "with threshold 0.125, and PowerInfer knows no threshold: set drop_threshold=true"),
    ("llama", "fatrelu", -0.125, "fatrelu with threshold -0.125, and PowerInfer knows no threshold"),
    ("mistral", "drelu", 0.125, "drelu with threshold 0.125"),
    ("llama_biased", "relu", 0.0, "no place for model.layers.0.mlp.down_proj.bias"),
    ("llama_special", "relu", 0.0, "head_dim is 16"),
    ("qwen2", "relu", 0.0, "no place for model.layers.0.self_attn.k_proj.bias"),
    ("qwen3", "relu", 0.0, "no place for model.layers.0.self_attn.k_norm.weight"),
    ("gemma", "relu", 0.0, "GemmaForCausalLM: PowerInfer's llama computes Llama's layers only"),
    ("phi3", "relu", 0.0, "computes Llama's layers only"),
    ("opt", "relu", 0.0, "computes Llama's layers only"),
]


@pytest.mark.parametrize(("base", "activation", "param", "message"), REFUSED)
def test_a_model_that_powerinfer_computes_otherwise_is_refused(base, activation, param, message, tmp_path, predictors):
    model = base_model(base)
    substitute(model, activation, param)
    with pytest.raises(ValueError) as error:
        export_powerinfer(model, word_tokenizer(), predictors, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_rope_scaling_is_refused(bpe, predictors, tmp_path):
    model = relu_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="rope_type is linear"):
        export_powerinfer(model, bpe, predictors, tmp_path / "out")


def test_bad_input_is_one_line_and_exit_code_2(bpe, predictors, tmp_path, capsys):
    silu = saved(tmp_path / "silu", tiny_llama(intermediate_size=64), bpe)
    relu = saved(tmp_path / "relu", relu_llama(), bpe)
    foreign = saved(tmp_path / "foreign", relu_llama(vocab_size=200), bpe)
    wrong = write_predictors(tmp_path / "wrong", 3, 32, 48)
    few, many = (write_predictors(tmp_path / f"of_{n}", n, 32, 64) for n in (2, 4))
    broken = write_predictors(tmp_path / "broken", 3, 32, 64)
    (broken / "model_1.pt").write_bytes(b"no such thing")
    for model, folder, message in (
        (silu, predictors, "the model's activation is silu"),
        (relu, wrong, "model_0.pt is [8, 32], [48, 8], and the model needs [rank, 32], [64, rank]"),
        (relu, few, "cannot be read"),
        (relu, many, "more than the model's 3 layers"),
        (relu, broken, "cannot be read"),
        (relu, tmp_path / "nothing", "cannot be read"),
        (foreign, predictors, "the tokenizer has ids up to 299, the model 200 tokens"),
    ):
        refused([f"checkpoint={model}", f"predictors={folder}"], message, capsys, tmp_path)
    refused([f"checkpoint={relu}"], "predictors is missing", capsys, tmp_path)
    given = [f"checkpoint={relu}", f"predictors={predictors}"]
    refused([*given, "drop_threshold=true"], "text is missing: drop_threshold=true changes the model", capsys, tmp_path)
    refused([*given, "text=stdlib"], "text is measured only with drop_threshold=true", capsys, tmp_path)
    saved(tmp_path / "words", relu_llama(), word_tokenizer())
    refused([f"checkpoint={tmp_path}/words", f"predictors={predictors}"], "of type WordLevel", capsys, tmp_path)


def test_a_dropped_threshold_is_told_and_measured(bpe, predictors, tmp_path, capsys):
    model = relu_llama()
    cut = released_config(model.config, "fatrelu", 0.5)
    saved(tmp_path / "fatrelu", build_model(cut, model.state_dict(), torch.float32), bpe)
    (tmp_path / "text.txt").write_text("the sparse neuron rests. " * 60)
    given = [f"checkpoint={tmp_path}/fatrelu", f"predictors={predictors}", f"out={tmp_path}/out", "context=16"]
    given += ["format=powerinfer", "drop_threshold=true", f"text={tmp_path}/text.txt", f"cache={tmp_path}/cache"]
    assert main(["export", *given]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert result["dropped_threshold"] == 0.5 and before["sparsity"] > after["sparsity"] + 0.05
    assert before["perplexity"] != after["perplexity"] and "without the threshold" in capsys.readouterr().err
    file, dense = powerinfer.File(tmp_path / "out" / result["gguf"]), relu_llama()
    with torch.no_grad():
        expected = dense(TOKEN_IDS).logits
    assert (file.logits(TOKEN_IDS, False) - expected).abs().max() < CLOSE * expected.abs().max()


def test_minicpm_is_written_as_the_llama_that_it_is(bpe, tmp_path):
    model = base_model("minicpm")
    substitute(model, "relu")
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    predictors = write_predictors(tmp_path / "predictors", *shape)
    words = sentencepiece_of(config.vocab_size)
    file, _ = exported(model, words, predictors, tmp_path / "out")
    with torch.no_grad():
        expected = model(TOKEN_IDS).logits
    assert (
        file.logits(TOKEN_IDS, False) - expected
    ).abs().max() < 5e-3 * expected.abs().max()  # folded weights are rounded


def sentencepiece_of(tokens: int) -> PreTrainedTokenizerFast:
    raw = Tokenizer(
        models.BPE(vocab={"<unk>": 0, "a": 1, "<0x0A>": 2}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    assert raw.get_vocab_size() <= tokens
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_of_the_public_releases_are_read(name, tmp_path):
    activation, param = write_layout(tmp_path / "release", name)
    model = load_model(tmp_path / "release", dtype=torch.float32)
    predictors = write_predictors(tmp_path / "predictors", 2, model.config.hidden_size, model.config.intermediate_size)
    words = sentencepiece_of(model.config.vocab_size)
    if param != 0:
        with pytest.raises(ValueError, match=f"threshold {param:g}, and PowerInfer knows no threshold"):
            export_powerinfer(model, words, predictors, tmp_path / "out")
        with pytest.raises(ValueError, match="rows are missing"):
            export_powerinfer(model, words, predictors, tmp_path / "out", drop_threshold=True)
    rows = [np.arange(12) % model.config.vocab_size]
    file, result = exported(model, words, predictors, tmp_path / "out", drop_threshold=True, rows=rows)
    assert ("before" in result) == ("perplexity" in result.get("after", {})) == (param != 0)
    assert result.get("dropped_threshold", 0.0) == param
    assert result["architecture"] == ("bamboo" if activation == "drelu" else "llama")
    with torch.no_grad():  # of the model without its threshold
        expected = model(TOKEN_IDS).logits
    assert (file.logits(TOKEN_IDS, False) - expected).abs().max() < 5e-3 * expected.abs().max()


def test_a_full_disk_leaves_nothing_behind_and_is_named(bpe, predictors, tmp_path, capsys):
    saved(tmp_path / "relu", relu_llama(vocab_size=300_000), bpe)  # 19 MB, on a disk of 16
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("no small disk: mount is not allowed here")
        out = tmp_path / "disk" / "out"
        capsys.readouterr()
        arguments = ["format=powerinfer", f"checkpoint={tmp_path}/relu", f"predictors={predictors}", f"out={out}"]
        assert main(["export", *arguments]) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if "prosparse export: " in line]
        assert said == [f"prosparse export: out={out} cannot be written: No space left on device"]
        assert not list(out.parent.iterdir())


@pytest.mark.parametrize("weight", [1e6, torch.nan])
def test_weights_that_f16_cannot_hold_are_refused(weight, bpe, predictors, tmp_path):
    model = relu_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = weight
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight has weights that f16 cannot hold"):
        export_powerinfer(model, bpe, predictors, tmp_path / "out")
    assert not (tmp_path / "out").exists()
