"""The schema: plain dataclasses that type every key. checks.py holds what must be true across keys.

In: nothing. Out: the config class `Train` and its parts; verb_configs.py has those of the other verbs.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

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
    target = "target"


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
    selective = "selective"  # what matrix products and attention gave is kept, only what lies between is recomputed
    non_reentrant = "non_reentrant"
    reentrant = "reentrant"


class Auto(StrEnum):
    auto = "auto"
    none = "none"


class Offload(StrEnum):
    """Where the fp32 weights and Adam's moments lie, and are stepped on the CPU."""

    none = "none"  # beside the model
    cpu = "cpu"  # in host memory
    nvme = "nvme"  # in swap files on a disk of the host; ZeRO-3 only


class Implementation(StrEnum):
    """Of the operators that decode."""

    auto = "auto"  # triton on a GPU, cpp on a CPU that has a compiler, else eager
    triton = "triton"
    cpp = "cpp"
    eager = "eager"


class Template(StrEnum):
    auto = "auto"
    chatml = "chatml"
    minicpm = "minicpm"


class Wandb(StrEnum):
    auto = "auto"  # online with a key, else offline
    disabled = "disabled"
    offline = "offline"
    online = "online"


class ExportFormat(StrEnum):
    hf = "hf"
    vllm = "vllm"
    powerinfer = "powerinfer"
    llama_cpp = "llama_cpp"  # refused, with the reason


class Quantization(StrEnum):
    f16 = "f16"
    q4_0 = "q4_0"


class Granularity(StrEnum):
    model = "model"
    layer = "layer"
    neuron = "neuron"


class FfnMemory(StrEnum):
    auto = "auto"  # recompute_x1 on a CPU, where it costs next to nothing, save_x1 on a GPU and of experts
    save_x1 = "save_x1"  # gate, up and x1 are kept for backward
    recompute_x1 = "recompute_x1"  # gate and up
    stock = "stock"  # what plain torch keeps: gate, act(gate), up and x1


class Kernel(StrEnum):
    auto = "auto"  # triton on a GPU, else eager
    triton = "triton"
    eager = "eager"


class Loss(StrEnum):
    chunked = "chunked"  # no tensor of the logits' size in fp32
    stock = "stock"


class Norm(StrEnum):
    fused = "fused"  # an RMSNorm keeps nothing in fp32 for backward
    stock = "stock"


class Compile(StrEnum):
    none = "none"
    layers = "layers"  # each decoder layer by torch.compile, its FFN's own kernel left out


class Preflight(StrEnum):
    """What comes of the check before a run."""

    run = "run"  # what is wrong is refused
    warn = "warn"  # other versions and GPUs in use are told, and the run goes on
    only = "only"  # nothing else is done


class OnSpike(StrEnum):
    none = "none"
    log = "log"
    rewind = "rewind"


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
    sparsity: float | None = None  # target only: what λ is steered to by the end of the stage


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
class Distillation:
    """weight · temperature² · mean KL(teacher ‖ student), added to the loss; the mean over labeled tokens."""

    weight: float = 0.0  # 0: none
    temperature: float = 1.0  # what both models' logits are divided by


@dataclass
class Stage:
    steps: int = MISSING
    l1: L1 = field(default_factory=L1)
    lr: StageLr = field(default_factory=StageLr)
    batch: StageBatch = field(default_factory=StageBatch)
    data: dict[str, float] = field(default_factory=dict)  # weight by source name; empty: the weights of data.sources
    weight_decay: float | None = None
    reset_optimizer: bool = False
    distillation: Distillation = field(default_factory=Distillation)


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
    granularity: Granularity = Granularity.model  # layer, neuron: thresholds of their own, folded; needs a budget


@dataclass
class Recover:
    """A stage after the shift, thresholds held: the last stage's rows, batch and λ (0 after a target stage)."""

    steps: int = 0
    lr: float | None = None  # constant, from new moments on


@dataclass
class Optimizer:
    """AdamW."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient


@dataclass
class Scale:
    """The same recipe made shorter or smaller: every stage by one factor, at least one step and one sequence each."""

    steps: float = 1.0  # of the steps of all stages, and of the learning rate's warm-up and decay
    tokens: float | None = None  # instead of steps: what all stages together train
    batch: float = 1.0  # of the sequences of every window


@dataclass
class Recipe:
    activation: Activation = field(default_factory=Activation)
    stages: dict[str, Stage] = field(default_factory=dict)
    shift: Shift = field(default_factory=Shift)
    recover: Recover = field(default_factory=Recover)
    penalty: Penalty = field(default_factory=Penalty)
    lr: Lr = field(default_factory=Lr)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    control: Control = Control.none
    scale: Scale = field(default_factory=Scale)


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
    tie_word_embeddings: bool | None = None


@dataclass
class Model:
    source: str = MISSING  # Hub name, local folder, .gguf file, or package://NAME/FILE inside an installed package
    revision: str | None = None
    trust_remote_code: bool = False
    trust_pickle: bool = False  # open weights that are no safetensors: unpickling can run whatever is in them
    shape: Shape = field(default_factory=Shape)


@dataclass
class Source:
    """One source of a mixture: text, or conversations if `messages` or `prompt` and `answer` are given."""

    path: str = MISSING  # `stdlib`, a file, a folder, a URL such as s3://BUCKET/FOLDER, or hub://NAME
    weight: float = 1.0
    config: str | None = None  # Hub data sets: configuration name
    split: str = "train"  # Hub data sets: split
    column: str = "text"  # .jsonl, .parquet and Hub data sets: the column that holds a document
    messages: str | None = None  # chat: the column that holds [{role, content}, ...]
    prompt: str | None = None  # chat: the column that holds what is asked
    answer: str | None = None  # chat: the column that holds the answer to it

    @property
    def is_chat(self) -> bool:
        return self.messages is not None or self.prompt is not None


@dataclass
class Data:
    sources: dict[str, Source] = field(default_factory=dict)
    held_out: float = 0.02  # share of documents kept out of training, chosen by the document's own text
    bos: Auto = Auto.auto  # auto: BOS before every document if the tokenizer has one
    template: Template = Template.auto  # of chat sources; auto: the tokenizer's own
    tokenizer: str | None = None  # null: the model's
    cache: str = "~/.cache/prosparse/data"
    processes: int = 1


@dataclass
class Zero:
    stage: int = 2
    offload: Offload = Offload.none
    offload_path: str | None = None  # a folder on a local NVMe disk, which every host has: offload=nvme
    offload_weights: bool = False  # the model's own weights to host memory too; ZeRO-3 only
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
    keep: int = 2  # newest complete checkpoints kept, at least 2
    keep_every: int | None = None  # checkpoints of steps that this divides are kept too
    keep_stages: bool = True  # those of stage ends are kept too; a fork starts from one
    asynchronous: bool = False  # copy to host memory and write beside the training


@dataclass
class Guard:
    """What a run does about numerical faults."""

    skipped_in_a_row: int = 10  # stop, with a diagnosis, after so many windows in a row that are not finite
    on_spike: OnSpike = OnSpike.log
    deviations: float = 6.0  # a spike is a loss so many standard deviations above the running mean
    memory: int = 100  # steps of the running mean and deviation
    after: int = 20  # steps before the first judgment
    rewinds: int = 5  # stop after so many


@dataclass
class Timeouts:
    """How long a collective waits for the other ranks before the run ends."""

    join_seconds: int = 600  # until all ranks have come together and the preflight is done
    start_seconds: int = 7200  # while the run starts, saves, exports
    steady_seconds: int = 600  # between steps


@dataclass
class Speed:
    """How a step is computed; none of it changes what is computed by more than rounding."""

    ffn: FfnMemory = FfnMemory.auto  # of relu, fatrelu, drelu and silu; others are stock
    kernel: Kernel = Kernel.auto  # of the FFN
    loss: Loss = Loss.chunked
    norm: Norm = Norm.fused
    liger: Auto = Auto.auto  # Liger's RMSNorm and RoPE, on a GPU where liger-kernel is installed and knows the family
    compile: Compile = Compile.none
    freeze_gc: bool = True  # what lives when training starts is not searched for garbage
    prefetch: bool = True  # the rows of the next window are read while this one is computed


@dataclass
class Profile:
    """A torch.profiler trace of some steps, in run_dir/profile, one file a rank."""

    first: int = 10
    steps: int = 0  # 0: none


@dataclass
class Tasks:
    """What lm-evaluation-harness asks a model."""

    tasks: list[str] = field(default_factory=list)  # of lm-eval, of task_path, or the suites prosparse and bamboo
    task_path: str | None = None  # folder with task files (.yaml) of your own
    limit: int | None = None  # only so many items of each task
    shots: int | None = None  # examples before each question, except in suites; null: what the task says
    batch: int = 8  # texts that the model computes together
    context: int | None = None  # the most tokens of a text; null: the model's positions
    chat: Auto = Auto.none  # auto: ask through the tokenizer's chat template
    unsafe_code: bool = False  # run what the model writes, as humaneval and mbpp need


@dataclass
class StopRule:
    """End a run after a stage whose model is worse than the base model."""

    metric: str | None = None  # TASK/METRIC, higher being better
    drop: float = 0.02  # the most that it may be lower


@dataclass
class Evaluate(Tasks):
    """On held-out rows; on tasks, if there are any: the base model, the model of each stage's end, the shifted one."""

    every: int = 100  # steps between evaluations on held-out rows; 0: only before and after training
    rows: int = 64  # held-out rows used, spread evenly over all of them
    stop: StopRule = field(default_factory=StopRule)


@dataclass
class Train:
    run_dir: str = MISSING
    model: Model = field(default_factory=Model)
    recipe: Recipe = field(default_factory=Recipe)
    teacher: str | None = None  # of stages that distill, as model.source; null: the base model itself
    data: Data = field(default_factory=Data)
    zero: Zero = field(default_factory=Zero)
    tracking: Tracking = field(default_factory=Tracking)
    save: Save = field(default_factory=Save)
    evaluate: Evaluate = field(default_factory=Evaluate)
    guard: Guard = field(default_factory=Guard)
    timeouts: Timeouts = field(default_factory=Timeouts)
    speed: Speed = field(default_factory=Speed)
    profile: Profile = field(default_factory=Profile)
    micro_batch: int = 1  # rows of one forward pass on one rank
    sequence_parallel: int = 1  # ranks that share these rows, each with its part of their tokens (DeepSpeed Ulysses)
    checkpointing: Checkpointing = Checkpointing.none
    attention: str = "sdpa"
    dtype: Dtype = Dtype.bf16
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # CPU threads of one rank; null: the machine's cores divided by its ranks
    seed: int = 0
    preflight: Preflight = Preflight.run
    until: str | None = None  # a stage's name or `shift`: stop there; started again the run goes on
    resume: str = "auto"  # auto | must | never | path of a checkpoint
    accept_versions: bool = False  # go on from a checkpoint of another major version of torch or DeepSpeed
    fork: str | None = None  # RUN@STAGE: begin after that stage of another run
    fork_optimizer: bool = True  # false: with new moments
