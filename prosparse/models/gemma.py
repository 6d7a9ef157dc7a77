"""Sparse Gemma models for the Auto* loaders: Gemma and the text model of Gemma 3.

In: a config.json with model_type `sparse_gemma` and hidden_act, or `sparse_gemma3_text` and hidden_activation, and
hidden_act_param. Out: the stock class with a sparse FFN in every layer.
"""

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseGemmaConfig(GemmaConfig):
    model_type = "sparse_gemma"

    hidden_act: str = "drelu"
    hidden_act_param: float = 0.0


class SparseGemmaForCausalLM(GemmaForCausalLM):
    config_class = SparseGemmaConfig

    def __init__(self, config: SparseGemmaConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)


class SparseGemma3TextConfig(Gemma3TextConfig):
    model_type = "sparse_gemma3_text"

    hidden_activation: str = "drelu"
    hidden_act_param: float = 0.0


class SparseGemma3ForCausalLM(Gemma3ForCausalLM):
    config_class = SparseGemma3TextConfig

    def __init__(self, config: SparseGemma3TextConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_activation, config.hidden_act_param)
