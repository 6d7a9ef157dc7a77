"""The training loop: substitution -> regularization -> shift -> export -> report, resumable at any step.

In: a `Train` config, the same on every rank. Out: a run folder (config.yaml, metrics.jsonl, checkpoints/, model/,
report/) and the report as a dict.
"""

import json
import time
from dataclasses import replace
from itertools import count, islice
from math import isfinite
from pathlib import Path

import torch

from prosparse import controller, guard, schedule, shards
from prosparse.allocation import save_thresholds
from prosparse.config import OnSpike, Preflight, Train
from prosparse.data import batch
from prosparse.ending import end_training, evaluate, finish
from prosparse.engine import ONEDNN, accumulate, diagnose, less_memory, out_of_memory, set_rate
from prosparse.ffn import activation_of, neurons, substitute
from prosparse.group import from_rank_zero, on_any_rank, patience, rank_and_world, shared, waiting
from prosparse.offload import swap_folder
from prosparse.penalty import PenaltyContext, mean_abs_by_layer, new_statistics, sparsity_by_layer
from prosparse.run import (
    GB,
    Run,
    checkpoint_bytes,
    close,
    free_engine,
    go_back,
    load_teacher,
    only_preflight,
    open_run,
    start_model,
)
from prosparse.signals import Stopped
from prosparse.sparsity import measure
from prosparse.speed import Ahead, settle
from prosparse.tasks import check_stop_rule, evaluate_tasks, judge
from prosparse.telemetry import (
    Eta,
    Metrics,
    mfu,
    peak_memory,
    progress_line,
    versions,
)


def train(config: Train) -> dict:
    """Run `config` to its end, or to `config.until`; started again with the same config it goes on.

    Every rank of a launcher's group calls it; without a launcher it is a group of one. Returns the report, or
    {"run_dir", "stopped_at", "step"} if it stopped at a stage, with "stopped_by" if evaluate.stop ended it there, or
    {"run_dir", "preflight"} with preflight=only.
    Raises ValueError for what a user can mend, OSError if a checkpoint cannot be written, RuntimeError for faults of
    the numbers, and Stopped, after it has saved, if it was asked to stop.
    """
    config = replace(config, recipe=schedule.scaled(config.recipe))
    if config.preflight is Preflight.only:
        return only_preflight(config)
    try:
        return _train(config)
    except Exception as error:
        if not out_of_memory(error):
            raise
        (rank, world), told = rank_and_world(), getattr(error, "shared", False)
        where = "a rank" if told else f"rank {rank}"
        said = f" (oneDNN: {ONEDNN})" if ONEDNN in str(error) else ""
        mended = ValueError(f"{where} ran out of memory{said}: {less_memory(config, world)}")
        raise (shared(mended) if told else mended) from error


def _train(config: Train) -> dict:
    run = open_run(config)
    try:
        first_evaluations(run)
        while not train_stages(run):
            rewind(run)
        if run.stopped_by is not None or config.until not in (None, "shift"):
            if run.tracker is not None:
                run.tracker.finish()
            stage, why = schedule.stage_at(config.recipe, run.state.step).name, run.stopped_by
            asked = f": {why}; with evaluate.stop.metric=null" if why else f", as until={stage} asks; without it"
            run.say(f"stopped after stage {stage}{asked} the run goes on")
            said = {"run_dir": str(run.folder), "stopped_at": stage, "step": run.state.step}
            return said | ({"stopped_by": why} if why else {})
        return finish(run)
    except Stopped as stopped:
        stop(run, stopped)
        raise
    finally:
        close(run)


def first_evaluations(run: Run) -> None:
    """Before the first step: the base model, and what substitution alone does to it."""
    if run.state.step == 0:
        model = run.engine.module
        substitute(model, *run.own_activation)
        evaluate(run, "base")
        evaluate_tasks(run, "base")
        substitute(model, *run.activation)
        if run.activation != run.own_activation:
            evaluate(run, "substituted")
    check_stop_rule(run)


def train_stages(run: Run) -> bool:
    """The steps up to `until` or the recipe's end; False if a loss spike asks for a rewind."""
    config, recipe, state, model = run.config, run.config.recipe, run.state, run.engine.module
    total = schedule.total_steps(recipe)
    last = schedule.last_step(recipe, config.until)
    width = neurons(run.base_config)
    layers = run.base_config.get_text_config().num_hidden_layers
    context = PenaltyContext(torch.zeros((), device=run.device), new_statistics(layers, run.device))
    eta, skipped_in_a_row, told_volume, settled = Eta(), 0, False, False
    ahead = Ahead(config.speed)
    if judge(run):  # the end of a stage, whose tasks an earlier start may not have come to
        return True
    while state.step < last:
        # --- what became due between the steps ------------------------------------------------------------------------
        if run.complete:
            commit(run)
        if (
            config.evaluate.every
            and state.step % config.evaluate.every == 0
            and state.step not in (0, run.evaluated_step)
        ):
            evaluate(run, "training")
            run.evaluated_step = state.step
        step = state.step + 1
        span, chain = schedule.stage_at(recipe, step), schedule.steered(recipe, step)
        if chain is not None and state.controller.get("stage") != chain:
            state.controller = start_steering(run, context, chain)
        if span.name == schedule.RECOVER and run.shifted is None:
            end_training(run)
        began = time.perf_counter()
        if span.stage.reset_optimizer and step == span.first:
            shards.forget_moments(run.engine)
        while state.window in state.dropped_windows:
            state.window += 1

        # --- the window: which rows, split into this rank's micro-batches ---------------------------------------------
        first, sequences = schedule.window_rows(recipe, step, state.window)
        numbers = share_of(run, first, sequences)
        next_one = min(step + 1, total)
        following = (run.rows(next_one), share_of(run, *schedule.window_rows(recipe, next_one, state.window + 1)))
        rows = ahead.rows(run.rows(step), numbers, following if step < last else None)
        run.profiler.before(step)
        teaching, goal = run.teaching(span.stage.distillation), None
        factor = controller.factor(state.controller) if chain else schedule.l1_factor_mean(recipe, step, width)
        window = accumulate(run.engine, context, rows, factor, run.poll, teaching, config.speed, run.group)
        if config.guard.on_spike is not OnSpike.none:
            away = guard.deviations(state.guard, window.loss, config.guard)
            if away is not None and isfinite(window.loss) and away > config.guard.deviations:
                text = f"step {step}: loss {window.loss:.3f} is {away:.1f} standard deviations above its mean"
                run.say(f"{text} (rows {first}-{first + sequences - 1})")
                if config.guard.on_spike is OnSpike.rewind:
                    return False

        # --- the step; one that is not applied uses up its window and does not count ----------------------------------
        rate = schedule.learning_rate(recipe, step)
        set_rate(run.engine, rate, schedule.weight_decay(recipe, step))
        run.engine.step()
        state.window += 1
        if not run.engine.was_step_applied():
            state.skipped, skipped_in_a_row = state.skipped + 1, skipped_in_a_row + 1
            left_out = f"rows {first}-{first + sequences - 1} left out"
            run.say(f"step {step} not applied, its loss or gradient is not finite: {left_out}")
            if skipped_in_a_row == config.guard.skipped_in_a_row:
                places = diagnose(run.engine, context, rows, numbers, factor, teaching, config.speed, run.group)
                raise shared(
                    RuntimeError(
                        f"{skipped_in_a_row} windows in a row were not finite, the last at {places}. If all "
                        "start in one place look at those rows; else lower recipe.lr.peak or λ and go on from the last "
                        "checkpoint"
                    )
                )
            continue
        if not settled:
            settle(config.speed, run.device)
            settled = True
        state.step, state.tokens, skipped_in_a_row = step, state.tokens + window.tokens, 0
        guard.remember(state.guard, window.loss, config.guard)
        patience(config.timeouts.steady_seconds)

        if (trace := run.profiler.after(step)) is not None:
            run.say(f"profile  {trace}: open it at https://ui.perfetto.dev")

        # --- what it was like -----------------------------------------------------------------------------------------
        seconds = time.perf_counter() - began
        eta.update(seconds)
        by_layer, magnitude = sparsity_by_layer(window.statistics), mean_abs_by_layer(window.statistics)
        sparsity = sum(by_layer) / layers
        if chain is not None:
            goal = schedule.set_point(recipe, step, state.controller["from"])
            controller.observe(state.controller, sparsity, goal, span.stage.steps)
        norm, speed = run.engine.get_global_grad_norm(), window.tokens / seconds
        row = {
            "kind": "train",
            "step": step,
            "window": state.window,
            "stage": span.name,
            "tokens": state.tokens,
            "loss": window.loss,
            "kl": window.kl,
            "l1": factor * sum(magnitude),
            "l1_factor": factor / schedule.l1_unit(recipe, step, width) if chain else schedule.l1_factor(recipe, step),
            "l1_factor_mean": factor,
            "sparsity": sparsity,
            "target": goal,
            "controller": {key: state.controller[key] for key in ("smoothed", "error", "slope")} if chain else None,
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
        if not told_volume and (one := eta.remaining(1)) is not None:
            told_volume = True
            daily = min(86400 / one, last) / config.save.every * checkpoint_bytes(run) / GB
            run.say(f"checkpoints: at this speed about {daily:,.1f} GB are written a day")
        if step % config.save.every == 0 or step == span.last:
            save(run)
        if step == span.last and judge(run):
            return True
    return True


# --- the phases around the loop ---------------------------------------------------------------------------------------


def share_of(run: Run, first: int, sequences: int) -> list[range]:
    """This rank's micro-batches of the rows first .. first + sequences - 1, as row numbers."""
    group = run.group
    return schedule.share(first, sequences, run.config.micro_batch, group.number, group.groups)


def start_steering(run: Run, context: PenaltyContext, chain: str) -> dict:
    """What the control of λ remembers before the first step of a target stage (all ranks call it).

    Its first λ is the one with which sparsity would rise as fast as the set-point does on average: from a sweep of a
    few steps with each of some λ, all with the same rows, every one of which is taken back. The state of the engine
    lies in host memory meanwhile, or beside the swap files; a stop in between loses nothing, since the stage before has
    its checkpoint.
    """
    began = time.perf_counter()
    recipe, state, engine, step = run.config.recipe, run.state, run.engine, run.state.step + 1
    span, width, mixture = schedule.stage_at(recipe, step), neurons(run.base_config), run.rows(step)
    teaching = run.teaching(span.stage.distillation)
    steps = min(controller.SWEEP_STEPS, span.stage.steps)
    left = (window for window in count(state.window) if window not in state.dropped_windows)
    *trained, measured = [schedule.window_rows(recipe, step, window) for window in islice(left, steps + 1)]
    where = swap_folder(run.config)
    kept, adam_steps = [shards.copies(piece, where) for piece in shards.pieces(engine)], shards.adam_steps(engine)

    def sparsity() -> float:
        """On the rows of the window after those steps."""
        first, sequences = measured
        indices = range(first, first + sequences)
        return measure(
            engine.module, mixture, batch=run.config.micro_batch, indices=indices, progress=run.poll, group=run.group
        ).sparsity

    def after(factor: float) -> float:
        for number, rows in enumerate(trained):
            data = [batch(mixture, share) for share in share_of(run, *rows)]
            accumulate(engine, context, data, factor, run.poll, teaching, run.config.speed, run.group)
            rate = schedule.learning_rate(recipe, step + number)
            set_rate(engine, rate, schedule.weight_decay(recipe, step))
            engine.step()
            if not engine.was_step_applied():
                run.say("sweep    a step was not applied, its loss or gradient is not finite")
        result = sparsity()
        for piece, copies in zip(shards.pieces(engine, change=True), kept, strict=True):
            shards.put_back(piece, copies)
        shards.set_adam_steps(engine, adam_steps)
        shards.refresh(engine)
        return result

    before, goal = sparsity(), span.stage.l1.sparsity
    assert goal is not None
    needed, probes = (goal - before) * steps / span.stage.steps, []
    for factor in controller.SWEEP:
        probes.append((factor, after(factor)))
        run.say(f"sweep    λ {factor:<8.4g} sparsity {before:.2%} -> {probes[-1][1]:.2%} in {steps} steps, taken back")
        if len(probes) > 1 and probes[-1][1] - before >= needed:
            break
    chosen, slope = controller.estimate(before, probes, needed, steps)
    unit = schedule.l1_unit(recipe, step, width)
    run.say(f"sweep    {needed:+.2%} wanted: steering starts at λ {chosen / unit:.4g} ({chosen:.4g} x mean |x1|)")
    row = {"kind": "sweep", "step": step, "before": before, "probes": probes, "l1_factor_mean": chosen}
    run.log(row | {"seconds": time.perf_counter() - began})
    return controller.begin(chain, before, chosen, slope)


def save(run: Run) -> None:
    """Write a checkpoint of the run's last step (all ranks call it); `commit` makes it visible.

    That of a stage's end, with which a start may end too, is committed at once.
    """
    config, state, engine = run.config, run.state, run.engine
    began = time.perf_counter()
    if run.saver.pending:
        commit(run)
    if run.saved_step == state.step:
        return
    span = schedule.stage_at(config.recipe, state.step)
    record = {
        "identity": run.identity,
        "origin": run.origin,
        "history": json.loads(json.dumps(schedule.history(config.recipe, state.step))),
        "stage_end": span.name if state.step == span.last else None,
        "zero_stage": config.zero.stage,
        "activation": dict(zip(("name", "param"), activation_of(engine.module), strict=True)),
        "shift": run.shifted,
        "versions": versions(),
    }
    base_config, tokenizer, generation = run.base_config, run.tokenizer, engine.module.generation_config

    def skeleton(folder: Path) -> None:
        """What, beside the weights, opens the checkpoint as a model: the base's config and the tokenizer."""
        base_config.save_pretrained(folder)
        if generation is not None:
            generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if run.thresholds is not None:
            save_thresholds(run.thresholds, folder)

    with waiting(config.timeouts.start_seconds):
        run.saver.begin(engine, state, record, skeleton, began)
        on_any_rank(False)  # the slowest writer
    run.saved_step = state.step
    if state.step == span.last:
        commit(run)


def commit(run: Run) -> None:
    """Make the checkpoint on its way visible (all ranks call it)."""
    with waiting(run.config.timeouts.start_seconds):
        saved = run.saver.commit()
    run.complete = False
    blocked, size = saved.blocked_seconds, saved.bytes
    step = int(saved.folder.name[5:])
    run.log({"kind": "save", "step": step, "blocked_seconds": blocked, "write_seconds": saved.seconds, "bytes": size})
    run.say(f"saved {saved.folder}: {size / GB:.2f} GB, training waited {blocked:.1f} s of {saved.seconds:.1f} s")


def stop(run: Run, stopped: Stopped) -> None:
    """Save the last applied step and let all ranks meet (all ranks call it); the half-done window is dropped."""
    patience(run.config.timeouts.start_seconds)
    if run.engine is not None:
        run.say(f"asked to stop ({stopped}): saving step {run.state.step}")
        save(run)
    if run.saver.pending:
        commit(run)
    from_rank_zero(lambda: (run.folder / "STOP").unlink(missing_ok=True))
    if run.tracker is not None:
        run.tracker.finish()
    run.say(f"stopped after step {run.saved_step}: start it again with the same settings and it goes on")


def rewind(run: Run) -> None:
    """Go back to the last checkpoint and leave out the window whose loss spiked and the one before it, which may have
    caused it (all ranks call it). RuntimeError after guard.rewinds of them."""
    spiked, limit = run.state, run.config.guard.rewinds
    if run.rewinds == limit:
        text = f"the loss spiked again after {limit} rewinds: lower recipe.lr.peak or λ, or raise guard.deviations"
        raise shared(RuntimeError(text))
    patience(run.config.timeouts.start_seconds)
    if run.saver.pending:
        commit(run)
    free_engine(run)
    start_model(run)
    run.state = go_back(run)
    load_teacher(run)
    bad = {window for window in (spiked.window - 1, spiked.window) if window >= run.state.window}
    run.state.dropped_windows = sorted({*spiked.dropped_windows, *bad})
    run.state.tracking_id = spiked.tracking_id
    run.saved_step = run.evaluated_step = run.state.step  # what was due there was done before the step after it
    run.rewinds += 1
    run.say(f"back to step {run.state.step}; windows {sorted(bad)} are left out")
    if run.rank == 0:
        run.metrics = Metrics(run.folder, run.state.step)
    # A later start, too, leaves out the windows of these rows.
    run.log({"kind": "rewind", "step": run.state.step, "from_step": spiked.step, "windows": sorted(bad)})
