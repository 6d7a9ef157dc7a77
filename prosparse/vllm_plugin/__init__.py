"""The plug-in by which vLLM serves sparse models that its own classes cannot.

In: vLLM, which finds `register` by the entry point group `vllm.general_plugins` in each of its processes. Out: its
registry knows this project's architectures (AutoConfig does, as soon as prosparse is imported). Needs only what vLLM
has: `pip install --no-deps -e PATH_OF_THE_CLONE` is enough.
"""

ARCHITECTURES = (
    "SparseLlamaForCausalLM",
    "AnySparseLlamaForCausalLM",
    "BambooForCausalLM",
    "SparseMistralForCausalLM",
    "SparseQwen2ForCausalLM",
    "SparseQwen3ForCausalLM",
    "SparsePhi3ForCausalLM",
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # stock model types of these architectures


def register() -> None:
    """Add the architectures to vLLM's registry, by name, so that no process imports models that it does not run."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"prosparse.vllm_plugin.models:{name}")
