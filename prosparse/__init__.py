"""prosparse: turn Swish-gated language models into sparsely activated ReLU ones.

In: a transformers model. Out: functions that substitute, regularize, measure, shift, train and export it.
Importing it needs torch and transformers only, and registers the sparse model classes with the Auto* loaders.
"""

from importlib import import_module
from typing import Any

import prosparse.models  # noqa: F401  (registers the sparse classes)

_HOMES = {
    "substitute": "prosparse.ffn",
    "set_penalty": "prosparse.ffn",
    "PenaltyContext": "prosparse.penalty",
    "new_statistics": "prosparse.penalty",
    "sparsity_by_layer": "prosparse.penalty",
    "load_model": "prosparse.models.load",
    "load_tokenizer": "prosparse.models.load",
    "enable_sparse_decoding": "prosparse.decoding",
    "disable_sparse_decoding": "prosparse.decoding",
    "fold_minicpm": "prosparse.models.folding",
    "prepare": "prosparse.preparation",
    "text_rows": "prosparse.preparation",
    "measure": "prosparse.sparsity",
    "shift": "prosparse.threshold",
    "fold": "prosparse.allocation",
    "predict": "prosparse.predictor",
    "generate": "prosparse.generation",
    "evaluate": "prosparse.evaluation",
    "export": "prosparse.exporters.hf",
    "train": "prosparse.trainer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"prosparse has no {name}")
    return getattr(import_module(_HOMES[name]), "export_hf_model" if name == "export" else name)
