"""The schema of the verbs beside `train`; its `Train` and the parts of it stand in config.py.

In: nothing. Out: a config class for each of these verbs (`Measure`, `Export`, ...).
"""

from dataclasses import dataclass, field
from enum import StrEnum

from prosparse.config import (
    MISSING,
    Auto,
    Dtype,
    ExportFormat,
    Implementation,
    Quantization,
    Shift,
    Tasks,
    Train,
)


@dataclass
class Prepare(Train):
    """`prosparse prepare`: the same experiment, only its text."""

    run_dir: str = "."  # not used: prepare writes to data.cache
    shard: str | None = None  # I/N: only the I-th of N shares of the segments; null: what is missing, and the tables


class GpuKind(StrEnum):
    a100_80g = "a100_80g"
    a800_80g = "a800_80g"
    h100 = "h100"
    h200 = "h200"
    custom = "custom"  # peak_tflops, memory_gb, link_gb_s, watts and mfu say what it is


@dataclass
class Plan(Train):
    """`prosparse plan`: what a training would take, without loading anything; or `check`, a finished run beside it."""

    run_dir: str = "."  # whose disk is looked at
    gpus: int | None = None  # ranks, over all nodes
    gpu: GpuKind = GpuKind.a100_80g
    nodes: int = 1
    peak_tflops: float | None = None  # dense bf16 of one GPU; this and the next five: null, as of its kind
    memory_gb: float | None = None  # of one GPU
    link_gb_s: float | None = None  # between the GPUs of a node, of one GPU, one way
    watts: float | None = None  # of one GPU at work
    mfu: float | None = None  # share of the peak that the computing reaches, recomputation counted as work
    network_gb_s: float = 100.0  # between nodes, of one node, one way
    link_share: float = 0.75  # of both links' speeds that collectives reach
    margin: float = 0.1  # share of the memory that has to stay free
    tokens_per_second: float | None = None  # of all GPUs together, as measured: in the place of peak, mfu and links
    pue: float = 1.2  # what the building takes for each kWh of the GPUs
    price_per_gpu_hour: float | None = None
    start: str | None = None  # date as 2026-01-31, from which end dates are counted
    disk_gb_s: float = 1.0  # at which checkpoints are written
    save_share: float = 0.01  # of the time that saving may take
    check: str | None = None  # run folder whose memory and time are put beside the prediction
    out: str | None = None  # folder for result.json and the picture


class Benchmark(StrEnum):
    train = "train"
    decode = "decode"


@dataclass
class Bench(Train):
    """`prosparse bench`: a training step or sparse decoding, each against its rivals, in turns."""

    run_dir: str = "."  # not used: bench trains nothing that stays
    what: Benchmark = MISSING
    out: str = MISSING  # folder for result.json and the plot
    rounds: int = 20  # in each of which every rival has a turn
    # what=train: the step of the experiment's shape, rows and batch
    warmup: int = 3  # rounds before those
    ranks: int = 1  # processes of each rival, one GPU each if there are any
    rivals: list[str] = field(default_factory=lambda: ["silu", "hooks"])  # of silu, control, hooks; together on a GPU
    l1_factor: float = 1.0  # λ, x mean |x1|
    # what=decode
    checkpoint: str | None = None  # a model of your own; null: random weights of the shapes below
    hidden: int = 4096
    neurons: int = 11008
    layers: int = 0  # more: also generation end to end by a random Llama of so many layers, at the last sparsity
    sparsities: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.7, 0.8, 0.95, 0.99, 0.8932])
    batches: list[int] = field(default_factory=lambda: [1, 4, 8])  # tokens that are decoded together
    tokens: int = 64  # generated, end to end
    implementation: Implementation = Implementation.auto


@dataclass
class Opens:
    """What every verb that opens a model takes."""

    checkpoint: str = MISSING  # Hub name, folder, .gguf file, package:// path, run folder or one of its checkpoints
    dtype: Dtype = Dtype.bf16
    device: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False
    trust_pickle: bool = False


@dataclass
class Reads(Opens):
    """What every verb that also reads a text takes."""

    text: str = MISSING  # `stdlib`, a file, a folder, a URL, or hub://NAME
    column: str = "text"
    config: str | None = None  # Hub data sets: configuration name
    split: str = "train"  # Hub data sets: split
    context: int = 512
    batch: int = 4  # rows that the model computes together
    bos: Auto = Auto.auto
    cache: str = "~/.cache/prosparse/data"


@dataclass
class Text:
    """One of several texts that are measured."""

    path: str = MISSING  # as `text`
    held_out: float | None = None
    column: str = "text"
    config: str | None = None
    split: str = "train"
    rows: int | None = None


@dataclass
class Measure(Reads):
    text: str | None = None  # type: ignore[assignment]
    texts: dict[str, Text] = field(default_factory=dict)  # instead of `text`: several, by name
    held_out: float | None = None  # measure only this held-out share of the documents (data.held_out of the training)
    rows: int | None = None  # rows measured, spread evenly; null: all
    out: str | None = None  # folder for result.json
    neurons: bool = False  # how often each neuron fires, to out/neurons.safetensors
    curves: bool = False  # CETT-PPL-p % and the top-k curve on the first text: some twenty passes more
    cett_percent: float | None = 1.0  # p; null: only the top-k curve
    top_k: list[float] = field(default_factory=lambda: [100.0, 70.0, 50.0, 40.0, 30.0, 25.0, 20.0, 15.0, 10.0, 5.0])
    curve_rows: int | None = 32  # rows of the curves, spread evenly; null: all that are measured


@dataclass
class Predict(Reads):
    """`prosparse predict`: optimizer, batch and epochs are the published ones of ProSparse's predictors."""

    out: str = MISSING
    held_out: float = 0.05  # share of the documents that are judged on and not learned from
    rows: int | None = 800  # rows learned from, spread evenly; null: all
    evaluate_rows: int = 64  # held-out rows judged on, spread evenly
    rank: int | None = None  # null: hidden / 4, with `recall` hidden / 16 to start from
    recall: float | None = None  # double a layer's rank until its recall reaches this; null: `rank` in every layer
    top: float | None = None  # label only this share of a token's neurons, the largest; null: all that fire
    cutoff: float = 0.0  # a neuron is computed if the predictor's output is at least this
    cutoffs: list[float] = field(default_factory=lambda: [-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])  # of the sweep
    epochs: int = 20
    patience: int = 5  # epochs without progress after which a layer's training ends
    lr: float = 1e-3
    tokens: int = 1024  # of a batch of the predictors
    seed: int = 0


@dataclass
class ShiftCheckpoint(Shift, Reads):
    """`prosparse shift`: the end of a recipe for a model that is already trained."""

    out: str = MISSING


@dataclass
class Export(Reads):
    text: str | None = None  # type: ignore[assignment]  # with drop_threshold: measure on this what that does
    rows: int | None = 64  # ... on so many rows, spread evenly
    format: ExportFormat = ExportFormat.hf
    out: str = MISSING
    device: str = "cpu"
    plug_in: bool = True  # vllm: false refuses a model that stock vLLM cannot load
    quantization: Quantization = Quantization.f16  # powerinfer
    predictors: str | None = None  # powerinfer: folder of `prosparse predict`
    drop_threshold: bool = False  # powerinfer: write a FATReLU model without its threshold


@dataclass
class Generate(Opens):
    prompt: str | None = None  # null: a conversation at the terminal
    system: str | None = None  # what the conversation starts with, where the chat template has a place for it
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0
    sparse_decoding: Auto = Auto.auto  # auto: leave out neurons that are cut, if the model has such
    chat: Auto = Auto.auto  # auto: the tokenizer's chat template if it has one
    seed: int = 0
    out: str | None = None  # folder for result.json


@dataclass
class Eval(Tasks, Opens):
    tasks: list[str] = MISSING
    bos: Auto = Auto.auto  # auto: as the model was trained; of a model that does not say, if the tokenizer has one
    out: str | None = None  # folder for result.json, which has each task as soon as it is done


@dataclass
class Report:
    runs: list[str] = MISSING  # run folders
    measures: list[str] = field(default_factory=list)  # folders with a result.json of `measure` or `eval`
    out: str | None = None  # null: report/ of the run, if it is one
