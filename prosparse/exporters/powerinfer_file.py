"""A PowerInfer file as the program's loader sees it.

In: gguf's reader of a file. Out: its metadata, and what the loader would stop at.
"""

import gguf
from gguf import GGUFValueType as Value

MAGIC = b"PWRI"
SHAPES = (  # keys that begin with the architecture's name
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("rope.dimension_count", "attention.head_count", "attention.head_count_kv"),
)


class File:
    """Metadata, and of the tensors name, kind, shape and place; magic: the first bytes, where gguf reads GGUF."""

    def __init__(self, reader: gguf.GGUFReader, magic: bytes = MAGIC):
        self.magic = magic
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}  # ggml: columns first
        self.offsets = [int(tensor.data_offset) for tensor in reader.tensors]
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {name: field.types for name, field in reader.fields.items()}
        self.version = self.keys["GGUF.version"]
        self.architecture = self.keys["general.architecture"]

    def key(self, name: str):
        return self.keys[f"{self.architecture}.{name}"]


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
    for name, type_ in types.items():
        need(file.types.get(name) == [type_], f"{name} is {file.types.get(name)}, not {type_.name}")
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
