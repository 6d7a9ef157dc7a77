"""Sparse Mistral models for the Auto* loaders.

In: a config.json with model_type `sparse_mistral`, hidden_act and hidden_act_param.
Out: MistralForCausalLM with a sparse FFN in every layer.
"""

from transformers import MistralConfig, MistralForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseMistralConfig(MistralConfig):
    model_type = "sparse_mistral"

    hidden_act: str = "drelu"
    hidden_act_param: float = 0.0


class SparseMistralForCausalLM(MistralForCausalLM):
    config_class = SparseMistralConfig

    def __init__(self, config: SparseMistralConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)
