"""How a training step is computed fast: kernels, activation checkpointing, compilation, the garbage collector.

In: a model, the `speed` and `checkpointing` keys, a device. Out: the model, made ready; one line that says how.
"""

import gc
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from prosparse.config import Auto, Checkpointing, Compile, FfnMemory, Kernel, Norm, Profile, Speed, Train
from prosparse.data import Batch, batch
from prosparse.ffn import FusedFFN, SeparateFFN, SparseFFN, UngatedFFN, sparse_ffns
from prosparse.group import keep_freed_memory
from prosparse.kernels import glu
from prosparse.kernels.norm import fuse, is_fused

KEPT_BY_SELECTIVE = ("mm", "addmm", "bmm", "_grouped_mm", "_scaled_dot_product")  # beginnings of aten's names


def ffn_kernel(speed: Speed, device: torch.device) -> str | None:
    """Which of glu.py's kernels trains the FFNs, eager or triton; None: stock.

    ValueError if Triton is asked for where it does not run.
    """
    if speed.ffn is FfnMemory.stock:
        return None
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    compiles = find_spec("triton") is not None and (device.type == "cuda" or interprets)
    if speed.kernel is Kernel.triton and not compiles:
        raise ValueError("speed.kernel is triton, which needs a GPU and the package triton: set speed.kernel=auto")
    if speed.kernel is Kernel.auto:
        return "triton" if compiles and device.type == "cuda" else "eager"
    return str(speed.kernel)


def ffn_memory(config: Train, device: torch.device) -> FfnMemory:
    """What `auto` stands for; under activation checkpointing, which frees x1 anyway, nothing else recomputes it."""
    chosen = config.speed.ffn
    if chosen is FfnMemory.auto:
        chosen = FfnMemory.recompute_x1 if device.type == "cpu" else FfnMemory.save_x1
    keeps = config.checkpointing is not Checkpointing.none and chosen is FfnMemory.recompute_x1
    return FfnMemory.save_x1 if keeps else chosen


def uses_liger(speed: Speed, device: torch.device, family: str) -> bool:
    """Whether Liger's kernels take part; family: a config's model_type."""
    if speed.liger is Auto.none or device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return family in MODEL_TYPE_TO_APPLY_LIGER_FN


def make_ready(model: PreTrainedModel, config: Train, device: torch.device) -> None:
    """Everything about a step that is done to the substituted model once, before the engine takes it."""
    speed = config.speed
    checkpoint_activations(model, config.checkpointing)
    if uses_liger(speed, device, model.config.model_type):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        own: dict[str, Any] = dict.fromkeys(("swiglu", "geglu", "cross_entropy", "fused_linear_cross_entropy"), False)
        _apply_liger_kernel_to_instance(model, rope=True, rms_norm=True, **own)
    if speed.norm is Norm.fused:  # those that Liger has not replaced
        for module in model.modules():
            if "forward" not in vars(module):
                fuse(module)
    ffn_kernel(speed, device)
    asked = (speed.ffn, speed.kernel) != (FfnMemory.auto, Kernel.auto) and speed.ffn is not FfnMemory.stock
    kind = type(model).__name__
    for ffn in sparse_ffns(model):
        if asked and not _can_fuse(ffn):
            words = f"speed.ffn is {speed.ffn} and speed.kernel {speed.kernel}"
            raise ValueError(f"{words}, which {kind} with {ffn.activation} cannot: set both to auto")
        if ffn_memory(config, device) is FfnMemory.recompute_x1:
            if isinstance(ffn, SeparateFFN | FusedFFN):
                glu.recompute_x1(ffn.down_proj)
            elif speed.ffn is FfnMemory.recompute_x1:
                raise ValueError(f"speed.ffn is recompute_x1, which {kind} cannot: set speed.ffn=auto")
    if speed.compile is Compile.layers:
        assert config.zero.stage < 3, "checks.py"
        for ffn in sparse_ffns(model):  # its layer's number would be compiled in, anew for every layer
            ffn.intermediate = torch.compiler.disable(ffn.intermediate)  # type: ignore[method-assign]
        for module in _decoder_layers(model):
            module.compile()


def _can_fuse(ffn: SparseFFN) -> bool:
    return ffn.activation in glu.FUSED and not isinstance(ffn, UngatedFFN)


def checkpoint_activations(model: PreTrainedModel, how: Checkpointing) -> None:
    """Let the model's decoder layers compute again in backward what `how` does not keep."""
    if how is Checkpointing.none:
        return
    options: dict[str, Any] = {"use_reentrant": how is Checkpointing.reentrant}
    if how is Checkpointing.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = getattr(operator, "__name__", "")
    kept = getattr(operator, "namespace", "") == "aten" and name.startswith(KEPT_BY_SELECTIVE)
    kept = kept or "flash_attn" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that hold one FFN each and lie directly in a list of layers."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return [layer for stack in lists for layer in stack if len(sparse_ffns(layer)) == 1]


def settle(speed: Speed, device: torch.device) -> None:
    """To be called after the first step, when what lives as long as the training has its place in memory.

    That is not searched for garbage any more, until `thaw_gc`; on a CPU what the steps free stays in the process.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if speed.freeze_gc:
        gc.collect()
        gc.freeze()


def thaw_gc() -> None:
    gc.unfreeze()


def described(config: Train, device: torch.device, model: PreTrainedModel) -> str:
    """How a step of a model that was made ready is computed, in words."""
    speed, ffns = config.speed, sparse_ffns(model)
    kernel, memory = ffn_kernel(speed, device), ffn_memory(config, device)
    liger = "with" if uses_liger(speed, device, model.config.model_type) else "without"
    compiled = ", layers compiled" if speed.compile is Compile.layers else ""
    if kernel is None or not all(map(_can_fuse, ffns)):
        ffn = str(FfnMemory.stock)
    else:
        recomputes = memory is FfnMemory.recompute_x1 and all(isinstance(f, SeparateFFN | FusedFFN) for f in ffns)
        ffn = f"{memory if recomputes else FfnMemory.save_x1} ({kernel})"
    norm = Norm.fused if any(map(is_fused, model.modules())) else Norm.stock
    how = f"ffn {ffn}, loss {speed.loss}, norm {norm}, {liger} Liger"
    return f"{how}, checkpointing {config.checkpointing}{compiled}"


class Ahead:
    """Gives the rows of a window; those of the window that is likely next are read in a thread meanwhile."""

    def __init__(self, speed: Speed):
        self._pool = ThreadPoolExecutor(1, "rows") if speed.prefetch else None
        self._next: tuple[Any, list[range], Future[list[Batch]]] | None = None

    def rows(self, mixture: Any, numbers: list[range], following: tuple[Any, list[range]] | None) -> list[Batch]:
        """The micro-batches `numbers` of `mixture`; `following`: what the next call will most likely ask for."""
        known, self._next = self._next, None
        if known is not None and known[0] is mixture and known[1] == numbers:
            rows = known[2].result()
        else:
            rows = _read(mixture, numbers)
        if self._pool is not None and following is not None:
            self._next = (*following, self._pool.submit(_read, *following))
        return rows


def _read(mixture: Any, numbers: list[range]) -> list[Batch]:
    return [batch(mixture, indices) for indices in numbers]


class Profiler:
    """Records the steps that `profile` names and writes a trace of them, one file a rank."""

    def __init__(self, steps: Profile, folder: Path, rank: int):
        self._first, self._last = steps.first, steps.first + steps.steps - 1
        self._file = folder / "profile" / f"rank-{rank}.json.gz"
        self._running: Any = None

    def before(self, step: int) -> None:
        if self._first <= step <= self._last and self._running is None:
            self._running = torch.profiler.profile()  # of all devices that there are
            self._running.start()

    def after(self, step: int) -> Path | None:
        """The file, if `step` was the last one."""
        return self.end() if step >= self._last else None

    def end(self) -> Path | None:
        """The file of the steps so far, if any are recorded and not yet written."""
        if self._running is None:
            return None
        self._running.stop()
        self._file.parent.mkdir(exist_ok=True)
        self._running.export_chrome_trace(str(self._file))
        self._running = None
        return self._file
