"""Bamboo, the dReLU release of Mistral, for the Auto* loaders.

In: a config.json with model_type `bamboo`; its hidden_act says `relu`, but the classes apply it to gate and up.
Out: Mistral's classes with dReLU in every layer. Without a sliding window it is a bias-free Llama, too.
"""

from transformers import MistralConfig, MistralForCausalLM, MistralForSequenceClassification, MistralModel

from prosparse.ffn import put_sparse_ffns


class BambooConfig(MistralConfig):
    model_type = "bamboo"

    hidden_act: str = "relu"


class BambooModel(MistralModel):
    config_class = BambooConfig

    def __init__(self, config: BambooConfig):
        super().__init__(config)
        put_sparse_ffns(self, "drelu", 0.0)


class BambooForCausalLM(MistralForCausalLM):
    config_class = BambooConfig

    def __init__(self, config: BambooConfig):
        super().__init__(config)
        put_sparse_ffns(self, "drelu", 0.0)


class BambooForSequenceClassification(MistralForSequenceClassification):
    """A linear head on the last token that is not padding; AutoModel makes the BambooModel below it."""

    config_class = BambooConfig
