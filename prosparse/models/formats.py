"""Which released format holds which family and activation.

In: a config of a known family and an activation. Out: the config of the format that holds it, without leftovers.
FATReLU of a Llama is `sparsellama` (ProSparse), dReLU without a threshold of a bias-free Llama or Mistral is `bamboo`;
what the stock class computes stays stock, and everything else is `sparse_<family>`. `minicpm` holds every activation.
"""

from typing import Any

from transformers import (
    FalconConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from prosparse.ffn import ACTIVATION_KEYS, activation_key
from prosparse.models.bamboo import BambooConfig
from prosparse.models.falcon import SparseFalconConfig
from prosparse.models.gemma import SparseGemma3TextConfig, SparseGemmaConfig
from prosparse.models.gpt_neox import SparseGPTNeoXConfig
from prosparse.models.llama import AnySparseLlamaConfig, SparseLlamaConfig
from prosparse.models.minicpm import MiniCPMConfig
from prosparse.models.mistral import SparseMistralConfig
from prosparse.models.mixtral import SparseMixtralConfig
from prosparse.models.opt import SparseOPTConfig
from prosparse.models.phi3 import SparsePhi3Config
from prosparse.models.qwen2 import SparseQwen2Config
from prosparse.models.qwen3 import SparseQwen3Config
from prosparse.models.qwen3_moe import SparseQwen3MoeConfig

TRAINED_WITH_BOS = "trained_with_bos"  # in the config.json of a model that a run of prosparse made: true or false
STOCK_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
_FAMILIES: dict[str, tuple[Any, Any]] = {  # model_type: the stock config and that of any activation
    "llama": (LlamaConfig, AnySparseLlamaConfig),
    "mistral": (MistralConfig, SparseMistralConfig),
    "qwen2": (Qwen2Config, SparseQwen2Config),
    "qwen3": (Qwen3Config, SparseQwen3Config),
    "gemma": (GemmaConfig, SparseGemmaConfig),
    "gemma3_text": (Gemma3TextConfig, SparseGemma3TextConfig),
    "phi3": (Phi3Config, SparsePhi3Config),
    "opt": (OPTConfig, SparseOPTConfig),
    "gpt_neox": (GPTNeoXConfig, SparseGPTNeoXConfig),
    "falcon": (FalconConfig, SparseFalconConfig),
    "minicpm": (MiniCPMConfig, MiniCPMConfig),
    "mixtral": (MixtralConfig, SparseMixtralConfig),
    "qwen3_moe": (Qwen3MoeConfig, SparseQwen3MoeConfig),
}
_FAMILY = {
    "sparsellama": "llama",
    "bamboo": "mistral",
    **{sparse.model_type: name for name, (_, sparse) in _FAMILIES.items()},
}
_UNGATED = ("opt", "gpt_neox", "falcon")
_NOT_INHERITED = (
    *("model_type", "architectures", "auto_map", *ACTIVATION_KEYS, "hidden_act_param", "dtype", "quantization_config"),
    *("transformers_version", "_name_or_path", "_model_name_or_path"),
)
_LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")


def family(config: PreTrainedConfig) -> str:
    """The stock model_type of a config's family; raises ValueError that names the known ones."""
    name = _FAMILY.get(config.model_type, config.model_type)
    if name not in _FAMILIES:
        raise ValueError(f"no format for model_type {config.model_type}: prosparse exports {', '.join(_FAMILIES)}")
    return name


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture as a config of the stock class, with an activation that transformers knows."""
    key = activation_key(config)
    own = getattr(config, key)
    return _FAMILIES[family(config)][0](**inherited(config), **{key: own if own in STOCK_ACTIVATIONS else "relu"})


def released_config(config: PreTrainedConfig, activation: str, param: float, own: bool = False) -> PreTrainedConfig:
    """The config of the format that holds `config`'s architecture with `activation` (a key of ACTIVATIONS).

    own: never the stock class, whose loaders in other runtimes may ignore or refuse the activation.
    Raises ValueError if the family is not known or cannot have the activation.
    """
    name, values, key = family(config), inherited(config), activation_key(config)
    stock, sparse = _FAMILIES[name]
    if activation == "drelu" and name in _UNGATED:
        raise ValueError(f"drelu needs an up projection, and {name} models have none: choose relu or fatrelu")
    if activation in STOCK_ACTIVATIONS and not own:
        return stock(**values, **{key: activation})
    if activation == "fatrelu" and name == "llama":
        return SparseLlamaConfig(**values, hidden_act=activation, hidden_act_param=float(param))
    if activation == "drelu" and param == 0 and name == "mistral":
        return BambooConfig(**values, hidden_act="relu")
    if activation == "drelu" and param == 0 and name == "llama" and not (config.attention_bias or config.mlp_bias):
        shared = {key: value for key, value in values.items() if key not in _LLAMA_ONLY}
        return BambooConfig(**shared, sliding_window=None, hidden_act="relu")
    return sparse(**values, **{key: activation}, hidden_act_param=float(param))


def inherited(config: PreTrainedConfig) -> dict:
    """What a config says of its architecture, without its format and its activation."""
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_INHERITED}
