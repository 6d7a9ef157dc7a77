"""The training loop: substitution -> regularization -> shift -> export -> report, resumable at any step.

In: a `Train` config, the same on every rank. Out: a run folder (config.yaml, metrics.jsonl, checkpoints/, model/,
report/) and the report as a dict.
"""

import copy
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from prosparse import checkpoint, schedule
from prosparse.checkpoint import TrainState
from prosparse.config import Checkpointing, Dtype, Train
from prosparse.data import Batch, Prepared, batch, mixture, open_prepared, prepare
from prosparse.exporters.hf import export_hf
from prosparse.ffn import activation_of, set_penalty, substitute
from prosparse.group import agree, from_rank_zero, same_everywhere, start_group
from prosparse.models.formats import released_config
from prosparse.models.load import load_config, load_model, load_tokenizer
from prosparse.penalty import PenaltyContext, mean_abs_by_layer, new_statistics, sparsity_by_layer
from prosparse.reporting import fairness, table, write_report
from prosparse.sparsity import labeled, language_loss, measure, spread
from prosparse.telemetry import (
    Eta,
    Metrics,
    Tracker,
    device_name,
    header,
    mfu,
    peak_memory,
    progress_line,
    read_metrics,
    versions,
)
from prosparse.threshold import shift

DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}
MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class Run:
    """One training run on this rank; only `state` changes after it was opened."""

    config: Train
    folder: Path
    rank: int
    world: int
    device: torch.device
    base_config: PreTrainedConfig  # of the base model, before the substitution
    tokenizer: PreTrainedTokenizerBase
    prepared: dict[int, Prepared]  # by context
    engine: Any  # DeepSpeed's
    own_activation: tuple[str, float]  # the base model's
    activation: tuple[str, float]  # what the recipe trains with
    state: TrainState = field(default_factory=TrainState)
    metrics: Metrics | None = None  # rank 0 only
    tracker: Tracker | None = None  # rank 0 only
    mixtures: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def log(self, row: dict) -> None:
        if self.metrics is not None and self.tracker is not None:
            self.metrics.append(row)
            self.tracker.log(row)

    def rows(self, step: int) -> Any:
        """The mixture that the stage of `step` reads."""
        stage, context = (
            schedule.stage_at(self.config.recipe, step).stage,
            schedule.batch_at(self.config.recipe, step)[1],
        )
        key = json.dumps([stage.data, context])
        if key not in self.mixtures:
            weights = stage.data or {name: source.weight for name, source in self.config.data.sources.items()}
            self.mixtures[key] = mixture(self.prepared[context].train, weights, self.config.seed)
        return self.mixtures[key]

    @property
    def held_out(self) -> Any:
        """Held-out rows of the last stage's context."""
        return self.prepared[
            schedule.batch_at(self.config.recipe, schedule.total_steps(self.config.recipe))[1]
        ].held_out


def train(config: Train) -> dict:
    """Run `config` to its end, or to `config.until`; started again with the same config it goes on.

    Every rank of a launcher's group calls it; without a launcher it is a group of one. Returns the report, or
    {"run_dir", "stopped_at", "step"} if it stopped at a stage. Raises ValueError for what a user can mend, OSError if a
    checkpoint cannot be written.
    """
    run = open_run(config)
    recipe, state, model = config.recipe, run.state, run.engine.module
    total = schedule.total_steps(recipe)
    last = next((span.last for span in schedule.spans(recipe) if span.name == config.until), total)

    # --- before the first step: the base model, and what substitution alone does to it --------------------------------
    if state.step == 0:
        substitute(model, *run.own_activation)
        evaluate(run, model, "base")
        substitute(model, *run.activation)
        if run.activation != run.own_activation:
            evaluate(run, model, "substituted")

    # --- the stages ---------------------------------------------------------------------------------------------------
    neurons = run.base_config.get_text_config().intermediate_size
    layers = run.base_config.get_text_config().num_hidden_layers
    context = PenaltyContext(torch.zeros((), device=run.device), new_statistics(layers, run.device))
    eta, skipped_in_a_row = Eta(), 0
    while state.step < last:
        began, step = time.perf_counter(), state.step + 1
        span = schedule.stage_at(recipe, step)
        if span.stage.reset_optimizer and step == span.first:
            _forget_moments(run.engine)

        # the window: which rows, split into this rank's micro-batches
        first, sequences = schedule.window_rows(recipe, step, state.window)
        starts = range(first + run.rank * config.micro_batch, first + sequences, config.micro_batch * run.world)
        rows = [batch(run.rows(step), range(i, i + config.micro_batch)).to(run.device) for i in starts]
        factor = schedule.l1_factor_mean(recipe, step, neurons)
        window = accumulate(run.engine, context, rows, factor)

        # the step; one that DeepSpeed does not apply uses up its window and does not count
        rate, decay = schedule.learning_rate(recipe, step), schedule.weight_decay(recipe, step)
        for group in run.engine.optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, decay if group["decays"] else 0.0
        run.engine.step()
        state.window += 1
        if not run.engine.was_step_applied():
            state.skipped, skipped_in_a_row = state.skipped + 1, skipped_in_a_row + 1
            run.say(
                f"step {step} not applied, its gradient is not finite: rows {first}-{first + sequences - 1} left out"
            )
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise RuntimeError(f"{skipped_in_a_row} steps in a row were not applied: lower recipe.lr.peak or λ")
            continue
        state.step, state.tokens, skipped_in_a_row = step, state.tokens + window.tokens, 0

        # what it was like
        seconds = time.perf_counter() - began
        eta.update(seconds)
        by_layer, magnitude = sparsity_by_layer(window.statistics), mean_abs_by_layer(window.statistics)
        norm, speed = run.engine.get_global_grad_norm(), window.tokens / seconds
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
            "sparsity": sum(by_layer) / layers,
            "sparsity_by_layer": by_layer,
            "mean_abs_by_layer": magnitude,
            "lr": rate,
            "grad_norm": None if norm is None else float(norm),
            "tokens_per_second": speed,
            "mfu": mfu(model, schedule.batch_at(recipe, step)[1], speed / run.world, run.device),
            "step_seconds": seconds,
            "memory_bytes": peak_memory(run.device),
            "skipped": state.skipped,
        }
        run.log(row)
        run.say(progress_line(row, total, eta.remaining(last - step)))
        if config.evaluate.every and step % config.evaluate.every == 0 and step < total:
            evaluate(run, model, "training")
        if step % config.save.every == 0 or step == span.last:
            save(run)

    if config.until not in (None, "shift"):
        run.say(f"stopped after stage {config.until}, as until={config.until} asks; started without it the run goes on")
        _close(run, {})
        return {"run_dir": str(run.folder), "stopped_at": config.until, "step": state.step}
    del model  # finish frees it
    return finish(run)


@dataclass
class Window:
    """One global batch: mean loss over its labeled tokens, its non-padding tokens, statistics summed over the ranks."""

    loss: float
    tokens: int
    statistics: torch.Tensor  # fp64 [layers, 3]


def accumulate(engine: Any, context: PenaltyContext, micro_batches: list[Batch], factor: float) -> Window:
    """Forward and backward over this rank's micro-batches of one window, up to but without the last `engine.step()`.

    The gradient is that of mean loss over labeled tokens + factor · Σ_layers mean |x1|, both means over the window of
    all ranks, however it is split into micro-batches; the engine's division by the rank count is undone here.
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


# --- the phases around the loop ---------------------------------------------------------------------------------------


def open_run(config: Train) -> Run:
    """Everything before the first step: group, folder, text, model, substitution, engine, state."""
    rank, world, device = start_group(config.device, config.threads, config.seed)
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    transformers_logging.set_verbosity_error()
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    folder, recipe = Path(config.run_dir).expanduser(), config.recipe
    same_everywhere(config)
    ds_config = agree(lambda: deepspeed_config(config, world))
    checkpoint.claim(folder)

    opening: dict = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    text_config = agree(lambda: _check_model(config, load_config(config.model.source, **opening)))
    own = config.data.tokenizer
    tokenizer = agree(lambda: load_tokenizer(own) if own else load_tokenizer(config.model.source, **opening))
    # One rank prepares the text, all of them open it.
    text = (config.data, tokenizer, schedule.contexts(recipe), text_config.vocab_size)
    folders = from_rank_zero(lambda: {length: made.folders for length, made in prepare(*text).items()})
    prepared = agree(lambda: {length: open_prepared(parts) for length, parts in folders.items()})
    load = partial(load_model, config.model.source, dtype=DTYPES[config.dtype], device=device, **opening)
    if config.zero.stage == 3:  # its ranks load together
        model = load(attention=config.attention, zero3=ds_config)
    else:
        model = agree(lambda: load(attention=config.attention))
    base_config, own_activation = copy.deepcopy(model.config), activation_of(model)
    activation = schedule.activation(recipe) or own_activation
    substitution = substitute(model, *activation)
    if config.checkpointing is not Checkpointing.none:
        reentrant = config.checkpointing is Checkpointing.reentrant
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    engine, *_ = deepspeed.initialize(
        model=model.train(), optimizer=_optimizer(config, model), config=ds_config, dist_init_required=False
    )
    run = Run(config, folder, rank, world, device, base_config, tokenizer, prepared, engine, own_activation, activation)
    run.state = _resume(run)

    def begin() -> None:
        plain = json.loads(json.dumps(asdict(config)))
        checkpoint.supersede(folder, run.state.step)
        (folder / "config.yaml").write_text(yaml.safe_dump(plain | {"versions": versions()}, sort_keys=False))
        run.metrics = Metrics(folder, run.state.step or -1)
        run.tracker = Tracker(config.tracking, folder, plain, run.state.tracking_id)
        run.state.tracking_id = run.tracker.id

    from_rank_zero(begin)
    run.say(header(config, model, substitution, prepared, run.state.step, world, device))
    return run


def evaluate(run: Run, model: PreTrainedModel, name: str) -> dict:
    """Measure `model` on the run's held-out rows (all ranks call it); log the evaluation row and return it."""
    began, config = time.time(), run.config
    set_penalty(model, None)
    indices = spread(len(run.held_out), config.evaluate.rows)
    result = measure(model, run.held_out, batch=config.micro_batch, indices=indices)
    row = {"kind": "evaluation", "model": name, "step": run.state.step, "split": "held_out", **asdict(result)}
    row["seconds"] = time.time() - began
    run.log(row)
    run.say(
        f"held out  {name:<12} perplexity {result.perplexity:10.2f}  sparsity {result.sparsity:6.1%}  "
        f"({result.tokens:,} tokens, {row['seconds']:.0f} s)"
    )
    return row


def save(run: Run) -> None:
    """Commit a checkpoint of the run's last step (all ranks call it)."""
    began = time.time()
    record = {
        "identity": _identity(run),
        "activation": dict(zip(("name", "param"), run.activation, strict=True)),
        "versions": versions(),
    }

    def skeleton(folder: Path) -> None:
        """Everything of the model but its weights, so that a checkpoint opens by itself."""
        run.base_config.save_pretrained(folder)
        if run.engine.module.generation_config is not None:
            run.engine.module.generation_config.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)

    folder = checkpoint.save(run.engine, run.folder, run.state, record, skeleton, run.config.save.keep)
    run.say(f"saved {folder} in {time.time() - began:.1f} s")


def finish(run: Run) -> dict:
    """After the last step: shift, export, report (all ranks call it)."""
    config, recipe, state, model = run.config, run.config.recipe, run.state, run.engine.module
    logged = from_rank_zero(lambda: read_metrics(run.folder))
    models = {row["model"]: row for row in logged if row.get("model") in ("base", "substituted")}
    models["trained"] = evaluate(run, model, "trained")
    report: dict[str, Any] = {
        "models": models,
        "tokens_trained": state.tokens,
        "steps": state.step,
        "text": "held-out documents of " + ", ".join(f"{n} ({s.path})" for n, s in config.data.sources.items()),
        "dtype": str(config.dtype),
        "device": device_name(run.device, run.world),
        "command": " ".join(sys.argv),
        "control": str(recipe.control),
        "versions": versions(),
        "notes": [fairness(recipe.control)],
    }
    if "base" not in models:
        report["notes"].append("base and substituted stand in the report of the run that this one went on from")
    if schedule.shifts(recipe):
        unread = sum(schedule.window_rows(recipe, state.step, state.window - 1))
        rows = [run.rows(state.step)[unread + i] for i in range(recipe.shift.calibration_rows)]
        run.say(f"shifting the threshold on the {len(rows)} training rows after those that were read")
        shifted = shift(model, rows, recipe.shift, batch=config.micro_batch, report=lambda p: run.say(str(p)))
        report["shift"] = shifted.to_dict()
        models["shifted"] = evaluate(run, model, "shifted")
    if config.until != "shift":
        activation, generation = activation_of(model), model.generation_config
        weights = checkpoint.gather(run.engine)
        del model
        run.engine.destroy()
        run.engine = None
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        target, dtype = run.folder / "model", DTYPES[config.dtype]
        report["export"] = from_rank_zero(
            lambda: export_hf(weights, run.base_config, *activation, run.tokenizer, generation, target, dtype)
        )
        del weights
        models["exported"] = evaluate(run, load_model(target, dtype=dtype, device=run.device), "exported")
    rows = from_rank_zero(lambda: read_metrics(run.folder))
    report["seconds"] = sum(row.get("step_seconds") or row["seconds"] for row in rows)
    folder = from_rank_zero(lambda: write_report(run.folder, report))
    run.say(f"\n{table(report)}\n\nreport: {folder}")
    if "export" in report:
        run.say(f"model: {run.folder / 'model'}")
    _close(run, {path.stem: path for path in sorted(folder.glob("*.png"))})
    return report


def deepspeed_config(config: Train, world: int) -> dict:
    """DeepSpeed's config, derived from the typed keys; raises ValueError for a zero.extra key that contradicts one."""
    recipe, zero = config.recipe, config.zero
    batches = [schedule.batch_at(recipe, span.first)[0] for span in schedule.spans(recipe)]
    steps = [schedule.accumulation(batch, config.micro_batch, world) for batch in batches]  # every stage has to divide
    overlap = zero.overlap_comm if zero.overlap_comm is not None else (None if zero.stage == 3 else False)
    own = {"stage": zero.stage} | ({} if overlap is None else {"overlap_comm": overlap})
    for key in zero.extra:
        if key in ("stage", "overlap_comm"):
            raise ValueError(f"zero.extra.{key} contradicts zero.{key}: set zero.{key} instead")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**own, **zero.extra)
    except ValueError as error:
        raise ValueError(f"zero.extra: {error}: see DeepSpeed's zero_optimization for its keys") from error
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": steps[0],
        "bf16": {"enabled": config.dtype is Dtype.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": recipe.optimizer.clip,
        "zero_optimization": own | zero.extra,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


# --- parts ------------------------------------------------------------------------------------------------------------


def _check_model(config: Train, whole: PreTrainedConfig) -> Any:
    """The text config of the base model, if it is the one described, takes the context and can be exported."""
    text_config, recipe = whole.get_text_config(), config.recipe
    own = (getattr(text_config, "hidden_act", "silu"), 0.0)
    activation = schedule.activation(recipe) or own
    released_config(whole, *activation)
    if schedule.shifts(recipe):
        released_config(whole, "drelu" if activation[0] == "drelu" else "fatrelu", 1.0)
    longest, limit = schedule.contexts(recipe)[-1], getattr(text_config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(f"recipe.batch.context is {longest}, but {config.model.source} has only {limit} positions")
    for key, wanted in asdict(config.model.shape).items():
        found = getattr(text_config, key, None)
        if wanted is not None and wanted != found:
            raise ValueError(f"model.shape.{key} is {wanted}, but {config.model.source} has {found}: mend one of them")
    return text_config


def _identity(run: Run) -> dict:
    """What must not change between the parts of one run."""
    whole = asdict(run.config)
    kept = {key: whole[key] for key in ("model", "recipe", "seed", "dtype")}
    kept["order of recipe.stages"] = list(whole["recipe"]["stages"])
    kept["data.sources weights"] = {name: source["weight"] for name, source in whole["data"]["sources"].items()}
    kept["digest of the rows"] = {str(length): made.digest for length, made in run.prepared.items()}
    return json.loads(json.dumps(kept | {"zero": {"stage": run.config.zero.stage}}))


def _resume(run: Run) -> TrainState:
    how, folder = run.config.resume, run.folder
    newest = None if how == "never" else from_rank_zero(lambda: checkpoint.find(folder))
    if how == "never" and from_rank_zero(lambda: any((folder / "checkpoints").glob("step-*"))):
        raise ValueError(f"resume=never, but {folder} has checkpoints: choose another run_dir or resume=auto")
    if how == "must" and newest is None:
        raise ValueError(f"resume=must, but {folder} has no complete checkpoint: check run_dir or use resume=auto")
    chosen = newest if how in ("auto", "must", "never") else Path(how).expanduser()
    if chosen is None:
        return TrainState()
    found = from_rank_zero(lambda: checkpoint.read_manifest(chosen))
    difference = checkpoint.difference(found["identity"], _identity(run))
    if difference is not None:
        raise ValueError(f"{chosen} was trained otherwise: {difference}: use the same settings or another run_dir")
    return TrainState(**checkpoint.restore(run.engine, chosen)["state"])


def _optimizer(config: Train, model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW; a group says whether it decays: matrices do, norms and biases do not."""
    settings = config.recipe.optimizer
    groups: tuple[list[Any], list[Any]] = ([], [])
    for parameter in model.parameters():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: partitioned by ZeRO-3
        groups[0 if dimensions >= 2 else 1].append(parameter)
    options: list[dict] = [{"params": group, "decays": group is groups[0]} for group in groups if group]
    return torch.optim.AdamW(
        options,
        lr=config.recipe.lr.peak,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _forget_moments(engine: Any) -> None:
    """Zero AdamW's moments and step counts."""
    for values in engine.optimizer.optimizer.state.values():
        for value in values.values():
            if torch.is_tensor(value):
                value.zero_()


def _counts(data: Batch) -> list[int]:
    """[labeled tokens, non-padding tokens]"""
    return [labeled(data.labels), data.input_ids.numel() if data.token_mask is None else int(data.token_mask.sum())]


def _close(run: Run, images: dict[str, Path]) -> None:
    if run.tracker is not None:
        run.tracker.finish(images)
