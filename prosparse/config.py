"""The schema: plain dataclasses that type every key, and their cross-field checks.

In: nothing. Out: `Train`, `Prepare`, `Measure`, `ShiftCheckpoint`, `Export`, the parts they are made of, and
`validate`, which raises ValueError for whatever a user can mend in a config.
"""

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from math import isfinite
from typing import Any

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
MISSING: Any = "???"  # OmegaConf's mark for a value that has to be given


class ActivationName(StrEnum):
    silu = "silu"
    relu = "relu"
    fatrelu = "fatrelu"
    drelu = "drelu"
    shifted_relu = "shifted_relu"
    relu2 = "relu2"


class L1Shape(StrEnum):
    constant = "constant"
    sine = "sine"
    linear = "linear"


class LrSchedule(StrEnum):
    cosine = "cosine"
    constant = "constant"
    wsd = "wsd"


class Control(StrEnum):
    none = "none"
    silu_continued = "silu_continued"
    relu_only = "relu_only"
    constant_l1 = "constant_l1"


class PenaltyUnit(StrEnum):
    mean = "mean"
    sum_1e8 = "sum_1e8"


class Dtype(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


class Checkpointing(StrEnum):
    none = "none"
    non_reentrant = "non_reentrant"
    reentrant = "reentrant"


class Bos(StrEnum):
    auto = "auto"
    none = "none"


class Wandb(StrEnum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


class ExportFormat(StrEnum):
    hf = "hf"


# --- a recipe: what happens to the model ------------------------------------------------------------------------------


@dataclass
class Activation:
    name: ActivationName = MISSING
    threshold: float = 0.0  # fatrelu, drelu: the gate is kept where gate >= threshold
    offset: float = 0.0  # shifted_relu: relu(gate - offset)


@dataclass
class L1:
    shape: L1Shape = L1Shape.constant
    factor: float = 0.0  # λ at the end of the stage, in the recipe's penalty unit


@dataclass
class Lr:
    schedule: LrSchedule = LrSchedule.cosine
    peak: float = MISSING
    warmup_steps: int = 0
    decay_steps: int | None = None  # cosine: length of the decay (null: to the segment's end); wsd: length of the tail
    final_ratio: float = 0.1  # learning rate at the end of the decay, as a share of the peak


@dataclass
class StageLr:
    """What a stage changes of the recipe's learning rate; any value opens a new segment."""

    schedule: LrSchedule | None = None
    peak: float | None = None
    warmup_steps: int | None = None
    decay_steps: int | None = None
    final_ratio: float | None = None


@dataclass
class Batch:
    sequences: int = MISSING  # rows of one window, over all ranks
    context: int = MISSING  # tokens of one row


@dataclass
class StageBatch:
    sequences: int | None = None
    context: int | None = None


@dataclass
class Stage:
    steps: int = MISSING
    l1: L1 = field(default_factory=L1)
    lr: StageLr = field(default_factory=StageLr)
    batch: StageBatch = field(default_factory=StageBatch)
    data: dict[str, float] = field(default_factory=dict)  # weight by source name; empty: the weights of data.sources
    weight_decay: float | None = None
    reset_optimizer: bool = False


@dataclass
class Penalty:
    unit: PenaltyUnit = PenaltyUnit.mean
    micro_batch_sequences: int | None = None  # sum_1e8 only: the m in λ_mean = λ · 1e-8 · m · context · neurons


@dataclass
class Shift:
    """The end of a recipe: a fixed threshold, the largest one within a perplexity budget, or (both null) nothing."""

    threshold: float | None = None
    budget: float | None = None  # relative rise of the perplexity on calibration rows, e.g. 0.01
    calibration_rows: int = 32
    start: float = 0.01  # first threshold tried under a budget; doubled or halved from there
    refinements: int = 4  # bisections between the last threshold within the budget and the first beyond it


@dataclass
class Optimizer:
    """AdamW."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient


@dataclass
class Recipe:
    activation: Activation = field(default_factory=Activation)
    stages: dict[str, Stage] = field(default_factory=dict)
    shift: Shift = field(default_factory=Shift)
    penalty: Penalty = field(default_factory=Penalty)
    lr: Lr = field(default_factory=Lr)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    control: Control = Control.none


# --- what it happens to, where and how --------------------------------------------------------------------------------


@dataclass
class Shape:
    """The architecture's sizes, checked against the model that is loaded (null: not checked)."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    vocab_size: int | None = None


@dataclass
class Model:
    source: str = MISSING  # Hub name, local folder, .gguf file, or package://NAME/FILE inside an installed package
    revision: str | None = None
    trust_remote_code: bool = False
    shape: Shape = field(default_factory=Shape)


@dataclass
class Source:
    """One text source of a mixture."""

    path: str = MISSING  # `stdlib`, a file, a folder, or hub://NAME
    weight: float = 1.0
    config: str | None = None  # Hub data sets: configuration name
    split: str = "train"  # Hub data sets: split
    column: str = "text"  # .jsonl, .parquet and Hub data sets: the column that holds a document


@dataclass
class Data:
    sources: dict[str, Source] = field(default_factory=dict)
    held_out: float = 0.02  # share of documents kept out of training, chosen by the document's own text
    bos: Bos = Bos.auto  # auto: BOS before every document if the tokenizer has one
    tokenizer: str | None = None  # null: the model's
    cache: str = "~/.cache/prosparse/data"
    processes: int = 1


@dataclass
class Zero:
    stage: int = 2
    overlap_comm: bool | None = None  # null: off below stage 3, DeepSpeed's default there
    extra: dict[str, Any] = field(default_factory=dict)  # passed on to zero_optimization


@dataclass
class Tracking:
    wandb: Wandb = Wandb.disabled
    project: str = "prosparse"
    name: str | None = None


@dataclass
class Save:
    every: int = 500  # steps between checkpoints; the end of a stage always has one
    keep: int = 2  # complete checkpoints kept, at least 2


@dataclass
class Evaluate:
    every: int = 100  # steps between evaluations on held-out rows; 0: only before and after training
    rows: int = 64  # held-out rows used, spread evenly over all of them


@dataclass
class Train:
    run_dir: str = MISSING
    model: Model = field(default_factory=Model)
    recipe: Recipe = field(default_factory=Recipe)
    data: Data = field(default_factory=Data)
    zero: Zero = field(default_factory=Zero)
    tracking: Tracking = field(default_factory=Tracking)
    save: Save = field(default_factory=Save)
    evaluate: Evaluate = field(default_factory=Evaluate)
    micro_batch: int = 1  # rows of one forward pass on one rank
    checkpointing: Checkpointing = Checkpointing.none
    attention: str = "sdpa"
    dtype: Dtype = Dtype.bf16
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # CPU threads of one rank; null: the machine's cores divided by its ranks
    seed: int = 0
    until: str | None = None  # a stage's name or `shift`: stop there; started again the run goes on
    resume: str = "auto"  # auto | must | never | path of a checkpoint


@dataclass
class Prepare(Train):
    """`prosparse prepare`: the same experiment, only its text."""

    run_dir: str = "."  # not used: prepare writes to data.cache


@dataclass
class Measure:
    checkpoint: str = MISSING  # Hub name, folder, .gguf file, package:// path, run folder or one of its checkpoints
    text: str = MISSING  # `stdlib`, a file, a folder, or hub://NAME
    held_out: float | None = None  # measure only this held-out share of the documents (data.held_out of the training)
    column: str = "text"
    context: int = 512
    rows: int | None = None  # rows measured, spread evenly; null: all
    batch: int = 4
    bos: Bos = Bos.auto
    dtype: Dtype = Dtype.bf16
    device: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False
    cache: str = "~/.cache/prosparse/data"
    out: str | None = None  # folder for result.json


@dataclass
class ShiftCheckpoint:
    """`prosparse shift`: the end of a recipe for a model that is already trained."""

    checkpoint: str = MISSING
    out: str = MISSING
    text: str = MISSING
    threshold: float | None = None
    budget: float | None = None
    calibration_rows: int = 32
    start: float = 0.01
    refinements: int = 4
    column: str = "text"
    context: int = 512
    batch: int = 4
    bos: Bos = Bos.auto
    dtype: Dtype = Dtype.bf16
    device: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False
    cache: str = "~/.cache/prosparse/data"


@dataclass
class Export:
    checkpoint: str = MISSING
    format: ExportFormat = ExportFormat.hf
    out: str = MISSING
    dtype: Dtype = Dtype.bf16
    trust_remote_code: bool = False


# --- checks -----------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def validate(config: Any) -> None:
    """Check one verb's config across fields; raises ValueError that names the key and the remedy."""
    if isinstance(config, Train):
        validate_recipe(config.recipe)
        _validate_train(config)
    if isinstance(config, ShiftCheckpoint):
        shift = Shift(config.threshold, config.budget, config.calibration_rows, config.start, config.refinements)
        require(
            (shift.threshold is None) != (shift.budget is None), "give either threshold=T or budget=B, for one of them"
        )
        _validate_shift(shift, "")
    if isinstance(config, Measure | ShiftCheckpoint):
        require(config.context >= 2, f"context is {config.context}: a row needs at least 2 tokens")
        require(config.batch >= 1, f"batch is {config.batch}: give at least 1")
        _validate_device(config.device)
    if isinstance(config, Measure) and config.held_out is not None:
        require(0 < config.held_out < 1, f"held_out is {config.held_out}: give a share between 0 and 1, or null")


def merged_lr(lr: Lr, own: StageLr) -> Lr:
    """The recipe's learning rate with what a stage changes of it."""
    return replace(lr, **{f.name: value for f in fields(own) if (value := getattr(own, f.name)) is not None})


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
        for part in ("sequences", "context"):
            value = getattr(stage.batch, part)
            require(
                value is None or value >= (2 if part == "context" else 1), f"{key}.batch.{part} is {value}: too small"
            )
        _validate_weights(stage.data, f"{key}.data")
    first = next(iter(recipe.stages))
    require(
        not recipe.stages[first].reset_optimizer,
        f"recipe.stages.{first}.reset_optimizer is true, but the first stage starts with a new optimizer anyway",
    )
    require(recipe.batch.sequences >= 1, f"recipe.batch.sequences is {recipe.batch.sequences}: give at least 1")
    require(recipe.batch.context >= 2, f"recipe.batch.context is {recipe.batch.context}: a row needs at least 2 tokens")
    _validate_activation(recipe.activation)
    _validate_shift(recipe.shift, "recipe.shift.")
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
    adamw = recipe.optimizer
    require(
        len(adamw.betas) == 2 and all(0 <= beta < 1 for beta in adamw.betas),
        f"recipe.optimizer.betas is {adamw.betas}: give two numbers from 0 to below 1",
    )
    require(adamw.eps > 0, f"recipe.optimizer.eps is {adamw.eps}: give a positive number")
    require(adamw.weight_decay >= 0, f"recipe.optimizer.weight_decay is {adamw.weight_decay}: give 0 or larger")
    require(recipe.optimizer.clip > 0, f"recipe.optimizer.clip is {recipe.optimizer.clip}: give a positive norm")


def _validate_train(config: Train) -> None:
    sources = config.data.sources
    require(len(sources) > 0, "data.sources is empty: name at least one text source")
    _validate_weights({name: source.weight for name, source in sources.items()}, "data.sources", ".weight")
    for name, stage in config.recipe.stages.items():
        for source in stage.data:
            require(
                source in sources,
                f"recipe.stages.{name}.data.{source}: no such source; data.sources has {', '.join(sources)}",
            )
    require(0 < config.data.held_out < 1, f"data.held_out is {config.data.held_out}: give a share between 0 and 1")
    require(config.data.processes >= 1, f"data.processes is {config.data.processes}: give at least 1")
    require(config.micro_batch >= 1, f"micro_batch is {config.micro_batch}: give at least 1")
    require(config.zero.stage in (1, 2, 3), f"zero.stage is {config.zero.stage}: choose 1, 2 or 3")
    require(config.save.keep >= 2, f"save.keep is {config.save.keep}: at least 2 complete checkpoints are kept")
    require(config.save.every >= 1, f"save.every is {config.save.every}: give at least 1")
    require(config.evaluate.rows >= 1, f"evaluate.rows is {config.evaluate.rows}: give at least 1")
    require(config.evaluate.every >= 0, f"evaluate.every is {config.evaluate.every}: give 0 or more")
    require(config.threads is None or config.threads >= 1, f"threads is {config.threads}: give at least 1, or null")
    _validate_device(config.device)
    require(config.attention in ATTENTION, f"attention is {config.attention}: choose {', '.join(ATTENTION)}")
    names = [*config.recipe.stages, "shift"]
    require(
        config.until is None or config.until in names, f"until={config.until}: no such stage; choose {', '.join(names)}"
    )


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


def _validate_shift(shift: Shift, prefix: str) -> None:
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


def _validate_weights(weights: dict[str, float], key: str, suffix: str = "") -> None:
    for name, weight in weights.items():
        require(isfinite(weight) and weight > 0, f"{key}.{name}{suffix} is {weight}: give a positive weight")


def _validate_device(device: str) -> None:
    require(device in ("auto", "cpu", "cuda"), f"device is {device}: choose auto, cpu or cuda")
