"""How a sparse model class is built: the stock class first, then a `SparseFFN` in place of every MLP.

In: a model under construction and its config. Out: the same model with sparse FFNs. An exported modelling file carries
the text of these functions, so they use nothing of prosparse but `SparseFFN` and `INTERMEDIATES`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel

from prosparse.activations import INTERMEDIATES
from prosparse.ffn import SparseFFN


@contextmanager
def stock_activation(config: PreTrainedConfig) -> Iterator[None]:
    """Let a stock class look up an activation that transformers knows; the config's own name stands again afterwards.

    Raises ValueError if the config names an activation that no sparse FFN has.
    """
    name = config.hidden_act
    if name not in INTERMEDIATES:
        raise ValueError(f"hidden_act is {name}: a {config.model_type} model has one of {', '.join(INTERMEDIATES)}")
    config.hidden_act = "relu"
    try:
        yield
    finally:
        config.hidden_act = name


def put_sparse_ffns(model: PreTrainedModel, activation: str, param: float) -> None:
    """Put a SparseFFN around the projections of every layer's MLP; the weights and their names stay."""
    for layer in model.model.layers:
        mlp = layer.mlp
        layer.mlp = SparseFFN(mlp.gate_proj, mlp.up_proj, mlp.down_proj, activation, param)
