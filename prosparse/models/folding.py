"""MiniCPM as a plain Llama: its scalings folded into the weights.

In: a MiniCPMForCausalLM. Out: a Llama of the same activation with equal logits, as the authors' llama-format release.
"""

from transformers import LlamaConfig, PreTrainedModel

from prosparse.ffn import activation_of
from prosparse.models.formats import inherited, released_config
from prosparse.models.load import build_model
from prosparse.models.minicpm import MiniCPMForCausalLM

SCALINGS = ("scale_emb", "scale_depth", "dim_model_base")


def fold_minicpm(model: PreTrainedModel) -> PreTrainedModel:
    """The Llama that computes the logits of `model`, in its dtype, on the CPU; `model` stays as it is.

    embed_tokens takes scale_emb, o_proj and down_proj take scale_depth / sqrt(layers), lm_head takes dim_model_base /
    hidden_size; embeddings that were tied are tied no more. Folded in fp32, then cast. ReLU gives a stock Llama,
    FATReLU a `sparsellama` with the same threshold (the gates do not change).
    Raises ValueError if `model` is no MiniCPM.
    """
    if not isinstance(model, MiniCPMForCausalLM):
        raise ValueError(f"{type(model).__name__} is no MiniCPM: there is nothing to fold")
    config = model.config
    depth = config.scale_depth / config.num_hidden_layers**0.5
    weights = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
    for name in list(weights):
        if ".o_proj." in name or ".down_proj." in name:
            weights[name] = weights[name] * depth
    weights["lm_head.weight"] = weights["lm_head.weight"] * (config.dim_model_base / config.hidden_size)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * config.scale_emb
    values = {key: value for key, value in inherited(config).items() if key not in SCALINGS}
    llama = LlamaConfig(**values | {"tie_word_embeddings": False})
    folded = build_model(released_config(llama, *activation_of(model)), weights, model.dtype)
    folded.generation_config = model.generation_config
    return folded
