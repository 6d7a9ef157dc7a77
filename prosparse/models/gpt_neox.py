"""Sparse GPT-NeoX models for the Auto* loaders.

In: a config.json with model_type `sparse_gpt_neox`, hidden_act and hidden_act_param.
Out: GPTNeoXForCausalLM with a sparse activation in the place of that of every layer's ungated FFN.
"""

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseGPTNeoXConfig(GPTNeoXConfig):
    model_type = "sparse_gpt_neox"

    hidden_act: str = "fatrelu"
    hidden_act_param: float = 0.0


class SparseGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    config_class = SparseGPTNeoXConfig

    def __init__(self, config: SparseGPTNeoXConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)
