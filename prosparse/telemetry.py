"""What a run says while it trains: its metrics file, its progress line, its remaining time, its wandb run.

In: one plain dict a step or evaluation, with "kind" and "step". Out: RUN/metrics.jsonl, lines of text, a wandb run.
The metrics file is the record; wandb is a view of it and never stops training.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sized
from functools import cache, partial
from importlib.metadata import version
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prosparse import schedule
from prosparse.config import Offload, Tracking, Train, Wandb
from prosparse.data import Prepared, epochs
from prosparse.ffn import Substitution, neurons

# Dense bf16 peaks in FLOP/s, from the vendor's data sheets.
PEAK_FLOPS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H200": 989e12}
PACKAGES = ("prosparse", "torch", "deepspeed", "transformers", "datasets", "grain")  # that compute a result
WANDB_SECONDS = 60  # until wandb counts as out of reach
AFTER_TRAINING = ("shifted", "recovered", "exported")  # evaluations of these are no points of the training's own curve

# --- strict JSON ------------------------------------------------------------------------------------------------------


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinities become null."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# --- no secrets -------------------------------------------------------------------------------------------------------


def redact(text: str) -> str:
    """`text` with *** for tokens, keys and passwords: those in this process's environment, Hub tokens, URL users."""
    named = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|PAT|CREDENTIALS?)$", re.IGNORECASE)
    for name, value in os.environ.items():
        if named.search(name) and len(value) >= 8 and not value.startswith("/"):
            text = text.replace(value, "***")
    return re.sub(r"\bhf_\w{20,}|(?<=://)[^/\s@]+(?=@)", "***", text)


def command() -> str:
    """The command line of this process, without secrets."""
    return redact(" ".join(sys.argv))


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


class Metrics:
    """RUN/metrics.jsonl, opened to go on after step `after_step`; -1 starts it empty.

    Rows of later steps, which the resumed run will write again, are removed, and so is a half-written last line.
    Raises ValueError as `read_metrics` does.
    """

    def __init__(self, run_dir: Path, after_step: int) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        again = ("trained", *AFTER_TRAINING)  # evaluated each time a run comes to its end
        rows = read_metrics(run_dir)
        kept = [
            row for row in rows if row["step"] <= after_step - (row["kind"] == "shift" or row.get("model") in again)
        ]
        evaluated = (row["step"] for row in kept if row.get("model") == "training")
        self.evaluated_step = max(evaluated, default=None)  # of the last evaluation during training
        self.rewinds = [row["windows"] for row in kept if row["kind"] == "rewind"]  # the windows that each left out
        write_atomically(self.path, "".join(f"{strict_json(row)}\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it is in the file when this returns."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{strict_json(row)}\n")
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from error


def read_metrics(run_dir: Path, damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of RUN/metrics.jsonl in order; none if there is no file. A half-written last line is left out.

    Raises ValueError for any other line that is not JSON; with a list `damaged` every such line is left out and told
    there, the last one too.
    """
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_bytes().rstrip().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            last = number == len(lines)
            if damaged is not None:
                if line or not last:  # else the file is empty
                    damaged.append(f"{path}, line {number} is {'cut off' if last else 'not JSON'}: it is left out")
            elif not last:
                raise ValueError(f"{path}, line {number} is not JSON: remove the line, or the file") from error
    return rows


# --- what the terminal shows ------------------------------------------------------------------------------------------


def progress_line(row: dict[str, Any], steps: int, eta_seconds: float | None) -> str:
    """One line for a training row; `steps` is the length of the whole recipe."""
    value = {key: nan if part is None else part for key, part in row.items()}
    line = (
        f"step {row['step']:>{max(4, len(str(steps)))}}/{steps} {row['stage']:<12}  "
        f"loss {value['loss']:6.3f}  λ {value['l1_factor']:<#9.4g}  sparsity {100 * value['sparsity']:5.1f} %  "
        f"lr {value['lr']:.1e}  {value['tokens_per_second']:>7,.0f} tok/s"
    )
    return line if eta_seconds is None else f"{line}  ETA {duration(eta_seconds)}"


def duration(seconds: float) -> str:
    """The two largest units of a time: 45 s, 8 min 10 s, 1 h 5 min, 2 d 3 h."""
    whole = round(seconds)
    for size, name, part_size, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part_size} {part_name}"
    return f"{whole} s"


def header(
    config: Train,
    model: PreTrainedModel,
    substitution: Substitution,
    prepared: Mapping[int, Prepared],
    step: int,
    ranks: int,
    device: torch.device,
) -> str:
    """What is about to run: model, batch arithmetic, stages, text; `step` is where it goes on."""
    recipe, width, size = config.recipe, neurons(model.config), config.sequence_parallel
    sequences, context = schedule.batch_at(recipe, 1)
    lines = [
        f"model    {config.model.source}: {_parameters(model) / 1e6:,.1f} M parameters, {substitution.layers} FFNs of "
        f"{width:,} neurons, {substitution.replaced} -> {substitution.activation}, control {recipe.control}",
        f"batch    {sequences} rows x {context} tokens = micro_batch {config.micro_batch} x "
        f"{f'{ranks // size} groups of {size} ranks' if size > 1 else f'{ranks} ranks'} x "
        f"accumulation {schedule.accumulation(sequences, config.micro_batch, ranks // size)}; {config.dtype}, "
        f"ZeRO-{config.zero.stage}{_offload(config)}, {device_name(device, ranks)}, {torch.get_num_threads()} "
        "threads a rank",
    ]
    if any(stage.distillation.weight > 0 for stage in recipe.stages.values()):
        lines.append(f"teacher  {config.teacher or 'the base model'}")
    for span in schedule.spans(recipe):
        rates = [schedule.learning_rate(recipe, end) for end in (span.first, span.last)]
        if schedule.steered(recipe, span.first):
            factors = f"steered to a sparsity of {100 * (span.stage.l1.sparsity or 0):.4g} %"
        else:
            first, last = (schedule.l1_factor(recipe, end) for end in (span.first, span.last))
            mean = schedule.l1_factor_mean(recipe, span.last, width)
            factors = f"{first:.4g} -> {last:.4g} ({mean:.4g} x mean |x1|)"
        taught = span.stage.distillation
        teaching = f"  KL x {taught.weight:.4g} at temperature {taught.temperature:g}" if taught.weight else ""
        lines.append(
            f"stage    {span.name:<13} steps {span.first}-{span.last}  λ {factors}  "
            f"lr {rates[0]:.2g} -> {rates[1]:.2g}{teaching}"
        )
    lines += text_lines(config, {context: made.train for context, made in prepared.items()})
    total = schedule.total_steps(recipe)
    lines.append(
        f"run      {config.run_dir}: " + (f"goes on after step {step} of {total}" if step else f"{total} steps")
    )
    return "\n".join(lines)


def _offload(config: Train) -> str:
    """What lies where, in words."""
    zero = config.zero
    places = {Offload.none: "", Offload.cpu: "in host memory", Offload.nvme: "in swap files"}
    masters = f" with masters and moments {places[zero.offload]}" * (zero.offload is not Offload.none)
    return masters + " and weights in host memory" * zero.offload_weights


def text_lines(config: Train, rows: Mapping[int, Mapping[str, Sized]]) -> list[str]:
    """How often all stages together read each source, of which `rows` are those by context; what repeats is told."""
    weights = {name: source.weight for name, source in config.data.sources.items()}
    read: dict[str, dict[tuple, float]] = {}  # passes by source and mixture (context and weights)
    for span in schedule.spans(config.recipe):
        sequences, context = schedule.batch_at(config.recipe, span.first)
        mixture = (context, *sorted(span.stage.data.items()))
        used = epochs(rows[context], span.stage.data or weights, span.stage.steps * sequences)
        for name, count in used.items():
            passes = read.setdefault(name, {})
            passes[mixture] = passes.get(mixture, 0) + count
    lines = []
    for name, passes in read.items():
        lengths = sorted({context for context, *_ in passes})
        sizes = ", ".join(f"{len(rows[context][name]):,} rows of {context} tokens" for context in lengths)
        lines.append(f"text     {name}: {sizes}, read {sum(passes.values()):.2f} times")
        if sum(passes.values()) > 1:
            lines.append(f"         {name} runs out and repeats: add text or shorten the recipe")
        if len(passes) > 1:
            lines.append(
                f"         {name} is begun anew by {len(passes)} mixtures (stages of other weights or context), which "
                "read the same text again: give them sources of their own, or one mixture"
            )
    return lines


@cache
def versions() -> dict[str, str]:
    """Versions of what computes the result, and the git commit when run from a clone."""
    found = {name: version(name) for name in PACKAGES}
    home = Path(__file__).parents[1]
    if (home / ".git").exists():
        head = subprocess.run(["git", "-C", home, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        found |= {"commit": head.stdout.strip()} if head.returncode == 0 else {}
    return found


def device_name(device: torch.device, ranks: int) -> str:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU rank" + "s" * (ranks > 1)
    return f"{ranks} x {kind}" if device.type == "cuda" else f"{ranks} {kind}"


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device, None where they are not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def mfu(model: PreTrainedModel, context: int, tokens_per_second: float, device: torch.device) -> float | None:
    """Model FLOPs utilization of one device that trains `tokens_per_second`; None where its peak is not known."""
    peak = peak_flops(device)
    return None if peak is None else training_flops(model, context) * tokens_per_second / peak


def training_flops(model: PreTrainedModel, context: int) -> float:
    """FLOPs that training takes a token: 6N + 12 · layers · heads · width of one · context.

    PaLM, arXiv 2204.02311, appendix B. No causal halving; N without the embeddings unless they are tied, and of experts
    as many as a token visits.
    """
    text = model.config.get_text_config()
    parameters = (
        _parameters(model) - _idle(model) - (0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size)
    )
    return 6 * parameters + 12 * text.num_hidden_layers * text.num_attention_heads * head_width(text) * context


def head_width(text: PreTrainedConfig) -> float:
    """Of one attention head; where keys and values differ, their mean."""
    if getattr(text, "qk_head_dim", None):
        return (text.qk_head_dim + text.v_head_dim) / 2
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _parameters(model: PreTrainedModel) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _idle(model: PreTrainedModel) -> int:
    """Parameters of the experts, [experts, ..., ...] each, that a token does not visit."""
    visits = getattr(model.config.get_text_config(), "num_experts_per_tok", 0)
    shapes = [tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in model.parameters()]
    return sum((shape[0] - visits) * shape[1] * shape[2] for shape in shapes if visits and len(shape) == 3)


class Eta:
    """Remaining time from the mean of the last 20 steps; the first two of a process, which warm up, are left out."""

    def __init__(self) -> None:
        self._warming_up = 2
        self._recent: deque[float] = deque(maxlen=20)

    def update(self, step_seconds: float) -> None:
        if self._warming_up > 0:
            self._warming_up -= 1
        else:
            self._recent.append(step_seconds)

    def remaining(self, steps_left: int) -> float | None:
        """Seconds for `steps_left` more steps; None until a step was timed."""
        return steps_left * sum(self._recent) / len(self._recent) if self._recent else None


# --- wandb ------------------------------------------------------------------------------------------------------------


class Tracker:
    """The run's wandb run, made on rank 0 only; without effect when `tracking.wandb` is disabled or wandb fails.

    `auto` goes online with a key that works and offline without, and says so; it never asks for one.
    With the `tracking_id` of an earlier tracker the same wandb run goes on. wandb cannot take back the steps that a
    resume repeats: it shows them twice. Output, code and git remotes are not sent; the report has the
    run's command line.
    """

    def __init__(self, tracking: Tracking, run_dir: Path, config: dict[str, Any], tracking_id: str | None) -> None:
        self._run: Any = None
        self._id: str | None = None
        if tracking.wandb is Wandb.disabled:
            return
        self._id = tracking_id
        try:
            self._run = _start_wandb(tracking, Path(run_dir), config, tracking_id)
            self._id = self._run.id
        except Exception as error:  # whatever wandb raises, training goes on
            self._give_up(error)

    @property
    def id(self) -> str | None:
        """What a resume passes as `tracking_id`: kept while wandb fails, None when disabled."""
        return self._id

    def log(self, row: dict[str, Any]) -> None:
        """Send one row: its numbers, and a list by layer as a histogram; of evaluations also each layer's number."""
        if self._run is not None:
            try:
                self._run.log({"step": row["step"], **_logged(row)})
            except Exception as error:  # as above
                self._give_up(error)

    def finish(self, files: Iterable[Path] = ()) -> None:
        """Send what the report consists of (plots also as images), and end the wandb run."""
        if self._run is not None:
            try:
                import wandb

                if files := list(files):
                    plots = [path for path in files if path.suffix == ".png"]
                    self._run.log({f"report/{path.stem}": wandb.Image(str(path)) for path in plots})
                    artifact = wandb.Artifact(f"report-{self._id}", type="report")
                    for path in files:
                        artifact.add_file(str(path), name=path.name)
                    self._run.log_artifact(artifact)
                self._run.finish()
                self._run = None
            except Exception as error:  # as above
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = (str(error).splitlines() or [""])[0]
        print(f"warning: training goes on without wandb ({type(error).__name__}: {reason})", file=sys.stderr)


def _start_wandb(tracking: Tracking, run_dir: Path, config: dict[str, Any], tracking_id: str | None) -> Any:
    import wandb

    run_dir.mkdir(parents=True, exist_ok=True)
    begin = partial(_init_wandb, tracking, run_dir, config, tracking_id)
    kept = f"the run stays in {run_dir}/wandb, from where `wandb sync` sends it"
    if tracking.wandb is Wandb.offline or os.environ.get("WANDB_MODE") == "offline":
        return begin("offline")
    if not wandb.login(prompt=False, verify=False):  # a prompt would hold up a job
        if tracking.wandb is Wandb.online:
            told = "run `wandb login` or set WANDB_API_KEY, or choose tracking.wandb=offline"
            raise RuntimeError(f"not logged in: {told}")
        print(f"wandb has no key: {kept}", file=sys.stderr)
        return begin("offline")
    try:
        return begin("online")
    except Exception as error:
        if tracking.wandb is Wandb.online:
            raise
        wandb.teardown()  # else the run's id counts as in use
        print(f"wandb cannot be reached ({(str(error).splitlines() or [''])[0]}): {kept}", file=sys.stderr)
        return begin("offline")


def _init_wandb(
    tracking: Tracking,
    run_dir: Path,
    config: dict[str, Any],
    tracking_id: str | None,
    mode: Literal["online", "offline"],
) -> Any:
    import wandb

    run = wandb.init(
        project=redact(tracking.project),
        name=None if tracking.name is None else redact(tracking.name),
        id=tracking_id,
        resume="allow",
        mode=mode,
        dir=str(run_dir),
        config=config,
        settings=wandb.Settings(
            console="off",
            save_code=False,
            disable_git=True,
            silent=True,  # it would write to stdout after the run's result
            x_disable_meta=True,
            init_timeout=WANDB_SECONDS,
            finish_timeout=300,
        ),
    )
    if mode == "online":
        print(f"wandb: {run.url}", file=sys.stderr)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _logged(row: dict[str, Any]) -> dict[str, Any]:
    """A row as wandb takes it. Histograms of shares have the same bins at every step."""
    import numpy as np
    import wandb

    if row["kind"] == "task":
        place, told = f"task_{row['evaluated']}/{row['task']}", row["result"]
        told = {**told.get("metrics", {}), **{key: part for key, part in told.items() if key != "metrics"}}
        return {f"{place}_{key}": part for key, part in told.items() if isinstance(part, int | float)}
    kind = f"evaluation_{row['model']}" if row.get("model") in AFTER_TRAINING else row["kind"]
    sent: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list) and key.endswith("_by_layer"):
            known = [part for part in value if part is not None]
            bounds = (0.0, 1.0) if key.startswith("sparsity") else None
            sent[f"{kind}/{key}"] = wandb.Histogram(np_histogram=np.histogram(known, bins=32, range=bounds))
            if row["kind"] == "evaluation":
                sent |= {f"{kind}_{key}/{layer:02d}": part for layer, part in enumerate(value)}
        elif isinstance(value, dict):
            sent |= {f"{kind}/{key}_{part}": v for part, v in value.items() if isinstance(v, int | float)}
        elif isinstance(value, int | float) and key != "step":
            sent[f"{kind}/{key}"] = value
    return sent
