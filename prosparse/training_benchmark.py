"""`prosparse bench what=train`: this trainer's step against ordinary training and against the usual way to add L1.

In: a `Bench` config; random weights of the model's shape, random rows. Out: seconds, memory, losses of each rival,
their ratios, and where our time goes. Each rival is a group of processes of its own that computes when it is its turn:
`ours`; `silu`, the same trainer with the model's own stock FFN, no penalty and no statistics; `control`, our FFN with
SiLU and statistics, as recipe.control=silu_continued; `hooks`, Hugging Face's Trainer with DeepSpeed, ReLU, and the L1
term from forward hooks.
"""

import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import LlamaConfig, LlamaForCausalLM

from prosparse import benchmarking, schedule
from prosparse.config import Dtype
from prosparse.data import Batch, next_tokens
from prosparse.ffn import sparse_ffns, substitute
from prosparse.penalty import PenaltyContext, mean_abs_by_layer, new_statistics, sparsity_by_layer
from prosparse.plotting import BLUE, GRAY, GREEN, VERMILION
from prosparse.speed import ffn_kernel
from prosparse.telemetry import peak_flops, peak_memory, training_flops
from prosparse.verb_configs import Bench

LOSS_NOISE = 5e-3  # how far, relatively, the losses of equal mathematics in bf16 may differ; so the L1 terms
GRADIENT_NOISE = 0.05  # how far the first gradients may lie apart, of a parameter's norm, along a random direction
SHARE_STEPS = 3
RATE = 1e-4  # constant: the rivals have to walk the same way, not a good one

Turn = Callable[[dict[str, Any] | None], bool]  # tells a result, waits; False: that was the last turn


def train(config: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Every rival's steps, in turns. RuntimeError if ours and `hooks` do not compute the same; ValueError for a batch
    or a kernel that cannot be."""
    schedule.accumulation(config.recipe.batch.sequences, config.micro_batch, config.ranks)
    ffn_kernel(config.speed, torch.device("cuda" if _on_gpu(config) else "cpu"))  # told here, not by every process
    arms: dict[str, Arm] = {}
    with tempfile.TemporaryDirectory(prefix="prosparse-bench-") as scratch:
        try:
            for name in ("ours", *config.rivals):
                arms[name] = Arm(name, config, Path(scratch) / name)
            for arm in arms.values():
                arm.wait()
            turns = {name: arm.turn for name, arm in arms.items()}
            warm = benchmarking.in_turns(turns, config.warmup)
            _compare(arms)
            seconds = benchmarking.in_turns(turns, config.rounds, progress)
            _compare(arms)
            ended = {name: arm.end() for name, arm in arms.items()}
        finally:
            for arm in arms.values():
                arm.stop()
    recipe, (device, ranks) = config.recipe, (ended["ours"]["device"], config.ranks)
    tokens = recipe.batch.sequences * recipe.batch.context
    of = {
        name: {
            "step_seconds": median(seconds[name]),
            "seconds": seconds[name],
            "warmup_seconds": warm[name],
            "tokens_per_second": tokens / median(seconds[name]),
            "losses": [row["loss"] for row in arm.rows],
            **ended[name],
        }
        for name, arm in arms.items()
    }
    ours, speed = of["ours"], tokens / median(seconds["ours"])
    result = {
        "shape": asdict(config.model.shape),
        "batch": f"{recipe.batch.sequences} x {recipe.batch.context}, micro_batch {config.micro_batch}",
        "parameters": ours["parameters"],
        "flops_a_token": ours["flops_a_token"],
        "mfu": None if ours["peak_flops"] is None else ours["flops_a_token"] * speed / ranks / ours["peak_flops"],
        "device": device,
        "ranks": ranks,
        "dtype": str(config.dtype),
        "l1_factor": config.l1_factor,
        "arms": of,
    }
    for name in config.rivals:
        result[f"vs_{name}"] = {
            "step_time": benchmarking.ratio(seconds["ours"], seconds[name]),
            "tokens_per_second": benchmarking.ratio(seconds[name], seconds["ours"]),
            "peak_memory": ours["memory_bytes"] / of[name]["memory_bytes"],
        }
    if "hooks" in arms:
        far = {"loss": max(_differences(arms, "loss")), "l1": max(_differences(arms, "l1"))}
        result["vs_hooks"] |= {f"largest_{key}_difference": value for key, value in far.items()}
        result["vs_hooks"]["largest_gradient_difference"] = max(_gradient_differences(arms).values())
    return result


def draw(result: dict[str, Any]) -> Figure:
    """Step times by round and peak memory of the rivals, and the parts of our step."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    time_axes, memory_axes, part_axes = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    colors = {"ours": BLUE, "silu": GRAY, "control": GREEN, "hooks": VERMILION}
    for name, arm in result["arms"].items():
        time_axes.plot(range(1, len(arm["seconds"]) + 1), arm["seconds"], "o-", color=colors[name], ms=4, label=name)
        memory_axes.bar(name, arm["memory_bytes"] / 1e9, color=colors[name])
    time_axes.set(xlabel="round", ylabel="step (s)", ylim=(0, None))
    time_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    time_axes.legend(frameon=False)
    memory_axes.set(ylabel="peak memory of a rank (GB)")
    parts = result["arms"]["ours"]["parts"]
    part_axes.bar(list(parts), [100 * share for share in parts.values()], color=BLUE)
    part_axes.set(ylabel="share of our step (%)")
    part_axes.tick_params(axis="x", rotation=30)
    for axes in (time_axes, memory_axes, part_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E5E5E5", lw=0.7)
        axes.set_axisbelow(True)
    return figure


def _differences(arms: "dict[str, Arm]", key: str) -> list[float]:
    return [abs(a[key] / b[key] - 1) for a, b in zip(arms["ours"].rows, arms["hooks"].rows, strict=True)]


def _gradient_differences(arms: "dict[str, Arm]") -> dict[str, float]:
    """By parameter |p · (g - g')| / |g|: the first gradients of ours and hooks, along a random direction p."""
    ours, hooks = (dict(arms[name].rows[0]["gradient"]) for name in ("ours", "hooks"))
    return {name: abs(along - hooks[name][1]) / norm for name, (norm, along) in ours.items() if norm > 0}


def _compare(arms: "dict[str, Arm]") -> None:
    """RuntimeError unless ours and hooks, if it takes part, compute the same so far."""
    if "hooks" not in arms:
        return
    apart = _gradient_differences(arms)
    worst = max(apart, key=lambda name: apart[name])
    if not apart[worst] <= GRADIENT_NOISE:
        raise RuntimeError(f"ours and hooks do not compute the same: the gradient of {worst} is {apart[worst]:.1%} off")
    for key in ("loss", "l1"):
        far = max(_differences(arms, key))
        if not far <= LOSS_NOISE:
            raise RuntimeError(f"ours and hooks do not compute the same: their {key} differs by {far:.2%}")


class Arm:
    """A rival's processes, from the outside."""

    def __init__(self, name: str, config: Bench, folder: Path):
        self.name, self.rows = name, list[dict[str, Any]]()
        folder.mkdir()
        with Listener(str(folder / "socket"), family="AF_UNIX") as listener:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.processes = [_spawn(rank, port, config, folder) for rank in range(config.ranks)]
            accepted = [self._accept(listener) for _ in self.processes]
        for connection in accepted:
            connection.send((name, config, str(folder)))
        self.connections = accepted

    def _accept(self, listener: Listener) -> Connection:
        listener._listener._socket.settimeout(120)  # type: ignore[attr-defined]
        return listener.accept()

    def wait(self) -> list[dict[str, Any] | None]:
        """What every process tells next; RuntimeError if one has ended."""
        try:
            return [connection.recv() for connection in self.connections]
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"the processes of {self.name} ended: their message stands above") from error

    def turn(self) -> float:
        """One step; its seconds on the slowest rank."""
        for connection in self.connections:
            connection.send(True)
        told = [row for row in self.wait() if row is not None]
        mean = {key: sum(row[key] for row in told) / len(told) for key in ("loss", "l1")}  # over ranks, if they differ
        self.rows.append(told[0] | mean)
        return max(row["seconds"] for row in told)

    def end(self) -> dict[str, Any]:
        """The last turn: what there is to tell after it, the most memory of a rank."""
        for connection in self.connections:
            connection.send(False)
        told = [row for row in self.wait() if row is not None]
        return told[0] | {"memory_bytes": max(row["memory_bytes"] for row in told)}

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _spawn(rank: int, port: int, config: Bench, folder: Path) -> "subprocess.Popen[bytes]":
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": config.ranks, "LOCAL_WORLD_SIZE": config.ranks}
    own = {key: str(value) for key, value in (world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items()}
    own |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if config.device != "cpu" else {}
    command = [sys.executable, "-m", "prosparse.training_benchmark", str(folder / "socket")]
    return subprocess.Popen(command, env=os.environ | own, stdout=sys.stderr)


# --- inside a rival's process -----------------------------------------------------------------------------------------


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
    model: Any = build(config, "silu", device)
    layers = model.config.num_hidden_layers
    if name != "silu":
        substitute(model, "relu" if name == "ours" else "silu")
    make_ready(model, config, device)
    engine = start_engine(config, model, deepspeed_config(config, world))
    context = PenaltyContext(torch.zeros((), device=device), new_statistics(layers, device))
    factor = config.l1_factor if name == "ours" else 0.0
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
        if name == "ours":
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
        "how": described(config, device, model.config.model_type),
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_a_token": training_flops(model, config.recipe.batch.context),
        "parts": parts,
        "peak_flops": peak_flops(device),
        "memory_bytes": memory,
    }


def _on_gpu(config: Bench) -> bool:
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
    device = torch.device("cuda", rank) if _on_gpu(config) else torch.device("cpu")
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
