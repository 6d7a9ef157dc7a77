"""The sparse model classes, registered with transformers' Auto* loaders when this package is imported.

In: nothing. Out: AutoConfig and AutoModelForCausalLM know `sparsellama`, `bamboo`, `minicpm` and `sparse_<family>`;
AutoModel and AutoModelForSequenceClassification know `bamboo`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from prosparse.models.bamboo import BambooConfig, BambooForCausalLM, BambooForSequenceClassification, BambooModel
from prosparse.models.falcon import SparseFalconForCausalLM
from prosparse.models.gemma import SparseGemma3ForCausalLM, SparseGemmaForCausalLM
from prosparse.models.gpt_neox import SparseGPTNeoXForCausalLM
from prosparse.models.llama import AnySparseLlamaForCausalLM, SparseLlamaForCausalLM
from prosparse.models.minicpm import MiniCPMForCausalLM
from prosparse.models.mistral import SparseMistralForCausalLM
from prosparse.models.mixtral import SparseMixtralForCausalLM
from prosparse.models.opt import SparseOPTForCausalLM
from prosparse.models.phi3 import SparsePhi3ForCausalLM
from prosparse.models.qwen2 import SparseQwen2ForCausalLM
from prosparse.models.qwen3 import SparseQwen3ForCausalLM
from prosparse.models.qwen3_moe import SparseQwen3MoeForCausalLM

SPARSE_CLASSES = {
    model_class.config_class.model_type: model_class
    for model_class in (
        SparseLlamaForCausalLM,
        AnySparseLlamaForCausalLM,
        BambooForCausalLM,
        SparseMistralForCausalLM,
        SparseQwen2ForCausalLM,
        SparseQwen3ForCausalLM,
        SparseGemmaForCausalLM,
        SparseGemma3ForCausalLM,
        SparsePhi3ForCausalLM,
        SparseOPTForCausalLM,
        SparseGPTNeoXForCausalLM,
        SparseFalconForCausalLM,
        MiniCPMForCausalLM,
        SparseMixtralForCausalLM,
        SparseQwen3MoeForCausalLM,
    )
}

for _model_type, _model_class in SPARSE_CLASSES.items():
    AutoConfig.register(_model_type, _model_class.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model_class.config_class, _model_class, exist_ok=True)
AutoModel.register(BambooConfig, BambooModel, exist_ok=True)
AutoModelForSequenceClassification.register(BambooConfig, BambooForSequenceClassification, exist_ok=True)
