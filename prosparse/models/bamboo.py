"""Bamboo, the dReLU release of Mistral, for the Auto* loaders.

In: a config.json with model_type `bamboo`; its hidden_act says `relu`, but the class applies it to gate and up.
Out: MistralForCausalLM with dReLU in every layer. Without a sliding window it is a bias-free Llama, too.
"""

from transformers import MistralConfig, MistralForCausalLM

from prosparse.ffn import put_sparse_ffns


class BambooConfig(MistralConfig):
    model_type = "bamboo"

    hidden_act: str = "relu"


class BambooForCausalLM(MistralForCausalLM):
    config_class = BambooConfig

    def __init__(self, config: BambooConfig):
        super().__init__(config)
        put_sparse_ffns(self, "drelu", 0.0)
