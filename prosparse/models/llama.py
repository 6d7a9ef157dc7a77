"""Sparse Llama models for the Auto* loaders.

In: a config.json with model_type `sparsellama` (FATReLU, the format of the ProSparse release) or `sparse_llama` (every
other activation), hidden_act and hidden_act_param. Out: LlamaForCausalLM with a sparse FFN in every layer.
"""

from transformers import LlamaConfig, LlamaForCausalLM

from prosparse.ffn import put_sparse_ffns
from prosparse.models.sparse import stock_activation


class SparseLlamaConfig(LlamaConfig):
    model_type = "sparsellama"

    hidden_act: str = "fatrelu"
    hidden_act_param: float = 0.0

    def __post_init__(self, **kwargs):
        name, _, threshold = self.hidden_act.partition("_")
        if name == "fatrelu" and threshold.replace(".", "", 1).isdigit():  # fatrelu_0.01, the authors' other spelling
            self.hidden_act, self.hidden_act_param = name, float(threshold)
        super().__post_init__(**kwargs)


class SparseLlamaForCausalLM(LlamaForCausalLM):
    config_class = SparseLlamaConfig

    def __init__(self, config: SparseLlamaConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)


class AnySparseLlamaConfig(LlamaConfig):
    model_type = "sparse_llama"

    hidden_act: str = "drelu"
    hidden_act_param: float = 0.0


class AnySparseLlamaForCausalLM(LlamaForCausalLM):
    config_class = AnySparseLlamaConfig

    def __init__(self, config: AnySparseLlamaConfig):
        with stock_activation(config):
            super().__init__(config)
        put_sparse_ffns(self, config.hidden_act, config.hidden_act_param)
