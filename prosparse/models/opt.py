"""Sparse OPT models for the Auto* loaders.

In: a config.json with model_type `sparse_opt`, activation_function and hidden_act_param.
Out: OPTForCausalLM with a sparse activation in the place of that of every layer's ungated FFN.
"""

from transformers import OPTConfig, OPTForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseOPTConfig(OPTConfig):
    model_type = "sparse_opt"

    activation_function: str = "fatrelu"
    hidden_act_param: float = 0.0


class SparseOPTForCausalLM(OPTForCausalLM):
    config_class = SparseOPTConfig

    def __init__(self, config: SparseOPTConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.activation_function, config.hidden_act_param)
