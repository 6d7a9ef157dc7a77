"""Sparse Mixtral models for the Auto* loaders.

In: a config.json with model_type `sparse_mixtral`, hidden_act and hidden_act_param.
Out: MixtralForCausalLM with sparse experts in every layer; their weights stay [experts, ..., ...], also in the files.
"""

from transformers import MixtralConfig, MixtralForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseMixtralConfig(MixtralConfig):
    model_type = "sparse_mixtral"

    hidden_act: str = "drelu"
    hidden_act_param: float = 0.0


class SparseMixtralForCausalLM(MixtralForCausalLM):
    config_class = SparseMixtralConfig

    def __init__(self, config: SparseMixtralConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)
