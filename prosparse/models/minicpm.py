"""MiniCPM for the Auto* loaders: Llama with three scalings (arXiv 2404.06395), which transformers does not have.

In: a config.json with model_type `minicpm`, scale_emb, scale_depth, dim_model_base, hidden_act and hidden_act_param, as
in the MiniCPM and MiniCPM-S releases. Out: LlamaForCausalLM, scaled, with a sparse FFN in every layer.
"""

from transformers import LlamaConfig, LlamaForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import scale_output, stock_activation


class MiniCPMConfig(LlamaConfig):
    model_type = "minicpm"

    hidden_act: str = "silu"
    hidden_act_param: float = 0.0
    scale_emb: float | int = 1
    scale_depth: float | int = 1
    dim_model_base: float | int = 1
    tie_word_embeddings: bool = True


class MiniCPMForCausalLM(LlamaForCausalLM):
    """Embeddings x scale_emb, residual branches x scale_depth / sqrt(layers), logits / (hidden_size / dim_model_base).

    The last scaling is on the final norm, so that lm_head.weight of its output are the logits.
    """

    config_class = MiniCPMConfig

    def __init__(self, config: MiniCPMConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)
        depth = config.scale_depth / config.num_hidden_layers**0.5
        scale_output(self.model.embed_tokens, config.scale_emb)
        for layer in self.model.layers:
            scale_output(layer.self_attn.o_proj, depth)
            scale_output(layer.mlp.down_proj, depth)
        scale_output(self.model.norm, config.dim_model_base / config.hidden_size)
