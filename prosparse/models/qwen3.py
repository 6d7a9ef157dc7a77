"""Sparse Qwen3 models for the Auto* loaders.

In: a config.json with model_type `sparse_qwen3`, hidden_act and hidden_act_param.
Out: Qwen3ForCausalLM with a sparse FFN in every layer.
"""

from transformers import Qwen3Config, Qwen3ForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseQwen3Config(Qwen3Config):
    model_type = "sparse_qwen3"

    hidden_act: str = "drelu"
    hidden_act_param: float = 0.0


class SparseQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = SparseQwen3Config

    def __init__(self, config: SparseQwen3Config):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)
