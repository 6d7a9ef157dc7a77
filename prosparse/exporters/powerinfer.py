"""Export to PowerInfer: a GGUF in its layout, with the predictors inside, and beside it what its solver reads.

In: a model with Llama's layers and ReLU (its `llama`) or dReLU (its `bamboo`), a tokenizer, a folder of predictors.
Out: a folder with NAME.gguf, whose first bytes are PWRI, model_N.pt, config.json, activation/ and result.json.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prosparse.config import Quantization
from prosparse.exporters.hf import Card, replacing, seal
from prosparse.exporters.powerinfer_file import MAGIC, File, unmet
from prosparse.ffn import activation_of, substitute
from prosparse.models.folding import fold_minicpm
from prosparse.models.formats import family
from prosparse.models.minicpm import MiniCPMForCausalLM
from prosparse.predictor import load_predictors, trained_on
from prosparse.sparsity import measure

ARCHITECTURES = {"relu": "llama", "drelu": "bamboo"}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "minicpm")  # those whose layers may be Llama's
BLOCK = 32  # weights of a row that Q4_0 quantizes together
SMALLEST = 2.0**-22  # what their common scale, an f16 of 2^-24 at least, may cost beside: 8 times half of that
NAMES = {  # of a layer's weights, here and there
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down_t",
}
PROBES = (
    "in 2024",
    "in  2024",
    "x = 10,000",
    "it's IT'S",
    "a  b",
    "if x:\n\n        return",
    "\u4f60\u597d, caf\u00e9, cafe\u0301!",
    "a_b(c)->d",
)


def export_powerinfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    predictors: str | Path,
    out: str | Path,
    *,
    quantization: Quantization = Quantization.f16,
    drop_threshold: bool = False,
    rows: Sequence[np.ndarray] | None = None,
    text: str | None = None,
    batch: int = 4,
    card: Card | None = None,
) -> dict:
    """Write `model` for PowerInfer to the folder `out`, or as DIR/NAME.gguf, and return what was written.

    Weights are f16; with q4_0 those whose rows divide by 32 are Q4_0, but for output and predictors; norms are f32.
    A model with a threshold is written only with drop_threshold: it is then dropped from `model`, in place, and what
    that does is measured on `rows`, of `text`. card: what README.md shall say.
    The file is read back: held against what PowerInfer's loader asks, and each tensor against the model's.
    Raises ValueError for what PowerInfer cannot compute and for predictors of another model, RuntimeError if the file
    is not what was to be written. Nothing is left behind by a failure.
    """
    out = Path(out).expanduser().resolve()
    out, name = (out.parent, out.name) if out.suffix == ".gguf" else (out, "model.powerinfer.gguf")
    activation, threshold = activation_of(model)
    architecture = _architecture(model, activation, threshold, drop_threshold)
    if threshold != 0 and rows is None:
        raise ValueError("rows are missing: what the model loses with its threshold is measured on them")
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    learned, cutoff = load_predictors(predictors, *shape)
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    dropped: dict[str, Any] = {}
    if threshold != 0:
        dropped = {"dropped_threshold": threshold}
        assert rows is not None
        before = measure(model, rows, batch=batch)
        activation = "drelu" if activation == "drelu" else "relu"
        substitute(model, activation)
        after = measure(model, rows, batch=batch)
        for when, seen in (("before", before), ("after", after)):
            dropped[when] = {"sparsity": seen.sparsity, "perplexity": seen.perplexity}
        dropped |= {"text": text, "tokens": before.tokens}
        print(
            f"without the threshold: sparsity {before.sparsity:.2%} -> {after.sparsity:.2%}, perplexity "
            f"{before.perplexity:.3f} -> {after.perplexity:.3f}",
            file=sys.stderr,
        )
    if isinstance(model, MiniCPMForCausalLM):
        model = fold_minicpm(model)
    tensors = _tensors(model, [dict(predictor.state_dict()) for predictor in learned], quantization)
    warning = _reads_otherwise(tokenizer)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    with replacing(out, "powerinfer", name) as folder:
        writer = gguf.GGUFWriter(folder / name, architecture)
        _write_shapes(writer, model, quantization, cutoff)
        vocabulary(writer)
        for tensor, kind, data in tensors:
            values, (block, size) = data(), gguf.GGML_QUANT_SIZES[kind]
            nbytes = values.numel() // block * size
            writer.add_tensor_info(tensor, list(values.shape), np.dtype(np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind, data in tensors:
            numbers = data().float().cpu().contiguous().numpy()
            if not np.abs(numbers).max() <= np.finfo(np.float16).max:  # NaN is none, either
                raise ValueError(f"{tensor} has weights that f16 cannot hold: PowerInfer cannot run this model")
            writer.write_tensor_data(gguf.quants.quantize(numbers, kind).view(_Written))
        writer.close()
        largest = _verify(folder / name, tensors)
        with open(folder / name, "r+b") as file:
            file.write(MAGIC)
        source = Path(predictors).expanduser()
        (folder / "activation").mkdir()
        copies = ["config.json", *(f"model_{layer}.pt" for layer in range(len(learned)))]
        for copy in (*copies, *(f"activation/activation_{layer}.pt" for layer in range(len(learned)))):
            shutil.copyfile(source / copy, folder / copy)
        result = {
            "format": "powerinfer",
            "gguf": name,
            "architecture": architecture,
            "activation": activation,
            "quantization": str(quantization),
            "cutoff": cutoff,
            "predictors_of": trained_on(predictors),
            "context": _context(model.config),
            "largest_error": largest,
            "warning": warning,
            **dropped,
        }
        return seal(folder, out, result, card)


class _Written(np.ndarray):
    """An array that gguf writes; numpy's own way leaves out of its error that the disk is full."""

    def tofile(self, file: Any, *_: Any) -> None:
        file.write(self.tobytes())


def _verify(path: Path, tensors: list[tuple[str, Kind, Callable[[], Tensor]]]) -> float:
    """Read the file back and return the largest difference of a weight from the model's, which rounding makes.

    Raises RuntimeError for what PowerInfer's loader would stop at and for a tensor that differs by more than that:
    f32 and f16 hold what rounds to them, Q4_0 a number within a seventh of its block's largest.
    """
    largest = 0.0
    try:
        reader = gguf.GGUFReader(path)
        wrong = unmet(File(reader))
    except (ValueError, IndexError, KeyError) as error:
        raise RuntimeError(f"the file that was written cannot be read: {error}") from error
    if wrong:
        raise RuntimeError(f"PowerInfer would not load the file that was written: {'; '.join(wrong)}")
    written = {tensor.name: tensor for tensor in reader.tensors}
    for name, kind, data in tensors:
        numbers = data().float().cpu().numpy()
        held = gguf.quants.dequantize(written[name].data, kind).astype(np.float32)
        apart = np.abs(held - numbers)
        if kind is Kind.Q4_0:
            blocks = np.abs(numbers).reshape(-1, BLOCK).max(axis=1, keepdims=True)
            right = (apart.reshape(-1, BLOCK) <= blocks / 7 + SMALLEST).all()
        else:
            right = (held == numbers.astype(np.float16 if kind is Kind.F16 else np.float32)).all()
        if not right:
            raise RuntimeError(f"{name} does not stand in the file as it was written: it differs by {apart.max():.3g}")
        largest = max(largest, float(apart.max()))
    return largest


def _architecture(model: PreTrainedModel, activation: str, threshold: float, drop_threshold: bool) -> str:
    """PowerInfer's name of the architecture; raises ValueError for what it would compute otherwise."""
    config, kind = model.config, type(model).__name__
    cut = "relu" if activation == "fatrelu" else activation
    if cut not in ARCHITECTURES:
        raise ValueError(f"the model's activation is {activation}: PowerInfer computes relu and drelu only")
    if threshold != 0 and not drop_threshold:
        raise ValueError(
            f"the model's activation is {activation} with threshold {threshold:g}, and PowerInfer knows no threshold: "
            "set drop_threshold=true to write it without, and text= to measure what that does"
        )
    if family(config) not in FAMILIES:
        raise ValueError(f"{kind}: PowerInfer's {ARCHITECTURES[cut]} computes Llama's layers only")
    layers = range(config.num_hidden_layers)
    known = {f"model.layers.{layer}.{name}.weight" for layer in layers for name in NAMES}
    known |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    surplus = sorted(set(model.state_dict()) - known)
    if surplus:
        raise ValueError(f"{kind}: PowerInfer has no place for {surplus[0]} (biases, norms of q and k, fused weights)")
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    if head_dim is not None and head_dim * heads != config.hidden_size:
        raise ValueError(f"{kind}: head_dim is {head_dim}; PowerInfer's is hidden_size / heads")
    rope = config.rope_parameters["rope_type"]
    if rope != "default":
        raise ValueError(f"{kind}: its rope_type is {rope}; PowerInfer computes the default one")
    return ARCHITECTURES[cut]


def _context(config: Any) -> int:
    """Up to a sliding window its layers are like those without: beyond it PowerInfer would compute otherwise."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _write_shapes(writer: gguf.GGUFWriter, model: PreTrainedModel, quantization: Quantization, cutoff: float) -> None:
    config = model.config
    heads = config.num_attention_heads
    writer.add_name(Path(config._name_or_path or "").name or "prosparse")
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    mostly = {Quantization.f16: gguf.LlamaFileType.MOSTLY_F16, Quantization.q4_0: gguf.LlamaFileType.MOSTLY_Q4_0}
    writer.add_file_type(mostly[quantization])
    if quantization is Quantization.q4_0:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)  # GGUF asks for it beside quantized tensors
    writer.add_float32("powerinfer.sparse_threshold", cutoff)


def _tensors(
    model: PreTrainedModel, predictors: list[dict[str, Tensor]], quantization: Quantization
) -> list[tuple[str, Kind, Callable[[], Tensor]]]:
    """(name, kind, what gives the values) of every tensor of the file; its numbers are copied only when asked for."""
    weights, config = model.state_dict(), model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    packed = Kind.Q4_0 if quantization is Quantization.q4_0 else Kind.F16
    tensors: list[tuple[str, Kind, Callable[[], Tensor]]] = []

    def add(name: str, values: Tensor, kind: Kind, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        whole = kind is Kind.Q4_0 and change(values).shape[-1] % BLOCK != 0
        tensors.append((f"{name}.weight", Kind.F16 if whole else kind, lambda: change(values)))

    add("token_embd", weights["model.embed_tokens.weight"], packed)
    add("output_norm", weights["model.norm.weight"], Kind.F32)
    add("output", weights["lm_head.weight"], Kind.F16)
    for layer, predictor in enumerate(predictors):
        for ours, theirs in NAMES.items():
            values = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in heads:
                add(f"blk.{layer}.{theirs}", values, packed, partial(interleaved, heads=heads[theirs]))
            elif theirs == "ffn_down_t":
                add(f"blk.{layer}.{theirs}", values, packed, Tensor.t)
            else:
                add(f"blk.{layer}.{theirs}", values, Kind.F32 if theirs.endswith("norm") else packed)
        for part in ("fc1", "fc2"):
            add(f"blk.{layer}.{part}", predictor[f"{part}.weight"], Kind.F16)
    return tensors


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads x size, hidden] of q_proj or k_proj, in each head those of the two halves by turns.

    RoPE turns the pairs (i, i + size / 2) in Hugging Face, (2 i, 2 i + 1) in this file.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Callable[[gguf.GGUFWriter], None]:
    """What writes the tokenizer: as `gpt2` a byte-level BPE, as `llama` one of SentencePiece's BPE models.

    Raises ValueError for other tokenizers, for one with more tokens than the model, and for what stops PowerInfer.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError("the tokenizer is not a fast one: PowerInfer's file needs its merges")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ValueError(f"the tokenizer is of type {model['type']}: PowerInfer reads BPE only")
    sentencepiece = bool(model.get("byte_fallback"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    added = {token["id"]: token for token in backend["added_tokens"]}
    texts = {number: text for text, number in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    if max(texts) >= vocab_size:
        raise ValueError(f"the tokenizer has ids up to {max(texts)}, the model {vocab_size} tokens: take its own")
    # SentencePiece joins the pair with the best score first; a token's first merge stands for its place in that order.
    first: dict[str, int] = {}
    for place, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", ""), place)
    tokens, scores, kinds = [], [], []
    for number in range(vocab_size):
        text = texts.get(number, f"[PAD{number}]")
        if number not in texts:
            kind = gguf.TokenType.UNUSED
        elif number in added:
            kind = gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
        elif sentencepiece and len(text) == 6 and text.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        if sentencepiece and text == model.get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        tokens.append(text)
        kinds.append(kind)
        scores.append(-float(first.get(text, len(merges))) if kind == gguf.TokenType.NORMAL else 0.0)
    _no_unreadable_token(tokens, "<0x0A>" if sentencepiece else "\u010a")

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        if not sentencepiece:
            writer.add_token_merges(merges)
        for name in ("bos", "eos", "unk"):
            number = getattr(tokenizer, f"{name}_token_id")
            if number is not None:
                getattr(writer, f"add_{name}_token_id")(number)
        begun: Any = tokenizer("a")["input_ids"]
        writer.add_add_bos_token(bool(begun) and begun[0] == tokenizer.bos_token_id)

    return write


def _no_unreadable_token(tokens: list[str], line_feed: str) -> None:
    """Raises ValueError for what PowerInfer's loader stops at: an empty token, a text twice, no line feed."""
    seen: dict[str, int] = {}
    for number, text in enumerate(tokens):
        if not text:
            raise ValueError(f"the tokenizer's token {number} is empty: PowerInfer does not load it")
        if seen.setdefault(text, number) != number:
            raise ValueError(
                f"the tokenizer's token {number} is {text!r} like token {seen[text]}: PowerInfer does not load it"
            )
    if line_feed not in seen:
        raise ValueError(f"the tokenizer has no token for the line feed ({line_feed}): PowerInfer does not load it")


def _reads_otherwise(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A warning with an example, if PowerInfer gives text other tokens than this tokenizer.

    It has GPT-2's way of splitting text into words, merges within them, no normalizer, and for SentencePiece always a
    space before the text.
    """
    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    if content["model"].get("byte_fallback"):
        text = "a" if backend.normalizer is None else backend.normalizer.normalize_str("a")
        words = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
        spaced = words[0][0].startswith("\u2581")
        return None if spaced else "PowerInfer puts a space before a text, this tokenizer none: it gets other tokens"
    content |= {"normalizer": None, "model": content["model"] | {"ignore_merges": False}}
    other = Tokenizer.from_str(json.dumps(content))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in PROBES:
        ours, theirs = (made.encode(text, add_special_tokens=False) for made in (backend, other))
        if ours.ids != theirs.ids:
            return f"PowerInfer reads {text!r} as {theirs.tokens}, this tokenizer as {ours.tokens}: other tokens"
    return None
