"""Sparse Qwen3-MoE models for the Auto* loaders.

In: a config.json with model_type `sparse_qwen3_moe`, hidden_act and hidden_act_param.
Out: Qwen3MoeForCausalLM with sparse experts in every layer; their weights stay [experts, ..., ...], also in the files.
"""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseQwen3MoeConfig(Qwen3MoeConfig):
    model_type = "sparse_qwen3_moe"

    hidden_act: str = "drelu"
    hidden_act_param: float = 0.0


class SparseQwen3MoeForCausalLM(Qwen3MoeForCausalLM):
    config_class = SparseQwen3MoeConfig

    def __init__(self, config: SparseQwen3MoeConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)
