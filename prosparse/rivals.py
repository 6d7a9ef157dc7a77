"""Inside the processes of `prosparse bench what=train`: the rivals' own steps.

In: a `Bench` config, by a socket. Out: by that socket a line on each step, and what there is to tell at the end.
`ours` is this trainer's step; `plain` the same without any switch of `speed`; `silu` the same trainer with the model's
own stock FFN, no penalty and no statistics; `control` our FFN with SiLU and statistics, as
recipe.control=silu_continued; `hooks` Hugging Face's Trainer with DeepSpeed, ReLU, and the L1 term from forward hooks.
"""

import ctypes
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prosparse import schedule
from prosparse.config import Auto, Compile, Dtype, FfnMemory, Loss, Norm, Speed
from prosparse.data import Batch, next_tokens
from prosparse.ffn import sparse_ffns, substitute
from prosparse.penalty import PenaltyContext, mean_abs_by_layer, new_statistics, sparsity_by_layer
from prosparse.telemetry import peak_flops, peak_memory, training_flops
from prosparse.verb_configs import Bench

SHARE_STEPS = 3
RATE = 1e-4  # constant: the rivals have to walk the same way, not a good one
PLAIN = Speed(ffn=FfnMemory.stock, loss=Loss.stock, norm=Norm.stock, liger=Auto.none, compile=Compile.none)

Turn = Callable[[dict[str, Any] | None], bool]  # tells a result, waits; False: that was the last turn


def main(address: str) -> None:
    connection = Client(address, family="AF_UNIX")
    name, config, folder = connection.recv()

    def turn(result: dict[str, Any] | None) -> bool:
        connection.send(result)
        return connection.recv()

    said = _hooks(config, turn, Path(folder)) if name == "hooks" else _own(config, name, turn)
    connection.send(said)


def build(config: Bench, activation: str, device: torch.device) -> LlamaForCausalLM:
    """A Llama of the experiment's shape with random weights, the same in every process."""
    shape = {key: value for key, value in asdict(config.model.shape).items() if value is not None}
    longest = schedule.contexts(config.recipe)[-1]
    llama = LlamaConfig(**shape, hidden_act=activation, max_position_embeddings=longest)
    llama._attn_implementation = config.attention
    torch.manual_seed(config.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if config.dtype is Dtype.bf16 else torch.float32)
    try:
        with device:
            return LlamaForCausalLM(llama)
    finally:
        torch.set_default_dtype(before)


def fingerprint(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """By parameter the norm of its gradient and its component along a random direction (all ranks call it)."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, parameter in model.named_parameters():
        gradient = safe_get_full_grad(parameter).float().flatten()
        generator = torch.Generator(gradient.device).manual_seed(zlib.crc32(name.encode()))
        direction = torch.randn(gradient.shape, generator=generator, device=gradient.device)
        found[name] = (gradient.norm().item(), torch.dot(gradient, direction).item())
    return found


def forget_peak(device: torch.device) -> None:
    """Let the peak memory count from now on: what comparing took, and the holes that it left, are not the step's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the most that was resident is what is


def row(config: Bench, number: int) -> torch.Tensor:
    """Row `number`: random tokens, int64 [context]."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
    vocabulary = config.model.shape.vocab_size
    assert vocabulary is not None
    return torch.randint(vocabulary, (config.recipe.batch.context,), generator=generator)


def _own(config: Bench, name: str, turn: Turn) -> dict[str, Any]:
    """This trainer's step: as trainer.py puts it together."""
    from prosparse.engine import accumulate, deepspeed_config, join_deepspeed, set_rate, start_engine
    from prosparse.group import start_group
    from prosparse.speed import described, make_ready, settle

    rank, world, device = start_group(config.device, config.threads, config.seed)
    join_deepspeed(device)
    if name == "plain":
        config = replace(config, speed=PLAIN)
    model: Any = build(config, "silu", device)
    layers = model.config.num_hidden_layers
    if name != "silu":
        substitute(model, "silu" if name == "control" else "relu")
    make_ready(model, config, device)
    engine = start_engine(config, model, deepspeed_config(config, world))
    context = PenaltyContext(torch.zeros((), device=device), new_statistics(layers, device))
    penalized = name in ("ours", "plain")
    factor = config.l1_factor if penalized else 0.0
    size, sequences = config.micro_batch, config.recipe.batch.sequences

    def step(number: int) -> dict[str, Any]:
        first = number * sequences
        starts = range(first + rank * size, first + sequences, size * world)
        rows = [torch.stack([row(config, i + j) for j in range(size)]) for i in starts]
        batches = [Batch(ids, next_tokens(ids)) for ids in rows]
        _synchronize(device)
        began = time.perf_counter()
        window = accumulate(engine, context, batches, factor, speed=config.speed)
        gradient = fingerprint(engine.module) if number == 0 else {}
        set_rate(engine, RATE, config.recipe.optimizer.weight_decay)
        engine.step()
        _synchronize(device)
        result: dict[str, Any] = {"seconds": time.perf_counter() - began, "loss": window.loss, "l1": 0.0}
        result |= {"gradient": gradient, "sparsity": 0.0}
        if penalized:
            result["l1"] = factor * sum(mean_abs_by_layer(window.statistics))
            result["sparsity"] = sum(sparsity_by_layer(window.statistics)) / layers
        return result

    going, number, result = turn(None), 0, None
    while going:
        result = step(number)
        if number == 0:
            forget_peak(device)
            settle(config.speed, device)
        number, going = number + 1, turn(result)
    memory = peak_memory(device)
    parts = _shares(engine, step, number, device) if name == "ours" else {}
    return {
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "how": described(config, device, model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_a_token": training_flops(model, config.recipe.batch.context),
        "parts": parts,
        "peak_flops": peak_flops(device),
        "memory_bytes": memory,
    }


def on_gpu(config: Bench) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shares(engine: Any, step: Callable[[int], dict[str, Any]], number: int, device: torch.device) -> dict[str, float]:
    """The share of a step's time in its parts, over SHARE_STEPS steps that wait for the device at each border.

    ffn: forward and backward of all FFNs; loss: from the output head's forward to its backward; optimizer: the engine's
    step; communication: the collectives' own time, which may lie beside the rest.
    """
    sums, open_at = dict.fromkeys(("ffn", "loss", "optimizer"), 0.0), dict[str, float]()

    def begin(part: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            _synchronize(device)
            open_at[part] = time.perf_counter()

        return note

    def end(part: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            _synchronize(device)
            sums[part] += time.perf_counter() - open_at[part]

        return note

    handles = []
    for ffn in sparse_ffns(engine.module):
        handles += [ffn.register_forward_pre_hook(begin("ffn")), ffn.register_forward_hook(end("ffn"))]
        handles += [ffn.register_full_backward_pre_hook(begin("ffn")), ffn.register_full_backward_hook(end("ffn"))]
    head = engine.module.get_output_embeddings()
    handles += [head.register_forward_pre_hook(begin("loss")), head.register_full_backward_hook(end("loss"))]
    whole, stepping = 0.0, engine.step

    def timed_step() -> None:
        begin("optimizer")()
        stepping()
        end("optimizer")()

    engine.step = timed_step
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    for i in range(SHARE_STEPS):
        whole += step(number + i)["seconds"]
    for handle in handles:
        handle.remove()
    engine.step = stepping
    with torch.profiler.profile(activities=activities) as trace:
        one = step(number + SHARE_STEPS)["seconds"]
    kind, clock = ("ncclDevKernel", "device_time_total") if device.type == "cuda" else ("gloo:", "cpu_time_total")
    spoken = sum(getattr(event, clock) for event in trace.key_averages() if event.key.startswith(kind)) / 1e6
    return {part: total / whole for part, total in sums.items()} | {"communication": spoken / one}


def _hooks(config: Bench, turn: Turn, folder: Path) -> dict[str, Any]:
    """What people write today: Trainer, a DeepSpeed config, hooks that collect x1, a loss with its mean |x1|."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if on_gpu(config) else torch.device("cpu")
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed
    from transformers import Trainer, TrainerCallback, TrainingArguments

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # of one rank's collectives, and a minute to build
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // world))
    model, kept = build(config, "relu", device), list[torch.Tensor]()
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    said: dict[str, Any] = {}
    sequences, micro = config.recipe.batch.sequences, config.micro_batch
    accumulation = schedule.accumulation(sequences, micro, world)

    class WithL1(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            kept.clear()
            loss = model(**inputs, use_cache=False).loss
            l1 = config.l1_factor * torch.stack([x1.abs().mean(dtype=torch.float32) for x1 in kept]).sum()
            kept.clear()
            for key, value in (("loss", loss), ("l1", l1)):
                said[key] = said.get(key, 0.0) + value.detach() / accumulation
            return loss + l1

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    class Turns(TrainerCallback):
        began = 0.0
        started = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.started:
                self.started = True
                engine: Any = trainer.model_wrapped
                first = engine.step

                def step(*given: Any, **named: Any) -> Any:
                    if engine.is_gradient_accumulation_boundary() and not said.get("gradient"):
                        said["gradient"] = fingerprint(engine.module)
                        engine.step = first
                    return first(*given, **named)

                engine.step = step
                control.should_training_stop = not turn(None)
            said.clear()
            _synchronize(device)
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _synchronize(device)
            if state.global_step == 1:
                forget_peak(device)
            seconds = time.perf_counter() - self.began
            numbers = {"seconds": seconds, "loss": float(said["loss"]), "l1": float(said["l1"])}
            control.should_training_stop = not turn(said | numbers)

    steps = config.warmup + config.rounds + 1
    settings = config.recipe.optimizer
    options: dict[str, Any] = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "bf16": config.dtype is Dtype.bf16,
        "optim": "adamw_torch_fused",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "adam_epsilon": settings.eps,
        "max_grad_norm": settings.clip,
        "gradient_checkpointing": False,
        "max_steps": steps,
        "seed": config.seed,
        "use_cpu": device.type == "cpu",
        "deepspeed": {
            "zero_optimization": {"stage": config.zero.stage},
            "bf16": {"enabled": config.dtype is Dtype.bf16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        },
    }
    quiet: dict[str, Any] = {"report_to": [], "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(folder / "trainer"), **options, **quiet)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return steps * sequences

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            ids = row(config, number)
            return {"input_ids": ids, "labels": ids}

    trainer = WithL1(model=model, args=arguments, train_dataset=Rows(), callbacks=[Turns()])
    trainer.model_accepts_loss_kwargs = False  # so that Trainer divides our loss by the accumulation
    trainer.train()
    return {"options": options, "threads": torch.get_num_threads(), "memory_bytes": peak_memory(device)}


if __name__ == "__main__":
    main(sys.argv[1])
