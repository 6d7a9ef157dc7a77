"""Sparse Falcon models for the Auto* loaders.

In: a config.json with model_type `sparse_falcon`, activation and hidden_act_param.
Out: FalconForCausalLM with a sparse activation in the place of that of every layer's ungated FFN.
"""

from transformers import FalconConfig, FalconForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseFalconConfig(FalconConfig):
    model_type = "sparse_falcon"

    activation: str = "fatrelu"
    hidden_act_param: float = 0.0


class SparseFalconForCausalLM(FalconForCausalLM):
    config_class = SparseFalconConfig

    def __init__(self, config: SparseFalconConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.activation, config.hidden_act_param)
