"""Sparse Qwen2 models for the Auto* loaders.

In: a config.json with model_type `sparse_qwen2`, hidden_act and hidden_act_param.
Out: Qwen2ForCausalLM with a sparse FFN in every layer.
"""

from transformers import Qwen2Config, Qwen2ForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseQwen2Config(Qwen2Config):
    model_type = "sparse_qwen2"

    hidden_act: str = "drelu"
    hidden_act_param: float = 0.0


class SparseQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = SparseQwen2Config

    def __init__(self, config: SparseQwen2Config):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)
