"""vLLM's own models with the activation exchanged.

In: the config of a sparse model, as an export writes it. Out: vLLM's class of the family, whose FFNs compute x1 as in
training. All matrix products stay dense.
"""

from typing import Any

import torch.nn as nn
from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from prosparse.activations import intermediate


class Intermediate(nn.Module):
    """x1, [..., neurons], of gate and up side by side, [..., 2 x neurons]."""

    def __init__(self, activation: str, param: float):
        super().__init__()
        self.activation, self.param = activation, param

    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return intermediate(self.activation, self.param, gate, up)


class Sparse:
    """Before a vLLM model in the bases of a class: builds it with SiLU, the one it knows, then exchanges that."""

    bamboo = False  # its config says relu and means dReLU

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        named = config.hidden_act
        activation, param = ("drelu", 0.0) if self.bamboo else (named, config.hidden_act_param)
        config.hidden_act = "silu"
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        finally:
            config.hidden_act = named
        exchanged = 0
        for module in self.modules():  # type: ignore[attr-defined]
            if hasattr(module, "gate_up_proj") and hasattr(module, "act_fn"):
                module.act_fn = Intermediate(activation, param)
                exchanged += 1
        if not exchanged:
            raise ValueError(f"{type(self).__name__}: no FFN of this vLLM has gate_up_proj and act_fn")


class SparseLlamaForCausalLM(Sparse, LlamaForCausalLM):
    pass


class AnySparseLlamaForCausalLM(Sparse, LlamaForCausalLM):
    pass


class BambooForCausalLM(Sparse, MistralForCausalLM):
    bamboo = True


class SparseMistralForCausalLM(Sparse, MistralForCausalLM):
    pass


class SparseQwen2ForCausalLM(Sparse, Qwen2ForCausalLM):
    pass


class SparseQwen3ForCausalLM(Sparse, Qwen3ForCausalLM):
    pass


class SparsePhi3ForCausalLM(Sparse, Phi3ForCausalLM):
    pass
