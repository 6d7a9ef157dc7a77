"""What a recipe says at each step: stage, λ, learning rate, rows. Pure functions of a recipe and a step.

In: a `Recipe` and an optimizer step (1-based; only applied steps count). Out: plain numbers.
The schedule is Algorithm 1 of arXiv 2402.13516, with λ allowed to fall as well as to rise.
"""

from dataclasses import asdict, dataclass, replace
from math import cos, pi, sin
from typing import Any

from prosparse.checks import merged_lr
from prosparse.config import (
    L1,
    Control,
    L1Shape,
    Lr,
    LrSchedule,
    PenaltyUnit,
    Recipe,
    Recover,
    Scale,
    Stage,
    StageLr,
)

RECOVER = "recover"  # the stage after the shift


@dataclass(frozen=True)
class Span:
    """A stage with its place in the recipe: steps first..last, both included."""

    name: str
    stage: Stage
    first: int
    last: int


def spans(recipe: Recipe) -> list[Span]:
    """The recipe's stages in order, each with its first and last step."""
    result: list[Span] = []
    for name, stage in recipe.stages.items():
        first = result[-1].last + 1 if result else 1
        result.append(Span(name, stage, first, first + stage.steps - 1))
    return result


def total_steps(recipe: Recipe) -> int:
    return sum(stage.steps for stage in recipe.stages.values())


def last_step(recipe: Recipe, until: str | None) -> int:
    """The last step of a start that stops at `until` (a stage, the shift, or null)."""
    ends = {span.name: span.last for span in spans(recipe)}
    if until == "shift" and RECOVER in ends:
        return ends[RECOVER] - recipe.stages[RECOVER].steps
    return ends.get(until or "", total_steps(recipe))


def distills(recipe: Recipe, first: int, last: int) -> bool:
    """Whether one of the steps first..last has a teacher."""
    return any(s.stage.distillation.weight > 0 and s.first <= last and s.last >= first for s in spans(recipe))


def total_tokens(recipe: Recipe) -> int:
    """The tokens of all steps."""
    batches = [batch_at(recipe, span.first) for span in spans(recipe)]
    return sum(s.stage.steps * rows * context for s, (rows, context) in zip(spans(recipe), batches, strict=True))


def scaled(recipe: Recipe) -> Recipe:
    """The recipe that is run: `recipe.scale` applied (λ, contexts and peak learning rates stay), `recover` a stage."""
    recipe, scale = _with_recover(recipe), recipe.scale

    def smaller(batch: Any) -> Any:
        rows = batch.sequences
        return replace(batch, sequences=None if rows is None else max(1, round(rows * scale.batch)))

    def shorter(lr: Any) -> Any:
        warmup, decay = lr.warmup_steps, lr.decay_steps
        warmup = None if warmup is None else round(warmup * factor)
        return replace(lr, warmup_steps=warmup, decay_steps=None if decay is None else max(1, round(decay * factor)))

    stages = {name: replace(stage, batch=smaller(stage.batch)) for name, stage in recipe.stages.items()}
    small = replace(recipe, batch=smaller(recipe.batch), stages=stages, scale=Scale())
    factor = scale.steps if scale.tokens is None else scale.tokens / total_tokens(small)
    small.stages = {
        name: replace(stage, steps=max(1, round(stage.steps * factor)), lr=shorter(stage.lr))
        for name, stage in stages.items()
    }
    small.lr = shorter(recipe.lr)
    return small


def _with_recover(recipe: Recipe) -> Recipe:
    recover, last = recipe.recover, list(recipe.stages.values())[-1]
    if recover.steps == 0:
        return recipe
    rate = StageLr(LrSchedule.constant, recover.lr, warmup_steps=0)
    stage = replace(last, steps=recover.steps, l1=L1(factor=last.l1.factor), lr=rate, reset_optimizer=True)
    return replace(recipe, stages=recipe.stages | {RECOVER: stage}, recover=Recover())


def stage_at(recipe: Recipe, step: int) -> Span:
    """The stage that `step` belongs to. Raises ValueError if `step` lies outside the recipe."""
    for span in spans(recipe):
        if span.first <= step <= span.last:
            return span
    raise ValueError(f"step {step} lies outside the recipe: it has steps 1 to {total_steps(recipe)}")


def l1_factor(recipe: Recipe, step: int) -> float:
    """Regularization strength λ for the optimizer step `step` (1-based), in the recipe's own penalty unit.

    Constant stages jump to their factor; sine stages rise or fall to it from the previous stage's factor along half a
    period, so that λ and its slope are continuous at both ends (arXiv 2402.13516, Algorithm 1); linear stages go
    straight. Controls: 0 for silu_continued and relu_only; for constant_l1 the recipe's largest factor from the first
    step with λ > 0 on.

    Raises ValueError if `step` lies outside the recipe or in a target stage, whose λ is steered.
    """
    span = stage_at(recipe, step)
    if recipe.control in (Control.silu_continued, Control.relu_only):
        return 0.0
    if span.stage.l1.shape is L1Shape.target:
        raise ValueError(f"λ of stage {span.name} is steered, it is no function of the step")
    if recipe.control is Control.constant_l1:
        start = next((s.first for s in spans(recipe) if s.stage.l1.factor > 0), step + 1)
        return max(stage.l1.factor for stage in recipe.stages.values()) if step >= start else 0.0
    goal = span.stage.l1.factor
    if span.stage.l1.shape is L1Shape.constant:
        return goal
    previous = next((s.stage.l1.factor for s in spans(recipe) if s.last == span.first - 1), 0.0)
    share = (step - span.first + 1) / span.stage.steps
    if span.stage.l1.shape is L1Shape.sine:
        share = _half_sine(share)
    return previous + share * (goal - previous)


def l1_factor_mean(recipe: Recipe, step: int, neurons: int) -> float:
    """λ for `step` in the unit of this project: the factor of Σ_layers mean(|x1|).

    `sum_1e8` factors weigh 1e-8 · Σ|x1| over the m sequences of a micro-batch, so λ_mean = λ · 1e-8 · m · context ·
    neurons, with m = recipe.penalty.micro_batch_sequences.
    """
    return l1_factor(recipe, step) * l1_unit(recipe, step, neurons)


def l1_unit(recipe: Recipe, step: int, neurons: int) -> float:
    """λ_mean of λ = 1 in the recipe's own unit at `step`."""
    penalty = recipe.penalty
    if penalty.unit is PenaltyUnit.mean:
        return 1.0
    assert penalty.micro_batch_sequences is not None
    return 1e-8 * penalty.micro_batch_sequences * batch_at(recipe, step)[1] * neurons


def steered(recipe: Recipe, step: int) -> str | None:
    """The first of the target stages in a row that `step` lies in; None where λ is a function of the step."""
    span = stage_at(recipe, step)
    if recipe.control in (Control.silu_continued, Control.relu_only) or span.stage.l1.shape is not L1Shape.target:
        return None
    before = steered(recipe, span.first - 1) if span.first > 1 else None
    return before or span.name


def set_point(recipe: Recipe, step: int, began: float) -> float:
    """The sparsity that a target stage asks of `step`: along half a sine period from the previous target stage's, or
    from `began`, what it was before the first step, to its own."""
    span = stage_at(recipe, step)
    previous = next((s.stage.l1.sparsity for s in spans(recipe) if s.last == span.first - 1), None)
    start, goal = began if previous is None else previous, span.stage.l1.sparsity
    assert goal is not None
    return start + _half_sine((step - span.first + 1) / span.stage.steps) * (goal - start)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate for the optimizer step `step` (1-based).

    A stage that names any part of `lr` opens a segment, which lasts until the next such stage; the schedule spans the
    segment: linear warm-up, then `constant`; `cosine` to final_ratio · peak over decay_steps (default: the rest of the
    segment); or `wsd`: constant, then linear to final_ratio · peak over the segment's last decay_steps.

    Raises ValueError if `step` lies outside the recipe.
    """
    stage_at(recipe, step)
    lr, first, last = next(s for s in _lr_segments(recipe) if s[1] <= step <= s[2])
    done, length = step - first + 1, last - first + 1
    if done <= lr.warmup_steps:
        return lr.peak * done / lr.warmup_steps
    if lr.schedule is LrSchedule.constant:
        return lr.peak
    if lr.schedule is LrSchedule.cosine:
        decay = lr.decay_steps or max(1, length - lr.warmup_steps)
        share = min(1.0, (done - lr.warmup_steps) / decay)
        return lr.peak * (lr.final_ratio + (1 - lr.final_ratio) * 0.5 * (1 + cos(pi * share)))
    assert lr.decay_steps is not None
    share = max(0.0, 1 - (length - done) / lr.decay_steps)
    return lr.peak * (1 - share * (1 - lr.final_ratio))


def weight_decay(recipe: Recipe, step: int) -> float:
    """Weight decay for `step`: the stage's, or the recipe's."""
    own = stage_at(recipe, step).stage.weight_decay
    return recipe.optimizer.weight_decay if own is None else own


def activation(recipe: Recipe) -> tuple[str, float] | None:
    """(activation, parameter) that the recipe and its control train with; None: the base model's own."""
    if recipe.control is Control.silu_continued:
        return None
    if recipe.control is Control.relu_only:
        return "relu", 0.0
    chosen = recipe.activation
    return str(chosen.name), chosen.offset if chosen.name == "shifted_relu" else chosen.threshold


def shifts(recipe: Recipe) -> bool:
    """Whether the recipe, with its control, ends with a threshold shift."""
    wanted = recipe.shift.threshold is not None or recipe.shift.budget is not None
    return wanted and recipe.control in (Control.none, Control.constant_l1)


def batch_at(recipe: Recipe, step: int) -> tuple[int, int]:
    """(sequences, context) of the window of `step`."""
    own = stage_at(recipe, step).stage.batch
    return own.sequences or recipe.batch.sequences, own.context or recipe.batch.context


def contexts(recipe: Recipe) -> list[int]:
    """Every context length that the recipe names, ascending."""
    return sorted({batch_at(recipe, span.first)[1] for span in spans(recipe)})


def window_rows(recipe: Recipe, step: int, window: int) -> tuple[int, int]:
    """(first row, rows) of the window that trains `step`, as indices into the mixture of the stage's data and context.

    `window` is the number of windows consumed before it; each skipped or dropped one moves the rows on by a whole
    batch. Stages with the same weights and context read on where the last of them stopped, others start a mixture of
    their own.
    """
    span = stage_at(recipe, step)
    key = (span.stage.data, batch_at(recipe, step)[1])
    first = 0
    for other in spans(recipe):
        sequences, context = batch_at(recipe, other.first)
        if (other.stage.data, context) == key:
            first += sequences * max(0, min(other.last, step - 1) - other.first + 1)
    largest = max(batch_at(recipe, other.first)[0] for other in spans(recipe))
    extra = window - (step - 1)
    if extra < 0:
        raise ValueError(f"window {window} cannot train step {step}: {step - 1} windows were applied before it")
    return first + extra * largest, batch_at(recipe, step)[0]


def history(recipe: Recipe, step: int) -> list[dict]:
    """What the steps 1..`step` did, stage by stage; the learning rate apart. Equal histories trained alike."""
    result = []
    for span in spans(recipe):
        if span.first > step:
            break
        last = min(span.last, step)
        sequences, context = batch_at(recipe, span.first)
        result.append(
            {
                "stage": span.name,
                "steps": last - span.first + 1,
                "activation": list(activation(recipe) or ("own", 0.0)),
                "l1_factor": _factors(recipe, span, last),
                "unit": [str(recipe.penalty.unit), recipe.penalty.micro_batch_sequences],
                "sequences": sequences,
                "context": context,
                "data": dict(span.stage.data),
                "weight_decay": weight_decay(recipe, span.first),
                "reset_optimizer": span.stage.reset_optimizer,
            }
        )
        if span.stage.distillation.weight > 0:
            result[-1]["distillation"] = asdict(span.stage.distillation)
    return result


def _factors(recipe: Recipe, span: Span, last: int) -> list[Any]:
    if steered(recipe, span.first):
        return ["steered to a sparsity of", span.stage.l1.sparsity, "by step", span.last]
    return [l1_factor(recipe, n) for n in sorted({span.first, (span.first + last) // 2, last})]


def _half_sine(share: float) -> float:
    return 0.5 * (sin(-pi / 2 + pi * share) + 1)


def accumulation(sequences: int, micro_batch: int, ranks: int) -> int:
    """Micro-batches of one window on each rank.

    Raises ValueError that lists the nearest possible batches if the window does not divide.
    """
    whole = micro_batch * ranks
    if sequences % whole == 0:
        return sequences // whole
    lower, upper = sequences // whole * whole, (sequences // whole + 1) * whole
    batches = " or ".join(str(n) for n in (lower, upper) if n)
    micro = [m for m in range(1, sequences + 1) if sequences % (m * ranks) == 0]
    others = f", or micro_batch={' or '.join(map(str, micro))}" if micro else ""
    raise ValueError(
        f"recipe.batch.sequences is {sequences}, which micro_batch {micro_batch} x {ranks} ranks = {whole} does not "
        f"divide: set recipe.batch.sequences={batches}{others}"
    )


def share(first: int, sequences: int, micro_batch: int, rank: int, ranks: int) -> list[range]:
    """A rank's micro-batches of the rows first .. first + sequences - 1, as row numbers."""
    starts = range(first + rank * micro_batch, first + sequences, micro_batch * ranks)
    return [range(start, start + micro_batch) for start in starts]


def _lr_segments(recipe: Recipe) -> list[tuple[Lr, int, int]]:
    segments: list[tuple[Lr, int, int]] = []
    for span in spans(recipe):
        if span.stage.lr != StageLr() or not segments:
            segments.append((merged_lr(recipe.lr, span.stage.lr), span.first, span.last))
        else:
            lr, first, _ = segments[-1]
            segments[-1] = (lr, first, span.last)
    return segments
