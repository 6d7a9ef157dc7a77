"""How a sparse model class is built: the stock class first, then a `SparseFFN` in place of every FFN.

In: the config of a model under construction, its modules. Out: the config with an activation that the stock class
knows, for as long as it needs one; scaled modules. An exported modeling file carries the text of what it needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn
from transformers import PreTrainedConfig

from prosparse.activations import ACTIVATIONS
from prosparse.ffn import activation_key


@contextmanager
def stock_activation(config: PreTrainedConfig) -> Iterator[None]:
    """Let a stock class look up an activation that transformers knows; the config's own name stands again afterwards.

    Raises ValueError if the config names an activation that no sparse FFN has.
    """
    key = activation_key(config)
    name = getattr(config, key)
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} is {name}: a {config.model_type} model has one of {', '.join(ACTIVATIONS)}")
    setattr(config, key, "relu")
    try:
        yield
    finally:
        setattr(config, key, name)


def scale_output(module: nn.Module, factor: float) -> None:
    """Let a module give `factor` times what it computes."""
    module.register_forward_hook(lambda _module, _inputs, output: output * factor)
