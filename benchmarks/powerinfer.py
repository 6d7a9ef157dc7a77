"""A PowerInfer file against its model: `python benchmarks/powerinfer.py EXPORT CHECKPOINT [ROWS]`.

In: a folder of `prosparse export format=powerinfer` and the checkpoint that it was made of. Out: what of PowerInfer's
loader the file would fail at, and a table of what its graph, rewritten here and given nothing but the file, computes on
held-out rows of the standard library, beside what transformers computes with the model in fp32.
"""

import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFValueType as Value

HEADER = """
| computed | perplexity | same top-1 token | mean difference of log-probability | largest |
|---|---|---|---|---|"""
SHAPES = (  # keys that begin with the architecture's name
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("rope.dimension_count", "attention.head_count", "attention.head_count_kv"),
)


class File:
    """A file as a runtime sees it: metadata, and tensors as fp32."""

    def __init__(self, path: Path):
        content = path.read_bytes()
        self.magic, self.version = content[:4], int.from_bytes(content[4:8], "little")
        plain = path.with_name("plain.gguf")
        plain.write_bytes(b"GGUF" + content[4:])  # the library reads no other magic
        reader = gguf.GGUFReader(plain)
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}  # ggml: columns first
        self.offsets = [int(tensor.data_offset) for tensor in reader.tensors]
        self.tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
            for tensor in reader.tensors
        }
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {name: field.types for name, field in reader.fields.items()}
        plain.unlink()
        self.architecture = self.keys["general.architecture"]

    def key(self, name: str):
        return self.keys[f"{self.architecture}.{name}"]

    def logits(self, ids: torch.Tensor, predicted: bool) -> torch.Tensor:
        """What PowerInfer's graph computes from the file alone; `predicted`: only the neurons that fc1, fc2 choose."""
        heads, kv_heads = self.key("attention.head_count"), self.key("attention.head_count_kv")
        size, epsilon = self.key("rope.dimension_count"), self.key("attention.layer_norm_rms_epsilon")
        weight = lambda part: self.tensors[f"{part}.weight"]  # noqa: E731
        norm = lambda h, part: F.rms_norm(h, h.shape[-1:], weight(part), epsilon)  # noqa: E731
        angle = torch.arange(ids.shape[1])[:, None] * self.key("rope.freq_base") ** (-torch.arange(0, size, 2) / size)

        def rope(x: torch.Tensor) -> torch.Tensor:
            """[batch, context, heads, size]: the pairs (2 i, 2 i + 1) are turned."""
            even, odd = x[..., ::2], x[..., 1::2]
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

        hidden = weight("token_embd")[ids]
        for layer in range(self.key("block_count")):
            part = f"blk.{layer}."
            h = norm(hidden, part + "attn_norm")
            q = rope((h @ weight(part + "attn_q").T).unflatten(-1, (heads, size)))
            k = rope((h @ weight(part + "attn_k").T).unflatten(-1, (kv_heads, size)))
            v = (h @ weight(part + "attn_v").T).unflatten(-1, (kv_heads, size))
            k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
            attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
            hidden = hidden + attended.transpose(1, 2).flatten(2) @ weight(part + "attn_output").T
            chosen = F.relu(hidden @ weight(part + "fc1").T) @ weight(part + "fc2").T
            h = norm(hidden, part + "ffn_norm")
            up = h @ weight(part + "ffn_up").T
            x1 = F.relu(h @ weight(part + "ffn_gate").T) * (F.relu(up) if self.architecture == "bamboo" else up)
            if predicted:
                x1 = x1 * (chosen >= self.keys["powerinfer.sparse_threshold"])
            hidden = hidden + x1 @ weight(part + "ffn_down_t")  # rows are neurons
        return norm(hidden, "output_norm") @ weight("output").T


def unmet(file: File) -> list[str]:
    """What PowerInfer's loader would stop at, or read wrongly; empty for a file that it loads.

    After its llama.cpp (commit 0183bce): magic and version, keys by name and type, the vocabulary's asserts, and of the
    tensors exactly those that it creates for `llama` and `bamboo`, by name, shape and kind.
    """
    keys, shapes, kinds = file.keys, file.shapes, file.kinds
    wrong: list[str] = []

    def need(holds: bool, what: str) -> None:
        if not holds:
            wrong.append(what)

    need(file.magic == b"PWRI" and file.version in (2, 3), f"magic {file.magic!r}, version {file.version}")
    need(file.architecture in ("llama", "bamboo"), f"architecture {file.architecture}")
    types = {f"{file.architecture}.{name}": Value.UINT32 for name in SHAPES} | {"general.file_type": Value.UINT32}
    floats = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
    types |= {f"{file.architecture}.{name}": Value.FLOAT32 for name in floats}
    types |= {"powerinfer.sparse_threshold": Value.FLOAT32, "tokenizer.ggml.model": Value.STRING}
    for name, kind in types.items():
        need(file.types.get(name) == [kind], f"{name} is {file.types.get(name)}, not {kind.name}")
    if wrong:
        return wrong

    tokens, model = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.model"]
    need(model in ("gpt2", "llama"), f"tokenizer {model}")
    need(len(set(tokens)) == len(tokens) and "" not in tokens, "a token is empty or stands twice")
    need(len(keys["tokenizer.ggml.token_type"]) == len(tokens), "token types are not one a token")
    need(len(keys["tokenizer.ggml.scores"]) == len(tokens), "scores are not one a token")
    need(("Ċ" if model == "gpt2" else "<0x0A>") in tokens, "the vocabulary lacks the line feed")
    merges = keys.get("tokenizer.ggml.merges", [])
    need(model == "llama" or (merges and all(" " in merge[1:] for merge in merges)), "merges are not pairs")
    for name in ("bos", "eos", "unknown"):
        need(keys.get(f"tokenizer.ggml.{name}_token_id", 0) < len(tokens), f"the id of {name} is no token")

    hidden, neurons, layers = (file.key(name) for name in ("embedding_length", "feed_forward_length", "block_count"))
    heads, kv_heads = file.key("attention.head_count"), file.key("attention.head_count_kv")
    need(file.key("rope.dimension_count") * heads == hidden, "rope.dimension_count is not hidden / heads")
    kv = hidden // heads * kv_heads
    wanted = {"token_embd": [hidden, len(tokens)], "output": [hidden, len(tokens)], "output_norm": [hidden]}
    for layer in range(layers):
        rank = shapes.get(f"blk.{layer}.fc1.weight", [0, 0])[1]
        parts = {"attn_q": [hidden, hidden], "attn_k": [hidden, kv], "attn_v": [hidden, kv]}
        parts |= {"attn_output": [hidden, hidden], "attn_norm": [hidden], "ffn_norm": [hidden]}
        parts |= {part: [hidden, neurons] for part in ("ffn_gate", "ffn_up", "ffn_down_t")}
        parts |= {"fc1": [hidden, rank], "fc2": [rank, neurons]}
        wanted |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
    need(set(shapes) == {f"{name}.weight" for name in wanted}, "tensors are missing or surplus")
    for name, shape in wanted.items():
        seen, kind = shapes.get(f"{name}.weight"), kinds.get(f"{name}.weight")
        need(seen == shape, f"{name} is {seen}, not {shape}")
        need(kind in (("F32",) if "norm" in name else ("F16", "Q4_0")), f"{name} is {kind}")
    need(all(offset % 32 == 0 for offset in file.offsets), "tensors do not begin at multiples of 32 bytes")
    return wrong


@torch.no_grad()
def main(export: str, checkpoint: str, rows: str = "8") -> None:
    from prosparse import load_model, load_tokenizer, substitute
    from prosparse.config import Auto, Data
    from prosparse.data import text_rows
    from prosparse.ffn import activation_of
    from prosparse.sparsity import spread

    made = json.loads((Path(export) / "result.json").read_text())
    file = File(Path(export) / made["gguf"])
    print(
        f"{made['gguf']}: {file.architecture}, {made['quantization']}, the loader stops at: {unmet(file) or 'nothing'}"
    )
    model = load_model(checkpoint, dtype=torch.float32)
    if "dropped_threshold" in made:
        substitute(model, "drelu" if activation_of(model)[0] == "drelu" else "relu")
    how: dict = {"bos": Auto.auto, "column": "text", "cache": Data().cache, "held_out": 0.02}
    text = text_rows("stdlib", load_tokenizer(checkpoint), 256, **how)
    ids = torch.from_numpy(np.stack([text[i] for i in spread(len(text), int(rows))]).astype(np.int64))
    ways = {"transformers, fp32": lambda row: model(row).logits}
    ways |= {"the file, all neurons": lambda row: file.logits(row, False)}
    ways |= {"the file, predicted neurons": lambda row: file.logits(row, True)}
    found = {}
    for name, compute in ways.items():
        logits = [compute(row[None])[0, :-1] for row in ids]
        followed = [line.log_softmax(-1).gather(-1, row[1:, None]) for line, row in zip(logits, ids, strict=True)]
        found[name] = torch.cat([line.argmax(-1) for line in logits]), torch.cat(followed)[:, 0]
    best, expected = found["transformers, fp32"]
    print(f"{len(best):,} held-out positions{HEADER}")
    for name, (top, followed) in found.items():
        apart = (followed - expected).abs()
        print(
            f"| {name} | {math.exp(-followed.mean()):.3f} | {(top == best).double().mean():.2%} | "
            f"{apart.mean():.4f} | {apart.max():.3f} |"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
