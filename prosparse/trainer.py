"""The training loop: substitution -> regularization -> shift -> export -> report, resumable at any step.

In: a `Train` config, the same on every rank. Out: a run folder (config.yaml, metrics.jsonl, checkpoints/, model/,
report/) and the report as a dict.
"""

import copy
import gc
import json
import os
import resource
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from prosparse import checkpoint, schedule
from prosparse.checkpoint import TrainState, from_rank_zero
from prosparse.config import Checkpointing, Control, Dtype, Train
from prosparse.data import Batch, batch, epochs, mixture, open_prepared, prepare
from prosparse.ffn import Substitution, activation_of, set_penalty, sparse_ffns, substitute
from prosparse.penalty import PenaltyContext, mean_abs_by_layer, new_statistics, sparsity_by_layer
from prosparse.reporting import table, write_report
from prosparse.sparsity import Measurement, labeled, language_loss, measure, spread
from prosparse.telemetry import Eta, Metrics, Tracker, progress_line, read_metrics
from prosparse.threshold import Point, shift

DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}
# Dense bf16 peaks in FLOP/s, from the vendor's data sheets.
PEAK_FLOPS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H200": 989e12}
MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class Run:
    """What the phases of one run share."""

    config: Train
    run_dir: Path
    rank: int
    world: int
    device: torch.device
    metrics: Metrics | None  # rank 0 only
    tracker: Tracker | None  # rank 0 only

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def log(self, row: dict) -> None:
        if self.metrics is not None and self.tracker is not None:
            self.metrics.append(row)
            self.tracker.log(row)


def train(config: Train) -> dict:
    """Run `config` to its end, or to `config.until`; started again with the same config it goes on.

    Every rank of a launcher's group calls it; without a launcher it is a group of one. Returns the report ({"stopped_at"}
    if it stopped at `until`). Raises ValueError for what a user can mend, OSError if a checkpoint cannot be written.
    """
    started = time.time()
    # --- the process group, the folder --------------------------------------------------------------------------------
    rank, world, device = start_group(config)
    run_dir = Path(config.run_dir).expanduser()
    recipe = config.recipe
    from_rank_zero(lambda: _claim(run_dir))
    _same_everywhere(json.dumps(asdict(config), sort_keys=True), world)
    for span in schedule.spans(recipe):
        schedule.accumulation(schedule.batch_at(recipe, span.first)[0], config.micro_batch, world)

    # --- text, model, substitution ------------------------------------------------------------------------------------
    import deepspeed

    from prosparse.exporters.hf import export_hf
    from prosparse.models.load import load_config, load_model, load_tokenizer

    opening = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    base_config = load_config(config.model.source, **opening)
    _check_shape(config, base_config)
    tokenizer = load_tokenizer(
        config.data.tokenizer or config.model.source, **({} if config.data.tokenizer else opening)
    )
    arguments = (config.data, tokenizer, schedule.contexts(recipe), base_config.get_text_config().vocab_size)
    folders = from_rank_zero(lambda: {length: made.folders for length, made in prepare(*arguments).items()})
    prepared = {length: open_prepared(parts) for length, parts in folders.items()}
    ds_config = deepspeed_config(config, world)
    model = load_model(
        config.model.source,
        dtype=DTYPES[config.dtype],
        device=str(device),
        attention=config.attention,
        zero3=ds_config if config.zero.stage == 3 else None,
        **opening,
    )
    base_config = copy.deepcopy(model.config)
    own = activation_of(model)
    substitution = substitute(model, *(schedule.activation(recipe) or own))
    if config.checkpointing is not Checkpointing.none:
        reentrant = config.checkpointing is Checkpointing.reentrant
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()

    # --- the engine, and where the run left off -----------------------------------------------------------------------
    decayed = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) >= 2]
    others = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) < 2]
    adamw = recipe.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": adamw.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr.peak,
        betas=(adamw.betas[0], adamw.betas[1]),
        eps=adamw.eps,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    identity = _identity(config, {str(length): made.digest for length, made in prepared.items()})
    state = _resume(engine, config, run_dir, identity)
    run = _open_run(config, run_dir, rank, world, device, state)
    run.say(_header(run, substitution, model, base_config, prepared, state))
    record = {
        "identity": identity,
        "activation": {"name": substitution.activation, "param": substitution.param},
        "zero_stage": config.zero.stage,
        "versions": _versions(),
    }

    def save() -> None:
        began = time.time()
        folder = checkpoint.save(
            engine, run_dir, state, record, lambda to: _skeleton(model, base_config, tokenizer, to), config.save.keep
        )
        run.say(f"saved {folder} in {time.time() - began:.1f} s")

    # --- before the first step: the base model, and what substitution alone does to it ----------------------------------
    held_out = prepared[schedule.contexts(recipe)[-1]].held_out
    if state.step == 0:
        if schedule.activation(recipe) is not None:
            substitute(model, *own)
        evaluate(run, engine.module, held_out, 0, "base")
        if schedule.activation(recipe) is not None:
            substitute(model, substitution.activation, substitution.param)
            evaluate(run, engine.module, held_out, 0, "substituted")

    # --- the stages ---------------------------------------------------------------------------------------------------
    neurons = base_config.get_text_config().intermediate_size
    context = PenaltyContext(torch.zeros((), device=device), new_statistics(substitution.layers, device))
    mixtures: dict[str, Any] = {}

    def mixture_at(step: int) -> Any:
        stage, length = schedule.stage_at(recipe, step).stage, schedule.batch_at(recipe, step)[1]
        key = json.dumps([stage.data, length])
        if key not in mixtures:
            weights = stage.data or {name: source.weight for name, source in config.data.sources.items()}
            mixtures[key] = mixture(prepared[length].train, weights, config.seed)
        return mixtures[key]

    eta = Eta()
    total, skipped_in_a_row = schedule.total_steps(recipe), 0
    stop_at = (
        total
        if config.until in (None, "shift")
        else next(s.last for s in schedule.spans(recipe) if s.name == config.until)
    )
    while state.step < stop_at:
        began = time.perf_counter()
        step = state.step + 1
        span = schedule.stage_at(recipe, step)
        if span.stage.reset_optimizer and step == span.first:
            _reset(engine)

        # the window: which rows, split into this rank's micro-batches
        first, sequences = schedule.window_rows(recipe, step, state.window)
        rows = mixture_at(step)
        whole = config.micro_batch * world
        starts = range(first + rank * config.micro_batch, first + sequences, whole)
        micro_batches = [batch(rows, range(i, i + config.micro_batch)).to(device) for i in starts]
        factor = schedule.l1_factor_mean(recipe, step, neurons)
        window = accumulate(engine, context, micro_batches, factor)

        # the step
        learning_rate, decay = schedule.learning_rate(recipe, step), schedule.weight_decay(recipe, step)
        for group, own_decay in zip(engine.optimizer.param_groups, (decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = learning_rate, own_decay
        engine.step()
        state.window += 1
        if not engine.was_step_applied():
            state.skipped, skipped_in_a_row = state.skipped + 1, skipped_in_a_row + 1
            run.say(
                f"step {step}: not applied, the gradient is not finite; rows {first} to {first + sequences - 1} are left out"
            )
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise RuntimeError(
                    f"{skipped_in_a_row} steps in a row were not applied: lower recipe.lr.peak or the last λ"
                )
            continue
        state.step, state.tokens, skipped_in_a_row = step, state.tokens + window.tokens, 0

        # what it was like
        seconds = time.perf_counter() - began
        eta.update(seconds)
        by_layer, magnitude = sparsity_by_layer(window.statistics), mean_abs_by_layer(window.statistics)
        grad_norm = engine.get_global_grad_norm()
        row = {
            "kind": "train",
            "step": step,
            "window": state.window,
            "stage": span.name,
            "tokens": state.tokens,
            "loss": window.loss,
            "l1": factor * sum(magnitude),
            "l1_factor": schedule.l1_factor(recipe, step),
            "l1_factor_mean": factor,
            "sparsity": sum(by_layer) / len(by_layer),
            "sparsity_by_layer": by_layer,
            "mean_abs_by_layer": magnitude,
            "lr": learning_rate,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "tokens_per_second": window.tokens / seconds,
            "mfu": _mfu(model, base_config, schedule.batch_at(recipe, step)[1], window.tokens / seconds, world, device),
            "step_seconds": seconds,
            "memory_bytes": _memory(device),
            "skipped": state.skipped,
        }
        run.log(row)
        run.say(progress_line(row, total, eta.remaining(stop_at - step)))
        if config.evaluate.every and step % config.evaluate.every == 0 and step < total:
            evaluate(run, engine.module, held_out, step, "training")
        if step % config.save.every == 0 or step == span.last:
            save()

    if state.step < total:
        run.say(f"stopped after stage {config.until} as until={config.until} asked; start again without it to go on")
        _close(run, {})
        return {"run_dir": str(run_dir), "stopped_at": config.until, "step": state.step}

    # --- the shift, the export, the report ----------------------------------------------------------------------------
    models = {row["model"]: row for row in from_rank_zero(lambda: read_metrics(run_dir)) if row["kind"] == "evaluation"}
    models = {name: models[name] for name in ("base", "substituted") if name in models}
    models["trained"] = evaluate(run, engine.module, held_out, state.step, "trained")
    report = {
        "models": models,
        "tokens_trained": state.tokens,
        "steps": state.step,
        "text": f"held-out documents of {', '.join(f'{n} ({s.path})' for n, s in config.data.sources.items())}",
        "dtype": str(config.dtype),
        "device": _device_name(device, world),
        "command": " ".join(sys.argv),
        "control": str(recipe.control),
        "versions": record["versions"],
        "notes": [_fairness(recipe.control)],
    }
    if schedule.shifts(recipe):
        rows = mixture_at(total)
        unread = sum(schedule.window_rows(recipe, total, state.window - 1))
        calibration = [rows[unread + i] for i in range(recipe.shift.calibration_rows)]
        run.say(f"shifting the threshold on {len(calibration)} training rows not read so far")
        shifted = shift(model, calibration, recipe.shift, batch=config.micro_batch, report=lambda p: run.say(_point(p)))
        report["shift"] = shifted.to_dict()
        models["shifted"] = evaluate(run, engine.module, held_out, state.step, "shifted")
    if config.until != "shift":
        activation, generation = activation_of(model), model.generation_config
        weights = _gather(engine, rank)
        engine.destroy()
        del engine, model, optimizer
        gc.collect()
        target = (run_dir / "model", DTYPES[config.dtype])
        report["export"] = from_rank_zero(
            lambda: export_hf(weights, base_config, *activation, tokenizer, generation, *target)
        )
        del weights
        exported = load_model(str(run_dir / "model"), dtype=DTYPES[config.dtype], device=str(device))
        models["exported"] = evaluate(run, exported, held_out, state.step, "exported")
    report["seconds"] = time.time() - started
    images = from_rank_zero(lambda: _report(run_dir, report))
    run.say("\n" + table(report))
    run.say(f"\nreport: {run_dir / 'report'}" + ("" if config.until == "shift" else f"   model: {run_dir / 'model'}"))
    _close(run, images)
    return report


@dataclass
class Window:
    """One global batch: mean loss over its labeled tokens, its non-padding tokens, statistics summed over the ranks."""

    loss: float
    tokens: int
    statistics: torch.Tensor  # fp64 [layers, 3]


def accumulate(engine: Any, context: PenaltyContext, micro_batches: list[Batch], factor: float) -> Window:
    """Forward and backward over this rank's micro-batches of one window, up to but without the last `engine.step()`.

    The gradient is that of mean loss over labeled tokens + factor · Σ_layers mean |x1|, both means over the window of all
    ranks, however it is split into micro-batches; the engine's division by the rank count is undone here.
    """
    model, world = engine.module, dist.get_world_size()
    counts = torch.tensor([_counts(b) for b in micro_batches], dtype=torch.float64, device=context.scale.device).sum(0)
    dist.all_reduce(counts)
    labels, tokens = counts.tolist()
    context.scale.fill_(factor * world / tokens)
    context.statistics.zero_()
    loss_sum = torch.zeros((), dtype=torch.float64, device=context.scale.device)
    set_penalty(model, context)
    for number, data in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        context.token_mask = data.token_mask
        loss = language_loss(engine(input_ids=data.input_ids, use_cache=False).logits, data.labels)
        loss_sum += loss.detach()
        engine.backward(loss * (world / labels), scale_wrt_gas=False)
        if not last:
            engine.step()
    set_penalty(model, None)
    sums = torch.cat([context.statistics.flatten(), loss_sum[None]])
    dist.all_reduce(sums)
    return Window(sums[-1].item() / labels, int(tokens), sums[:-1].view_as(context.statistics))


def start_group(config: Train) -> tuple[int, int, torch.device]:
    """Join the launcher's process group, or make one of a single rank; returns (rank, ranks, device)."""
    environment = os.environ
    for name, slurm in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if name not in environment and "MASTER_ADDR" in environment and slurm in environment:
            environment[name] = environment[slurm]
    if "WORLD_SIZE" not in environment:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU here: set device=cpu or install a CUDA build of torch")
    environment["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    bin_folder = str(Path(sys.executable).parent)  # DeepSpeed compiles an op with the ninja that lies beside python
    if bin_folder not in environment["PATH"].split(os.pathsep):
        environment["PATH"] = bin_folder + os.pathsep + environment["PATH"]
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    transformers_logging.set_verbosity_error()
    world, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_RANK"])
    here = int(
        environment.get("LOCAL_WORLD_SIZE")
        or environment.get("LOCAL_SIZE")
        or environment.get("SLURM_NTASKS_PER_NODE")
        or world
    )
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // here))
    torch.manual_seed(config.seed)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=timedelta(hours=2), verbose=False)
    return dist.get_rank(), dist.get_world_size(), device


def deepspeed_config(config: Train, world: int) -> dict:
    """DeepSpeed's config, derived from the typed keys; raises ValueError for a zero.extra key that contradicts one."""
    recipe, zero = config.recipe, config.zero
    overlap = zero.overlap_comm if zero.overlap_comm is not None else (None if zero.stage == 3 else False)
    own = {"stage": zero.stage} | ({} if overlap is None else {"overlap_comm": overlap})
    for key in zero.extra:
        if key in ("stage", "overlap_comm"):
            raise ValueError(f"zero.extra.{key} contradicts zero.{key}: set zero.{key} instead")
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": schedule.accumulation(
            schedule.batch_at(recipe, 1)[0], config.micro_batch, world
        ),
        "bf16": {"enabled": config.dtype is Dtype.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": recipe.optimizer.clip,
        "zero_optimization": own | zero.extra,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def evaluate(run: Run, model: PreTrainedModel, held_out: Any, step: int, name: str) -> dict:
    """Measure `model` on the run's held-out rows (all ranks call it); write the evaluation row and return it."""
    began = time.time()
    set_penalty(model, None)
    config = run.config
    result: Measurement = measure(
        model, held_out, batch=config.micro_batch, indices=spread(len(held_out), config.evaluate.rows)
    )
    row = {"kind": "evaluation", "model": name, "step": step, "split": "held_out", **asdict(result)}
    row["seconds"] = time.time() - began
    run.log(row)
    run.say(
        f"held out  {name:<12} perplexity {result.perplexity:10.2f}  sparsity {result.sparsity:6.1%}  "
        f"({result.tokens:,} tokens, {row['seconds']:.0f} s)"
    )
    return row


# --- before the loop --------------------------------------------------------------------------------------------------


def _claim(run_dir: Path) -> None:
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"run_dir={run_dir} cannot be written ({error.strerror}): choose a folder that can") from error


def _same_everywhere(text: str, world: int) -> None:
    texts: list[Any] = [None] * world
    dist.all_gather_object(texts, text)
    odd = [rank for rank, other in enumerate(texts) if other != texts[0]]
    if odd:
        raise ValueError(f"the config of rank {odd[0]} is not that of rank 0: start every rank with the same overrides")


def _check_shape(config: Train, base_config: Any) -> None:
    for key, wanted in asdict(config.model.shape).items():
        found = getattr(base_config.get_text_config(), key, None)
        if wanted is not None and wanted != found:
            raise ValueError(
                f"model.shape.{key} is {wanted}, but {config.model.source} has {found}: mend the model's config"
            )


def _identity(config: Train, digests: dict[str, str]) -> dict:
    """What must not change between the parts of one run."""
    whole = asdict(config)
    kept = {key: whole[key] for key in ("model", "recipe", "seed", "dtype")}
    return json.loads(json.dumps(kept | {"zero": {"stage": config.zero.stage}, "data": digests}))


def _resume(engine: Any, config: Train, run_dir: Path, identity: dict) -> TrainState:
    how = config.resume
    newest = None if how == "never" else from_rank_zero(lambda: checkpoint.find(run_dir))
    if how == "never" and from_rank_zero(lambda: any((run_dir / "checkpoints").glob("step-*"))):
        raise ValueError(f"resume=never, but {run_dir} has checkpoints: choose another run_dir or resume=auto")
    if how == "must" and newest is None:
        raise ValueError(f"resume=must, but {run_dir} has no complete checkpoint: check run_dir or use resume=auto")
    folder = newest if how in ("auto", "must", "never") else Path(how).expanduser()
    if folder is None:
        return TrainState()
    found = from_rank_zero(lambda: checkpoint.verify(folder))
    difference = _difference(found["identity"], identity)
    if difference is not None:
        raise ValueError(f"{folder} was trained otherwise: {difference}: use the same settings or another run_dir")
    checkpoint.restore(engine, folder)
    return TrainState(**found["state"])


def _difference(old: Any, new: Any, path: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = (_difference(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in sorted({*old, *new}))
        return next((part for part in parts if part is not None), None)
    return None if old == new else f"{path} was {old} and is now {new}"


def _open_run(config: Train, run_dir: Path, rank: int, world: int, device: torch.device, state: TrainState) -> Run:
    run = Run(config, run_dir, rank, world, device, None, None)
    if rank == 0:
        plain = json.loads(json.dumps(asdict(config)))
        text = yaml.safe_dump(plain | {"versions": _versions()}, sort_keys=False, allow_unicode=True)
        (run_dir / "config.yaml").write_text(text)
        run.metrics = Metrics(run_dir, state.step)
        run.tracker = Tracker(config.tracking, run_dir, plain, state.tracking_id)
        state.tracking_id = run.tracker.id
    return run


def _header(
    run: Run, substitution: Substitution, model: PreTrainedModel, base_config: Any, prepared: dict, state: TrainState
) -> str:
    config, recipe, text = run.config, run.config.recipe, base_config.get_text_config()
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    sequences, context = schedule.batch_at(recipe, 1)
    steps = schedule.accumulation(sequences, config.micro_batch, run.world)
    total = schedule.total_steps(recipe)
    lines = [
        f"model    {config.model.source}: {parameters / 1e6:,.1f} M parameters, {substitution.layers} FFNs of "
        f"{text.intermediate_size} neurons, {substitution.replaced} -> {substitution.activation}, control {recipe.control}",
        f"batch    {sequences} rows x {context} tokens = micro_batch {config.micro_batch} x {run.world} ranks x "
        f"accumulation {steps}; {str(config.dtype)}, ZeRO-{config.zero.stage}, {_device_name(run.device, run.world)}, "
        f"{torch.get_num_threads()} threads a rank",
    ]
    for span in schedule.spans(recipe):
        ends = [schedule.l1_factor(recipe, step) for step in (span.first, span.last)]
        mean = schedule.l1_factor_mean(recipe, span.last, text.intermediate_size)
        lines.append(
            f"stage    {span.name:<13} steps {span.first}-{span.last}  λ {ends[0]:.4g} -> {ends[1]:.4g} "
            f"({mean:.4g} x mean |x1|)  lr {schedule.learning_rate(recipe, span.first):.2g} -> "
            f"{schedule.learning_rate(recipe, span.last):.2g}"
        )
    for length, rows in prepared.items():
        weights = {name: source.weight for name, source in config.data.sources.items()}
        used = sum(
            s.stage.steps * schedule.batch_at(recipe, s.first)[0]
            for s in schedule.spans(recipe)
            if schedule.batch_at(recipe, s.first)[1] == length
        )
        passes = ", ".join(f"{name} {count:.2f}" for name, count in epochs(rows.train, weights, used).items())
        lines.append(
            f"text     context {length}: {used:,} rows, epochs: {passes}; held out {len(rows.held_out):,} rows"
        )
    lines.append(
        f"run      {run.run_dir}, "
        + (f"goes on after step {state.step} of {total}" if state.step else f"{total} steps")
    )
    return "\n".join(lines)


# --- in the loop ------------------------------------------------------------------------------------------------------


def _counts(data: Batch) -> list[int]:
    tokens = data.input_ids.numel() if data.token_mask is None else int(data.token_mask.sum())
    return [labeled(data.labels), tokens]


def _reset(engine: Any) -> None:
    """Forget AdamW's moments; step counts start over."""
    for values in engine.optimizer.optimizer.state.values():
        for value in values.values():
            if torch.is_tensor(value):
                value.zero_()


def _mfu(
    model: PreTrainedModel, base_config: Any, context: int, tokens_per_second: float, world: int, device: torch.device
) -> float | None:
    """Model FLOPs utilization: (6N + 12 · layers · hidden · context) FLOPs a token, no causal halving; None on a CPU."""
    peak = next(
        (p for n, p in PEAK_FLOPS.items() if device.type == "cuda" and n in torch.cuda.get_device_name(device)), None
    )
    if peak is None:
        return None
    text = base_config.get_text_config()
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    if not text.tie_word_embeddings:
        parameters -= text.vocab_size * text.hidden_size
    flops = 6 * parameters + 12 * text.num_hidden_layers * text.hidden_size * context
    return flops * tokens_per_second / (peak * world)


def _memory(device: torch.device) -> int:
    """Peak bytes of this rank: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _skeleton(model: PreTrainedModel, base_config: Any, tokenizer: Any, folder: Path) -> None:
    """Everything of the model but its weights, so that a checkpoint opens by itself."""
    base_config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- after the loop ---------------------------------------------------------------------------------------------------


def _gather(engine: Any, rank: int) -> dict[str, torch.Tensor]:
    """The trained weights on rank 0's CPU, one parameter at a time under ZeRO-3; empty on the other ranks."""
    from deepspeed.runtime.zero import GatheredParameters

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def _report(run_dir: Path, report: dict) -> dict[str, Path]:
    folder = write_report(run_dir, report)
    return {path.stem: path for path in sorted(folder.glob("*.png"))}


def _fairness(control: Control) -> str:
    if control is Control.silu_continued:
        return "control silu_continued: the base's own activation, λ 0, the same rows and learning rate: the fair row to compare with"
    return (
        "the base model has not been trained on this text and the others have: a ratio to it is no measure of what sparsity "
        "costs; recipe.control=silu_continued trains the fair row on the same tokens"
    )


def _point(point: Point) -> str:
    return f"threshold {point.threshold:<10.5g} sparsity {point.sparsity:6.1%}  perplexity {point.perplexity:10.3f}"


def _device_name(device: torch.device, world: int) -> str:
    return f"{world} x {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"{world} CPU rank(s)"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("prosparse", "torch", "deepspeed", "transformers", "datasets", "grain")}


def _close(run: Run, images: dict[str, Path]) -> None:
    if run.tracker is not None:
        run.tracker.finish(images)
