"""A run on one rank: opening it, its model, where it goes on from, letting go of it.

In: a `Train` config, the same on every rank. Out: a `Run` whose engine and state are ready for the next step.
"""

import copy
import gc
import json
import shutil
import sys
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from prosparse import chat, checkpoint, schedule, shards, signals
from prosparse.allocation import cut_apart, load_thresholds
from prosparse.checkpoint import Saver, TrainState
from prosparse.config import Distillation, Dtype, Template, Train
from prosparse.data import Prepared, mixture, open_prepared
from prosparse.distillation import Teacher, check_vocabulary
from prosparse.engine import (
    Teaching,
    check_packing,
    deepspeed_config,
    join_deepspeed,
    plain,
    start_engine,
    start_teacher,
    stop_engine,
)
from prosparse.ffn import activation_key, activation_of, substitute
from prosparse.group import agree, from_rank_zero, on_any_rank, patience, shared, start_group
from prosparse.lock import claim, release
from prosparse.models.formats import TRAINED_WITH_BOS, released_config
from prosparse.models.load import load_config, load_model, load_tokenizer
from prosparse.offload import build_operators, check_swap, open_swap, remove_swap
from prosparse.preflight import preflight
from prosparse.preparation import begins_with_bos, prepare, tokenizer_digest, try_cache
from prosparse.signals import Stopped, interruptible
from prosparse.speed import Profiler, described, make_ready, thaw_gc
from prosparse.telemetry import Metrics, Tracker, header, redact, versions, write_atomically
from prosparse.ulysses import RowGroup, check_attention, check_divisible, row_group

DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}
GB = 1e9


@dataclass
class Run:
    """One training run on this rank."""

    config: Train
    folder: Path
    rank: int
    world: int
    device: torch.device
    group: RowGroup  # the ranks that share rows with this one
    tokenizer: PreTrainedTokenizerBase
    prepared: dict[int, Prepared]  # by context
    saver: Saver
    lock: int | None  # rank 0's, of the folder
    engine: Any = None  # DeepSpeed's; None after the export has freed it
    teacher: Teacher | None = None  # while a stage that is still to run distills
    base_config: PreTrainedConfig = None  # type: ignore[assignment]  # of the base model, before the substitution
    own_activation: tuple[str, float] = ("", 0.0)  # the base model's
    activation: tuple[str, float] = ("", 0.0)  # what the recipe trains with
    state: TrainState = field(default_factory=TrainState)
    identity: dict = field(default_factory=dict)  # what must not change between the parts of one run
    origin: str | None = None  # "fork RUN@STAGE" or "resume PATH" that the run descends from
    began_from: Path | None = None  # the checkpoint that this start went on from
    saved_step: int = 0  # of the newest checkpoint, committed or on its way
    evaluated_step: int | None = None  # of the last evaluation during training
    complete: bool = False  # whether the checkpoint on its way is on the disk, on every rank
    rewinds: int = 0
    shifted: dict | None = None  # what the shift did, once it is done
    thresholds: list[torch.Tensor] | None = (
        None  # by layer, where neurons or layers have their own until they are folded
    )
    held: ExitStack = field(default_factory=ExitStack)  # what holds them in the model
    stopped_by: str | None = None  # evaluate.stop, in words
    metrics: Metrics | None = None  # rank 0 only
    tracker: Tracker | None = None  # rank 0 only
    mixtures: dict[str, Any] = field(default_factory=dict)
    profiler: Profiler = field(init=False)

    def __post_init__(self) -> None:
        self.profiler = Profiler(self.config.profile, self.folder, self.rank)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def log(self, row: dict) -> None:
        if self.metrics is not None and self.tracker is not None:
            self.metrics.append(row)
            self.tracker.log(row)

    def poll(self, *_: Any) -> None:
        """Before each micro-batch and evaluation pass, all ranks: raise Stopped on all if one was asked to stop."""
        stop, unwritten = on_any_rank(signals.asked() is not None, not self.saver.ready)
        self.complete = self.saver.pending and not unwritten
        if stop:
            signals.note("another rank was asked")
            raise shared(Stopped(signals.asked()))

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

    def teaching(self, how: Distillation) -> Teaching | None:
        """What a stage that distills learns from."""
        if how.weight == 0:
            return None
        assert self.teacher is not None
        return self.teacher, how

    @property
    def held_out(self) -> Any:
        """Held-out rows of the last stage's context."""
        return self.prepared[
            schedule.batch_at(self.config.recipe, schedule.total_steps(self.config.recipe))[1]
        ].held_out


def join(config: Train) -> tuple[int, int, torch.device, dict]:
    """The process group and its preflight: (rank, ranks, device, what the preflight found)."""
    wait = config.timeouts.join_seconds
    rank, world, device = start_group(config.device, config.threads, config.seed, wait, wait)
    found = preflight(config, device)
    patience(config.timeouts.start_seconds)
    return rank, world, device, found


def only_preflight(config: Train) -> dict:
    """preflight=only: the ranks compare each other, whether the batches divide among them, whether run folder, cache
    and swap files can be written, and whether all see the base model."""
    rank, world, device, found = join(config)
    join_deepspeed(device)
    agree(lambda: deepspeed_config(config, world))
    folder = Path(config.run_dir).expanduser()
    new = from_rank_zero(lambda: [p for p in (folder / "checkpoints", folder, *folder.parents) if not p.exists()])
    release(folder, claim(folder))
    from_rank_zero(lambda: try_cache(config.data.cache))
    if rank == 0:
        for made in new:
            made.rmdir()
    open_swap(config)
    remove_swap(config)
    agree(lambda: _check_model(config, load_config(config.model.source, **_opening(config))))
    return {"run_dir": str(folder), "preflight": found}


def open_run(config: Train) -> Run:
    """Everything before the first step: group, folder, text, model, substitution, engine, state."""
    rank, world, device, _ = join(config)
    warnings.filterwarnings("ignore", ".*(all_gather_into|reduce_scatter)_tensor", FutureWarning)  # DeepSpeed's
    transformers_logging.set_verbosity_error()
    join_deepspeed(device)
    folder = Path(config.run_dir).expanduser()
    agree(lambda: deepspeed_config(config, world))
    build_operators(config)
    lock = claim(folder)
    try:
        open_swap(config)
        return _open_claimed(config, folder, rank, world, device, lock)
    except BaseException as error:
        if rank == 0 and isinstance(error, Stopped):
            (folder / "STOP").unlink(missing_ok=True)
        remove_swap(config)
        release(folder, lock)
        raise


def _open_claimed(config: Train, folder: Path, rank: int, world: int, device: torch.device, lock: int | None) -> Run:
    recipe = config.recipe
    if rank == 0:
        signals.obey(folder / "STOP")
    text_config = agree(lambda: _check_model(config, load_config(config.model.source, **_opening(config))))
    own = config.data.tokenizer
    tokenizer = agree(lambda: load_tokenizer(own) if own else load_tokenizer(config.model.source, **_opening(config)))
    agree(lambda: _check_teacher(config, text_config, tokenizer))
    if config.data.template is not Template.auto:
        template = chat.chat_template(tokenizer, config.data.template, config.data.bos)
        tokenizer.chat_template = template  # which checkpoints and the export carry
    # One rank prepares the text, all of them open it.
    text = (config.data, tokenizer, schedule.contexts(recipe), text_config.vocab_size)
    folders = from_rank_zero(interruptible(lambda: {n: made.folders for n, made in prepare(*text).items()}))
    prepared = agree(lambda: {length: open_prepared(parts) for length, parts in folders.items()})
    group = row_group(config.sequence_parallel)
    run = Run(config, folder, rank, world, device, group, tokenizer, prepared, Saver(folder, config.save), lock)
    substitution = start_model(run)
    check_attention(run.engine.module, group, schedule.contexts(recipe)[0], config.micro_batch)
    run.identity = identity(run)
    run.state = resume(run)
    load_teacher(run)
    if any(source.is_chat for source in config.data.sources.values()):
        check_packing(run.engine.module, config, group)
    run.saved_step = run.state.step
    from_rank_zero(lambda: _check_disk(run))

    def begin() -> None:
        text = yaml.safe_dump(plain(config) | {"versions": versions()}, sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text)
        run.metrics = Metrics(folder, run.state.step or -1)
        run.tracker = Tracker(config.tracking, folder, plain(config), run.state.tracking_id)
        run.state.tracking_id = run.tracker.id

    from_rank_zero(begin)
    read_back(run)
    run.say(header(config, run.engine.module, substitution, prepared, run.state.step, world, device))
    run.say(f"speed    {described(config, device, run.engine.module)}")
    return run


def read_back(run: Run) -> None:
    """What the metrics know beyond the checkpoint: the last evaluation, and the windows of rewinds since."""
    known = from_rank_zero(lambda: (run.metrics.evaluated_step, run.metrics.rewinds) if run.metrics else (None, []))
    run.evaluated_step, rewinds = known
    run.rewinds = len(rewinds)
    run.state.dropped_windows = sorted({*run.state.dropped_windows, *(w for windows in rewinds for w in windows)})


def free_engine(run: Run) -> None:
    """Give back what the engine and its model take in memory and on disk; nobody else may hold a reference to them."""
    if run.teacher is not None and hasattr(run.teacher.model, "destroy"):
        stop_engine(run.teacher.model)
    run.held.close()
    stop_engine(run.engine)
    remove_swap(run.config)
    run.engine = run.teacher = None
    thaw_gc()
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def start_model(run: Run) -> Any:
    """Load the base model, substitute, start the engine; returns the substitution."""
    config = run.config
    ds_config = deepspeed_config(config, run.world)
    model = _load(run, config.model.source, ds_config, base=True)
    run.base_config, run.own_activation = copy.deepcopy(model.config), activation_of(model)
    setattr(run.base_config, TRAINED_WITH_BOS, begins_with_bos(config.data, run.tokenizer))
    run.activation = schedule.activation(config.recipe) or run.own_activation
    substitution = substitute(model, *run.activation)
    make_ready(model, config, run.device)
    check_swap(config, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()))
    run.engine = start_engine(config, model, ds_config)
    return substitution


def load_teacher(run: Run) -> None:
    """Start the teacher if one of the steps that are still to run in this start has one."""
    config = run.config
    if schedule.distills(config.recipe, run.state.step + 1, schedule.last_step(config.recipe, config.until)):
        ds_config = deepspeed_config(config, run.world)
        source = config.model.source if config.teacher is None else config.teacher
        model = _load(run, source, ds_config, base=config.teacher is None)
        start = lambda: start_teacher(model, ds_config)  # noqa: E731
        run.teacher = start() if config.zero.stage == 3 else agree(start)  # the ranks start a sharded one together


def _load(run: Run, source: str, ds_config: dict, base: bool) -> Any:
    """The model in `source`; what model.* says on revision and trust holds for the base model only."""
    config = run.config
    own = _opening(config) | {"trust_pickle": config.model.trust_pickle} if base else {}
    where: Any = {"dtype": DTYPES[config.dtype], "device": run.device, "attention": config.attention}
    load = partial(load_model, source, **where, **own)
    together = config.zero.stage == 3  # each rank then loads its own part, with the others
    return load(zero3=ds_config) if together else agree(interruptible(load))


def close(run: Run) -> None:
    """Let go of what outlives the run."""
    thaw_gc()
    if (trace := run.profiler.end()) is not None:
        run.say(f"profile  {trace}: cut by the end of this start")
    run.saver.close()
    remove_swap(run.config)
    release(run.folder, run.lock)


def _opening(config: Train) -> dict:
    model = config.model
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def _check_model(config: Train, whole: PreTrainedConfig) -> Any:
    """The text config of the base model, if it is the one described, takes the context and can be exported."""
    text_config, recipe = whole.get_text_config(), config.recipe
    own = (getattr(text_config, activation_key(text_config), "silu"), 0.0)
    activation = schedule.activation(recipe) or own
    released_config(whole, *activation)
    if schedule.shifts(recipe):
        released_config(whole, "drelu" if activation[0] == "drelu" else "fatrelu", 1.0)
    check_divisible(text_config, config.sequence_parallel, config.attention, schedule.contexts(recipe)[-1])
    longest, limit = schedule.contexts(recipe)[-1], getattr(text_config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(f"recipe.batch.context is {longest}, but {config.model.source} has only {limit} positions")
    for key, wanted in asdict(config.model.shape).items():
        found = getattr(text_config, key, None)
        if wanted is not None and wanted != found:
            raise ValueError(f"model.shape.{key} is {wanted}, but {config.model.source} has {found}: mend one of them")
    return text_config


def _check_teacher(config: Train, text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError unless the teacher, if it is another model, has the vocabulary of the base model."""
    if config.teacher is not None:
        names = (config.teacher, config.model.source)
        configs = (load_config(config.teacher), text_config)
        check_vocabulary(names, configs, (load_tokenizer(config.teacher), tokenizer))


def checkpoint_bytes(run: Run) -> int:
    """fp32 weights and two moments of every parameter."""
    return 12 * sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())


def _check_disk(run: Run) -> None:
    """ValueError unless the checkpoints that this run keeps fit beside what is on the disk already."""
    recipe, how, size = run.config.recipe, run.config.save, checkpoint_bytes(run)
    kept = checkpoint.checkpoints_kept(
        schedule.total_steps(recipe), [span.last for span in schedule.spans(recipe)], how
    )
    free = shutil.disk_usage(run.folder).free + checkpoint.bytes_used(run.folder)
    run.say(
        f"checkpoints: {size / GB:.2f} GB each, {kept * size / GB:.1f} GB at most at a time, {free / GB:.1f} GB free"
    )
    if kept * size > free:
        raise ValueError(
            f"run_dir={run.folder} has room for {free / GB:.3f} GB of checkpoints, up to {kept} of {size / GB:.3f} GB "
            "are kept: lower save.keep, set save.keep_stages=false, or choose a run_dir on another disk"
        )


def identity(run: Run) -> dict:
    """What must not change between the parts of one run."""
    whole = plain(run.config)
    kept = {key: whole[key] for key in ("model", "recipe", "seed", "dtype")}
    for key in ("trust_remote_code", "trust_pickle"):
        del kept["model"][key]
    for stage in kept["recipe"]["stages"].values():
        if stage["distillation"]["weight"] == 0:  # as in checkpoints from before there was any
            del stage["distillation"]
        else:
            kept["teacher"] = run.config.teacher
    del kept["recipe"]["recover"]  # a stage by now
    if kept["recipe"]["shift"]["granularity"] == "model":  # as in checkpoints from before there was a choice
        del kept["recipe"]["shift"]["granularity"]
    kept["order of recipe.stages"] = list(whole["recipe"]["stages"])
    kept["data.sources weights"] = {name: source["weight"] for name, source in whole["data"]["sources"].items()}
    kept["data.tokenizer"] = tokenizer_digest(run.tokenizer)
    kept["digest of the rows"] = {str(length): made.digest for length, made in run.prepared.items()}
    return kept


def resume(run: Run) -> TrainState:
    """The state to go on from, with the engine filled: a checkpoint's, a fork's, or that of a new run."""
    how, folder, fork = run.config.resume, run.folder, run.config.fork
    if how == "never" and from_rank_zero(lambda: any((folder / "checkpoints").glob("step-*"))):
        raise ValueError(f"resume=never, but {folder} has checkpoints: choose another run_dir or resume=auto")
    found = checkpoint.find_together(folder)
    if how == "must" and found is None:
        raise ValueError(f"resume=must, but {folder} has no complete checkpoint: check run_dir or use resume=auto")
    if found is not None:
        run.origin = found[1]["origin"]
    if how not in ("auto", "must", "never"):
        path, before = Path(how).expanduser(), run.origin
        if (path / "checkpoints").is_dir():
            raise ValueError(f"resume={how} is a run folder: name one of its checkpoints, {how}/checkpoints/step-N")
        run.origin = redact(f"resume {path.resolve()}")
        if before != run.origin:  # else the run has gone on from PATH before, and its own checkpoints are further
            found = path, checkpoint.verify_together(path)
    elif found is not None and fork is not None and run.origin != _fork_origin(fork):
        raise ValueError(f"fork={fork}, but {folder} has a run that began otherwise: choose another run_dir")
    if found is None and fork is not None:
        return _begin_fork(run, fork)
    if found is None:
        return _begin_anew(run)
    chosen, manifest = found
    told = checkpoint.difference(manifest["identity"], run.identity)
    if told is not None:
        raise ValueError(
            f"{chosen} was trained otherwise: {told}: use the same settings or another run_dir"
            + " (fork=RUN@STAGE goes on from the end of a stage with another recipe)"
            * ("recipe" in told.split(" was ")[0])
        )
    return _restore(run, chosen, manifest)


def go_back(run: Run) -> TrainState:
    """The state of the newest checkpoint of this run, else of the one that it began from, with the engine filled."""
    found = checkpoint.find_together(run.folder)
    if found is None or found[1]["origin"] != run.origin:
        origin = run.began_from
        found = None if origin is None else (origin, checkpoint.verify_together(origin))
    return _begin_anew(run) if found is None else _restore(run, *found)


def _fork_origin(fork: str) -> str:
    parent, _, stage = fork.rpartition("@")
    return redact(f"fork {Path(parent).expanduser().resolve()}@{stage}")


def _begin_anew(run: Run) -> TrainState:
    from_rank_zero(lambda: checkpoint.supersede(run.folder, 0))  # damaged ones, in the way of those to come
    hold(run, None, None)
    return TrainState()


def hold(run: Run, shifted: dict | None, thresholds: list[torch.Tensor] | None) -> None:
    """From now on the model has these thresholds, and the run knows what the shift did."""
    run.held.close()
    run.shifted, run.thresholds = shifted, thresholds
    if thresholds is not None:
        run.held.enter_context(cut_apart(run.engine.module, [part.to(run.device) for part in thresholds]))


def _begin_fork(run: Run, fork: str) -> TrainState:
    parent, _, stage = fork.rpartition("@")
    source = Path(parent).expanduser()
    chosen = from_rank_zero(lambda: checkpoint.find_stage(source, stage))
    manifest = checkpoint.verify_together(chosen)
    _check_fork(run, chosen, manifest)
    run.origin = _fork_origin(fork)
    state = _restore(run, chosen, manifest)
    state.tracking_id = None
    history = source / "metrics.jsonl"  # the parent's up to here; whoever opens the file cuts the rest
    from_rank_zero(
        lambda: write_atomically(run.folder / "metrics.jsonl", history.read_text() if history.exists() else "")
    )
    return state


def _restore(run: Run, chosen: Path, manifest: dict) -> TrainState:
    old, new = manifest["versions"], versions()
    for name in ("torch", "deepspeed"):
        if old[name].split(".")[0] != new[name].split(".")[0] and not run.config.accept_versions:
            raise ValueError(
                f"{chosen} was written with {name} {old[name]} and this is {new[name]}: its files do not depend on "
                "that, the digits of the training may: use the old version, or accept_versions=true"
            )
    checkpoint.restore(run.engine, chosen, manifest)
    substitute(run.engine.module, manifest["activation"]["name"], manifest["activation"]["param"])
    hold(run, manifest.get("shift"), load_thresholds(chosen))
    was = (manifest["ranks"], manifest["zero_stage"])
    now = (run.world, run.config.zero.stage)
    change = "" if was == now else f", written by {was[0]} ranks under ZeRO-{was[1]}, with {now[0]} under ZeRO-{now[1]}"
    run.say(f"goes on from {chosen}{change}")
    run.began_from = run.began_from or chosen
    state = TrainState(**manifest["state"])
    fork = run.config.fork
    first_of_fork = fork is not None and run.origin == _fork_origin(fork) and manifest["origin"] != run.origin
    if first_of_fork and not run.config.fork_optimizer:
        shards.forget_moments(run.engine)
    from_rank_zero(lambda: checkpoint.supersede(run.folder, state.step))
    return state


def _check_fork(run: Run, chosen: Path, manifest: dict) -> None:
    """ValueError unless the run's recipe, up to the checkpoint, is what the checkpoint went through."""
    step = manifest["state"]["step"]
    ours = json.loads(json.dumps(schedule.history(run.config.recipe, step)))
    pairs: list[tuple[str, Any, Any]] = [
        (f"recipe.stages.{new['stage']}", old, new) for old, new in zip(manifest["history"], ours, strict=False)
    ]
    known, own = manifest["identity"], run.identity
    later = ["recipe", "order of recipe.stages"] + ["teacher"] * (not schedule.distills(run.config.recipe, 1, step))
    pairs += [(key, known.get(key), own[key]) for key in own if key not in later]
    pairs.append(("the number of stages up to there", len(manifest["history"]), len(ours)))
    for key, old, new in pairs:
        told = checkpoint.difference(old, new, key)
        if told is not None:
            raise ValueError(f"fork={run.config.fork}: {told}: up to the fork ({chosen}) both have to be the same")
