"""A decoder in numbers, for the formulas of `prosparse plan`.

In: model.shape, or the config that model.source has. Out: `Sizes`; no weights are read.
"""

from dataclasses import asdict, dataclass
from typing import Any

from prosparse.config import Model
from prosparse.telemetry import head_width


@dataclass(frozen=True)
class Sizes:
    """A decoder with gated FFNs, in numbers."""

    hidden: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool  # output head and embedding
    parameters: int
    head: float  # width of one
    head_norms: bool  # q and k have norms of their own

    @property
    def ffn_parameters(self) -> int:
        return 3 * self.layers * self.hidden * self.neurons

    @property
    def queries(self) -> float:
        """Width of q and of what attention gives."""
        return self.heads * self.head

    @property
    def keys(self) -> float:
        """Width of k, and of v."""
        return self.kv_heads * self.head

    def flops(self, context: int) -> float:
        """FLOPs that training takes a token, as `telemetry.training_flops`."""
        embedding = 0 if self.tied else self.vocabulary * self.hidden
        return 6 * (self.parameters - embedding) + 12 * self.layers * self.queries * context


def sizes(model: Model) -> Sizes:
    """From model.shape, else from the config that model.source has; ValueError for a model without gated FFNs.

    A shape says nothing of the width of a head and of norms of q and k: heads are taken to share the hidden size, and
    to have none.
    """
    shape = model.shape
    if None not in (values := asdict(shape)).values():
        hidden, neurons, layers, heads, kv_heads, vocabulary, tied = values.values()  # in the order of Shape
        layer = 2 * hidden * (hidden + hidden // heads * kv_heads) + 3 * hidden * neurons + 2 * hidden
        parameters = vocabulary * hidden * (1 if tied else 2) + layers * layer + hidden
        return Sizes(hidden, neurons, layers, heads, kv_heads, vocabulary, tied, parameters, hidden // heads, False)
    empty, text = meta_model(model)
    from prosparse.ffn import FusedFFN, SeparateFFN, ffn_forms

    if not set(ffn_forms(empty).values()) <= {SeparateFFN, FusedFFN} or not ffn_forms(empty):
        raise ValueError(f"{model.source}: plan knows decoders whose layers have one gated FFN each, and no experts")
    heads = text.num_attention_heads
    counts = (text.hidden_size, text.intermediate_size, text.num_hidden_layers, heads)
    rest = (getattr(text, "num_key_value_heads", None) or heads, text.vocab_size, bool(text.tie_word_embeddings))
    parameters = sum(p.numel() for p in empty.parameters())
    norms = {"q_norm", "q_layernorm", "query_layernorm"}  # what families call it
    normed = any(name.rpartition(".")[2] in norms for name, _ in empty.named_modules())
    return Sizes(*counts, *rest, parameters, head_width(text), normed)


def meta_model(model: Model) -> tuple[Any, Any]:
    """(the model of model.source without weights, its text config)"""
    import torch
    from transformers import AutoModelForCausalLM

    from prosparse.models.load import load_config

    config = load_config(model.source, revision=model.revision, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config.get_text_config()
