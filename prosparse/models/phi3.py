"""Sparse Phi-3 models for the Auto* loaders.

In: a config.json with model_type `sparse_phi3`, hidden_act and hidden_act_param.
Out: Phi3ForCausalLM with a sparse FFN in every layer; its fused gate_up_proj stays one weight.
"""

from transformers import Phi3Config, Phi3ForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparsePhi3Config(Phi3Config):
    model_type = "sparse_phi3"

    hidden_act: str = "drelu"
    hidden_act_param: float = 0.0


class SparsePhi3ForCausalLM(Phi3ForCausalLM):
    config_class = SparsePhi3Config

    def __init__(self, config: SparsePhi3Config):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)
