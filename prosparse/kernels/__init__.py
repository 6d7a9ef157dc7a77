"""Kernels, each beside its eager twin: glu.py trains the FFN, decode.py decodes with it.

In: tensors. Out: tensors.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Within, Triton's kernels start on the GPU of `tensor`; they would on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
