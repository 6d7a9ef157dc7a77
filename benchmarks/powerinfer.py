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

from prosparse.exporters import powerinfer_file
from prosparse.exporters.powerinfer_file import unmet

HEADER = """
| computed | perplexity | same top-1 token | mean difference of log-probability | largest |
|---|---|---|---|---|"""


class File(powerinfer_file.File):
    """The same with its tensors, as fp32."""

    def __init__(self, path: Path):
        content = path.read_bytes()
        plain = path.with_name("plain.gguf")
        plain.write_bytes(b"GGUF" + content[4:])  # the library reads no other magic
        reader = gguf.GGUFReader(plain)
        super().__init__(reader, content[:4])
        self.tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
            for tensor in reader.tensors
        }
        plain.unlink()

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


@torch.no_grad()
def main(export: str, checkpoint: str, rows: str = "8") -> None:
    from prosparse import load_model, load_tokenizer, substitute
    from prosparse.config import Auto, Data, Source
    from prosparse.ffn import activation_of
    from prosparse.preparation import text_rows
    from prosparse.sparsity import spread

    made = json.loads((Path(export) / "result.json").read_text())
    file = File(Path(export) / made["gguf"])
    print(
        f"{made['gguf']}: {file.architecture}, {made['quantization']}, the loader stops at: {unmet(file) or 'nothing'}"
    )
    model = load_model(checkpoint, dtype=torch.float32)
    if "dropped_threshold" in made:
        substitute(model, "drelu" if activation_of(model)[0] == "drelu" else "relu")
    how: dict = {"bos": Auto.auto, "cache": Data().cache, "held_out": 0.02}
    text = text_rows(Source(path="stdlib"), load_tokenizer(checkpoint), 256, **how)
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
