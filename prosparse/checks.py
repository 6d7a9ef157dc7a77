"""What must be true across the keys of a recipe and of `train`; verb_checks.py has the other verbs.

In: a `Recipe`, a `Train` or a part of one. Out: nothing, or ValueError that names the key and the remedy.
"""

import re
from dataclasses import fields, replace
from importlib.resources import files
from math import isfinite

from prosparse.config import (
    L1,
    Activation,
    Compile,
    Control,
    Evaluate,
    Granularity,
    Guard,
    L1Shape,
    Lr,
    LrSchedule,
    Offload,
    PenaltyUnit,
    Recipe,
    Shift,
    StageLr,
    Tasks,
    Train,
)

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
SHARED_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3")  # which are causal without a mask


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def validate_recipe(recipe: Recipe) -> None:
    """The checks of a recipe alone; raises ValueError."""
    require(len(recipe.stages) > 0, "recipe.stages is empty: a recipe needs at least one stage")
    require(
        "shift" not in recipe.stages, "recipe.stages.shift: the name is taken by the shift; call the stage otherwise"
    )
    for name, stage in recipe.stages.items():
        key = f"recipe.stages.{name}"
        require(stage.steps >= 1, f"{key}.steps is {stage.steps}: a stage needs at least one step")
        require(
            isfinite(stage.l1.factor) and stage.l1.factor >= 0,
            f"{key}.l1.factor is {stage.l1.factor}: give a finite number, 0 or larger",
        )
        _validate_l1(recipe, name, stage.l1)
        for part in ("sequences", "context"):
            value = getattr(stage.batch, part)
            require(
                value is None or value >= (2 if part == "context" else 1), f"{key}.batch.{part} is {value}: too small"
            )
        _validate_weights(stage.data, f"{key}.data")
        weight, temperature = stage.distillation.weight, stage.distillation.temperature
        require(
            isfinite(weight) and weight >= 0,
            f"{key}.distillation.weight is {weight}: give a finite number, 0 or larger",
        )
        require(
            isfinite(temperature) and temperature > 0,
            f"{key}.distillation.temperature is {temperature}: give a positive number",
        )
    _validate_control(recipe)
    first = next(iter(recipe.stages))
    require(
        not recipe.stages[first].reset_optimizer,
        f"recipe.stages.{first}.reset_optimizer is true, but the first stage starts with a new optimizer anyway",
    )
    require(recipe.batch.sequences >= 1, f"recipe.batch.sequences is {recipe.batch.sequences}: give at least 1")
    require(recipe.batch.context >= 2, f"recipe.batch.context is {recipe.batch.context}: a row needs at least 2 tokens")
    _validate_activation(recipe.activation)
    validate_shift(recipe.shift, "recipe.shift.")
    shifts = recipe.shift.threshold is not None or recipe.shift.budget is not None
    require(
        not shifts or recipe.activation.name in ("relu", "fatrelu", "drelu"),
        f"recipe.shift needs relu, fatrelu or drelu, not {recipe.activation.name}: choose shift@recipe.shift=none",
    )
    require(
        recipe.shift.threshold is None or recipe.shift.threshold >= recipe.activation.threshold,
        f"recipe.shift.threshold is {recipe.shift.threshold}, below recipe.activation.threshold "
        f"{recipe.activation.threshold} that the model trains with: raise it",
    )
    steps, rate = recipe.recover.steps, recipe.recover.lr
    require(steps >= 0, f"recipe.recover.steps is {steps}: give 0 or more")
    if steps > 0:
        require(
            shifts, "recipe.recover trains after the shift, and this recipe has none: give shift@recipe.shift=budget"
        )
        require("recover" not in recipe.stages, "recipe.stages.recover: the name is taken by recipe.recover")
        require(
            rate is not None and isfinite(rate) and rate > 0,
            f"recipe.recover.lr is {rate}: give the learning rate of its steps, e.g. that of the last stage's end",
        )
    if recipe.penalty.unit is PenaltyUnit.sum_1e8:
        m = recipe.penalty.micro_batch_sequences
        require(
            m is not None and m >= 1,
            "recipe.penalty.micro_batch_sequences is needed with recipe.penalty.unit=sum_1e8: the number of sequences "
            "whose activations the published factor summed over",
        )
    else:
        require(
            recipe.penalty.micro_batch_sequences is None,
            "recipe.penalty.micro_batch_sequences only means something with recipe.penalty.unit=sum_1e8: remove it",
        )
    _validate_lr(recipe.lr, "recipe.lr")
    for name, stage in recipe.stages.items():
        _validate_lr(merged_lr(recipe.lr, stage.lr), f"recipe.stages.{name}.lr")
        decay = stage.weight_decay
        require(decay is None or decay >= 0, f"recipe.stages.{name}.weight_decay is {decay}: give 0 or larger")
    scale = recipe.scale
    require(scale.steps > 0, f"recipe.scale.steps is {scale.steps}: give a positive factor")
    require(scale.batch > 0, f"recipe.scale.batch is {scale.batch}: give a positive factor")
    require(scale.tokens is None or scale.tokens > 0, f"recipe.scale.tokens is {scale.tokens}: give a positive number")
    require(
        scale.tokens is None or scale.steps == 1, "recipe.scale.tokens and recipe.scale.steps are both given: keep one"
    )
    adamw = recipe.optimizer
    require(
        len(adamw.betas) == 2 and all(0 <= beta < 1 for beta in adamw.betas),
        f"recipe.optimizer.betas is {adamw.betas}: give two numbers from 0 to below 1",
    )
    require(adamw.eps > 0, f"recipe.optimizer.eps is {adamw.eps}: give a positive number")
    require(adamw.weight_decay >= 0, f"recipe.optimizer.weight_decay is {adamw.weight_decay}: give 0 or larger")
    require(recipe.optimizer.clip > 0, f"recipe.optimizer.clip is {recipe.optimizer.clip}: give a positive norm")


def _validate_l1(recipe: Recipe, name: str, l1: L1) -> None:
    key, names = f"recipe.stages.{name}.l1", list(recipe.stages)
    before = recipe.stages[names[names.index(name) - 1]].l1.shape if name != names[0] else None
    target = l1.shape is L1Shape.target
    require(
        target == (l1.sparsity is not None),
        f"{key}.sparsity is {l1.sparsity} and {key}.shape is {l1.shape}: a target stage has a sparsity, others do not",
    )
    require(
        l1.sparsity is None or 0 < l1.sparsity < 1,
        f"{key}.sparsity is {l1.sparsity}: give a share between 0 and 1, e.g. 0.89",
    )
    require(
        not target or l1.factor == 0, f"{key}.factor is {l1.factor}, but λ of a target stage is steered: set it to 0"
    )
    require(
        before is not L1Shape.target or l1.shape not in (L1Shape.sine, L1Shape.linear),
        f"{key}.shape is {l1.shape} right after a target stage, whose last λ nobody knows beforehand: choose constant "
        "or target",
    )
    require(
        before is not L1Shape.target or l1.shape is not L1Shape.constant or l1.factor > 0,
        f"{key}.factor is {l1.factor} right after a target stage: λ would drop to 0; give a factor, or keep the "
        f"sparsity with stage@recipe.stages.{name}=target",
    )
    require(
        not target or recipe.activation.name != "silu",
        f"{key}.shape is target, but silu has no zeros: choose another recipe.activation",
    )
    require(
        not target or recipe.control is not Control.constant_l1,
        f"recipe.control=constant_l1 holds the recipe's largest λ, but that of {key} is steered: compare with "
        "silu_continued or relu_only",
    )


def _validate_control(recipe: Recipe) -> None:
    """A control that has nothing to take out would be compared with itself."""
    if any(stage.l1.factor > 0 or stage.l1.shape is L1Shape.target for stage in recipe.stages.values()):
        return
    require(
        recipe.control is not Control.constant_l1,
        "recipe.control=constant_l1 holds the recipe's largest λ, but no stage has one: compare with silu_continued"
        + (" or relu_only" if recipe.activation.name != "relu" else ""),
    )
    require(
        recipe.control is not Control.relu_only
        or recipe.activation.name != "relu"
        or (recipe.shift.threshold or recipe.shift.budget) is not None,
        "recipe.control=relu_only is this recipe itself, ReLU without λ and shift: compare with silu_continued",
    )


def validate_train(config: Train) -> None:
    sources = config.data.sources
    require(len(sources) > 0, "data.sources is empty: name at least one text source")
    _validate_weights({name: source.weight for name, source in sources.items()}, "data.sources", ".weight")
    for name, source in sources.items():
        require(
            (source.prompt is None) == (source.answer is None),
            f"data.sources.{name}.prompt and .answer belong together: give both columns, or neither",
        )
        require(
            source.messages is None or source.prompt is None,
            f"data.sources.{name}.messages and .prompt are both given: keep messages, or prompt and answer",
        )
    chats = {name for name, source in sources.items() if source.is_chat}
    for name, stage in config.recipe.stages.items():
        require(
            bool(stage.data) or len(chats) in (0, len(sources)),
            f"recipe.stages.{name}.data is empty, so the stage would mix all of data.sources, and conversations "
            f"({', '.join(sorted(chats))}) are among them: name the sources that it reads, with their weights",
        )
        for wanted in stage.data:
            if wanted not in sources:
                raise ValueError(
                    f"recipe.stages.{name}.data.{wanted}: no such source; data.sources has {', '.join(sources)}: add "
                    f"it there{_shipped_with(config.recipe)}, or change the stage's data"
                )
    require(
        config.teacher is None or any(stage.distillation.weight > 0 for stage in config.recipe.stages.values()),
        f"teacher={config.teacher}, but no stage distills: set recipe.stages.NAME.distillation.weight, or teacher=null",
    )
    require(0 < config.data.held_out < 1, f"data.held_out is {config.data.held_out}: give a share between 0 and 1")
    require(config.data.processes >= 1, f"data.processes is {config.data.processes}: give at least 1")
    require(config.micro_batch >= 1, f"micro_batch is {config.micro_batch}: give at least 1")
    _validate_sequences(config)
    require(config.zero.stage in (1, 2, 3), f"zero.stage is {config.zero.stage}: choose 1, 2 or 3")
    _validate_offload(config)
    require(config.save.keep >= 2, f"save.keep is {config.save.keep}: at least 2 complete checkpoints are kept")
    require(config.save.every >= 1, f"save.every is {config.save.every}: give at least 1")
    every = config.save.keep_every
    require(every is None or every >= 1, f"save.keep_every is {every}: give at least 1, or null")
    _validate_guard(config.guard)
    require(
        config.speed.compile is Compile.none or config.zero.stage < 3,
        "speed.compile is layers, which ZeRO-3's partitioned weights do not bear: set speed.compile=none or zero=zero2",
    )
    for name, value, least in (("first", config.profile.first, 1), ("steps", config.profile.steps, 0)):
        require(value >= least, f"profile.{name} is {value}: give at least {least}")
    for name, seconds in vars(config.timeouts).items():
        require(seconds >= 1, f"timeouts.{name} is {seconds}: give at least 1")
    if config.fork is not None:
        parent, at, end = config.fork.rpartition("@")
        require(bool(parent and at), f"fork={config.fork}: write RUN@STAGE, a run folder and one of its stages")
        require(
            end in config.recipe.stages,
            f"fork={config.fork}: the recipe has no stage {end}; choose {', '.join(config.recipe.stages)}",
        )
    require(config.evaluate.rows >= 1, f"evaluate.rows is {config.evaluate.rows}: give at least 1")
    require(config.evaluate.every >= 0, f"evaluate.every is {config.evaluate.every}: give 0 or more")
    validate_tasks(config.evaluate, "evaluate.")
    _validate_stop(config.evaluate)
    require(config.threads is None or config.threads >= 1, f"threads is {config.threads}: give at least 1, or null")
    validate_device(config.device)
    require(config.attention in ATTENTION, f"attention is {config.attention}: choose {', '.join(ATTENTION)}")
    names = [*config.recipe.stages, "shift"] + ["recover"] * (config.recipe.recover.steps > 0)
    require(
        config.zero.stage < 3 or config.recipe.shift.granularity is Granularity.model,
        f"recipe.shift.granularity is {config.recipe.shift.granularity}, which needs whole weights on every rank: set "
        "zero=zero2, or end with shift@recipe.shift=none and run `prosparse shift` on the model",
    )
    require(
        config.until is None or config.until in names, f"until={config.until}: no such stage; choose {', '.join(names)}"
    )


def _validate_sequences(config: Train) -> None:
    size = config.sequence_parallel
    require(size >= 1, f"sequence_parallel is {size}: give at least 1")
    if size == 1:
        return
    recipe = config.recipe
    for context in {stage.batch.context or recipe.batch.context for stage in recipe.stages.values()}:
        require(
            context % size == 0,
            f"sequence_parallel is {size}, which does not divide a context of {context} tokens: choose another context",
        )
    require(
        config.attention in SHARED_ATTENTION,
        f"sequence_parallel={size} knows no attention={config.attention}: choose {', '.join(SHARED_ATTENTION)}",
    )
    require(
        config.speed.compile is Compile.none,
        f"sequence_parallel={size} and speed.compile=layers are not tried together: set speed.compile=none",
    )


def _validate_offload(config: Train) -> None:
    zero = config.zero
    require(
        zero.stage == 3 or not zero.offload_weights,
        f"zero.offload_weights moves the weights of ZeRO-3, and zero.stage is {zero.stage}: set zero=zero3_offload",
    )
    nvme = zero.offload is Offload.nvme
    require(
        nvme == (zero.offload_path is not None),
        f"zero.offload is {zero.offload} and zero.offload_path is {zero.offload_path}: nvme needs a folder on a local "
        "disk, and nothing else takes one",
    )
    require(zero.stage == 3 or not nvme, f"zero.offload=nvme swaps under ZeRO-3, and zero.stage is {zero.stage}: set 3")
    require(
        not (nvme and config.save.asynchronous),
        "save.asynchronous copies to host memory what zero.offload=nvme keeps out of it: set save.asynchronous=false",
    )


def _shipped_with(recipe: Recipe) -> str:
    """The advice to choose a shipped data group that has every source which the stages name, if there is one."""
    wanted = [rf"^  {re.escape(name)}:" for name in {name for stage in recipe.stages.values() for name in stage.data}]
    groups = [path for path in files("prosparse.configs.data").iterdir() if path.name.endswith(".yaml")]
    having = [p.name for p in groups if all(re.search(name, p.read_text(), re.MULTILINE) for name in wanted)]
    choices = " or ".join(f"data={name.removesuffix('.yaml')}" for name in sorted(having))
    return f", choose {choices}" if choices else ""


def validate_tasks(tasks: Tasks, prefix: str) -> None:
    require(len(set(tasks.tasks)) == len(tasks.tasks), f"{prefix}tasks names one of {tasks.tasks} twice: leave it out")
    for name, least in (("limit", 1), ("shots", 0), ("batch", 1), ("context", 2)):
        number = getattr(tasks, name)
        require(number is None or number >= least, f"{prefix}{name} is {number}: give at least {least}")


def _validate_stop(evaluate: Evaluate) -> None:
    metric, drop = evaluate.stop.metric, evaluate.stop.drop
    require(isfinite(drop) and drop >= 0, f"evaluate.stop.drop is {drop}: give a number, 0 or larger")
    if metric is not None:
        task = metric.rpartition("/")[0]
        known = task in evaluate.tasks or task.partition("/")[0] in evaluate.tasks
        require(
            bool(task) and known,
            f"evaluate.stop.metric is {metric}: write TASK/METRIC with one of evaluate.tasks, e.g. piqa/acc",
        )


def _validate_guard(guard: Guard) -> None:
    for name in ("skipped_in_a_row", "memory", "rewinds"):
        require(getattr(guard, name) >= 1, f"guard.{name} is {getattr(guard, name)}: give at least 1")
    require(guard.deviations > 0, f"guard.deviations is {guard.deviations}: give a positive number")
    require(guard.after >= 2, f"guard.after is {guard.after}: a deviation needs at least 2 losses")


def _validate_activation(activation: Activation) -> None:
    name = activation.name
    require(
        activation.threshold == 0 or name in ("fatrelu", "drelu"),
        f"recipe.activation.threshold is {activation.threshold}, but {name} has none: choose fatrelu or drelu",
    )
    require(activation.threshold >= 0, f"recipe.activation.threshold is {activation.threshold}: give 0 or larger")
    require(
        activation.offset == 0 or name == "shifted_relu",
        f"recipe.activation.offset is {activation.offset}, but {name} has none: choose activation=shifted_relu",
    )


def validate_shift(shift: Shift, prefix: str) -> None:
    require(
        shift.threshold is None or shift.budget is None,
        f"{prefix}threshold and {prefix}budget are both given: keep one and set the other to null",
    )
    require(
        shift.threshold is None or (isfinite(shift.threshold) and shift.threshold > 0),
        f"{prefix}threshold is {shift.threshold}: give a positive number",
    )
    require(
        shift.budget is None or (isfinite(shift.budget) and shift.budget > 0),
        f"{prefix}budget is {shift.budget}: give the rise of perplexity allowed, e.g. 0.01",
    )
    require(
        shift.granularity is Granularity.model or shift.budget is not None,
        f"{prefix}granularity is {shift.granularity}: thresholds by {shift.granularity} are allocated within a budget: "
        f"give {prefix}budget, e.g. 0.01",
    )
    require(shift.start > 0, f"{prefix}start is {shift.start}: give a positive threshold")
    require(shift.refinements >= 0, f"{prefix}refinements is {shift.refinements}: give 0 or more")
    require(shift.calibration_rows >= 1, f"{prefix}calibration_rows is {shift.calibration_rows}: give at least 1")


def _validate_lr(lr: Lr, key: str) -> None:
    require(isfinite(lr.peak) and lr.peak > 0, f"{key}.peak is {lr.peak}: give a positive learning rate")
    require(lr.warmup_steps >= 0, f"{key}.warmup_steps is {lr.warmup_steps}: give 0 or more")
    require(0 <= lr.final_ratio <= 1, f"{key}.final_ratio is {lr.final_ratio}: give a share between 0 and 1")
    require(lr.decay_steps is None or lr.decay_steps >= 1, f"{key}.decay_steps is {lr.decay_steps}: give at least 1")
    require(
        lr.schedule is not LrSchedule.wsd or lr.decay_steps is not None,
        f"{key}.decay_steps is needed with {key}.schedule=wsd: the length of the final decay in steps",
    )


def merged_lr(lr: Lr, own: StageLr) -> Lr:
    """The recipe's learning rate with what a stage changes of it."""
    return replace(lr, **{f.name: value for f in fields(own) if (value := getattr(own, f.name)) is not None})


def _validate_weights(weights: dict[str, float], key: str, suffix: str = "") -> None:
    for name, weight in weights.items():
        require(isfinite(weight) and weight > 0, f"{key}.{name}{suffix} is {weight}: give a positive weight")


def validate_device(device: str) -> None:
    require(device in ("auto", "cpu", "cuda"), f"device is {device}: choose auto, cpu or cuda")
