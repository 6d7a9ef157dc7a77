"""Exporters: one module a runtime.

In: weights, a config and an activation. Out: a folder that the runtime loads, checked by loading it.
"""
