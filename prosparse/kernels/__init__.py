"""Kernels, each beside its eager twin: glu.py trains the FFN, decode.py decodes with it.

In: tensors. Out: tensors.
"""
