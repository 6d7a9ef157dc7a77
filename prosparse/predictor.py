"""Predictors: small networks that say, before an FFN is computed, which of its neurons will fire.

In: a sparse model with Llama-like layers and token rows of two sets of documents. Out: OUT/model_{layer}.pt (fc1.weight
[rank, hidden], fc2.weight [neurons, rank]), OUT/config.json and OUT/activation/, as PowerInfer's tools read them.

A neuron counts as predicted if its entry of fc2(relu(fc1(h))) is at least the cutoff; h is the residual before the
FFN's norm, as PowerInfer's graph has it. One pass over the rows writes h and the labels, a bit each, to scratch files
in OUT, so that a model's activations need not fit into memory; the predictors are then trained layer by layer.
"""

import errno
import json
import pickle
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prosparse.data import batch as make_batch
from prosparse.ffn import FusedFFN, SeparateFFN, activation_of, ffn_forms, find_ffns
from prosparse.sparsity import measure, spread
from prosparse.telemetry import duration
from prosparse.verb_configs import Predict

WITH_ZEROS = ("relu", "fatrelu", "drelu", "shifted_relu", "relu2")
CHUNK = 4096  # tokens evaluated together


class Predictor(nn.Module):
    """fc2(relu(fc1(h))): [..., neurons], fp32; h: [..., hidden]. Without biases, so its sign ignores the scale of h."""

    def __init__(self, hidden: int, rank: int, neurons: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden, rank, bias=False)
        self.fc2 = nn.Linear(rank, neurons, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(hidden.float())))


def places(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """Of every layer the module that the residual before the FFN's norm enters, and the one that x1 enters.

    Raises ValueError for layers that are not like Llama's: parallel, with more norms, ungated, with experts.
    """
    find_ffns(model)
    found = []
    for name, form in ffn_forms(model).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        norms = [child for child, _ in layer.named_children() if "norm" in child]
        if form not in (SeparateFFN, FusedFFN) or norms != ["input_layernorm", "post_attention_layernorm"]:
            raise ValueError(
                f"{type(model).__name__}: predictors need layers like Llama's, with a gated FFN after "
                f"post_attention_layernorm; {type(layer).__name__} has {form.__name__} and {', '.join(norms)}"
            )
        found.append((layer.get_submodule("post_attention_layernorm"), model.get_submodule(f"{name}.down_proj")))
    return found


@contextmanager
def only_predicted(model: PreTrainedModel, predictors: Sequence[Predictor], cutoff: float) -> Iterator[None]:
    """While the block runs, neurons that their layer's predictor puts below `cutoff` are 0 in the intermediate."""
    kept: dict[int, Tensor] = {}

    def predict(layer: int, args: tuple[Tensor]) -> None:
        kept[layer] = predictors[layer](args[0]) >= cutoff

    def mask(layer: int, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.where(kept.pop(layer), args[0], 0.0),)

    with _hooks(model, predict, mask):
        yield


@contextmanager
def _hooks(model: PreTrainedModel, residual: Any, intermediate: Any) -> Iterator[None]:
    handles = []
    for layer, modules in enumerate(places(model)):
        for module, see in zip(modules, (residual, intermediate), strict=True):
            handles.append(module.register_forward_pre_hook(lambda _, args, see=see, layer=layer: see(layer, args)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- what is learned from ---------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """What one pass saw. In `folder`, of each layer: hidden-N, [tokens, hidden] in `dtype`; labels-N, bits by token."""

    folder: Path
    dtype: torch.dtype
    tokens: int
    active: Tensor  # int64 [layers, neurons]: tokens at which x1 is not 0
    labeled: Tensor  # int64 [layers]: neurons labeled active, summed over tokens

    def hidden(self, layer: int) -> Tensor:
        """[tokens, hidden], memory-mapped."""
        path = self.folder / f"hidden-{layer}"
        size = path.stat().st_size // self.dtype.itemsize
        return torch.from_file(str(path), size=size, dtype=self.dtype).view(self.tokens, -1)

    def labels(self, layer: int) -> np.ndarray:
        """uint8 [tokens, neurons / 8], memory-mapped; see `unpacked`."""
        return np.memmap(self.folder / f"labels-{layer}", np.uint8, "r").reshape(self.tokens, -1)

    def unpacked(self, bits: np.ndarray) -> Tensor:
        """Rows of `labels` as 0 and 1: fp32 [rows, neurons]."""
        return torch.from_numpy(np.unpackbits(bits, axis=1, count=self.active.shape[1])).float()


@torch.no_grad()
def record(
    model: PreTrainedModel, rows: Sequence[np.ndarray], indices: Sequence[int], folder: Path, how: Predict
) -> Recording:
    """Run the rows named by `indices` and write each layer's residuals and labels to `folder`, which is made.

    A neuron is labeled active where x1 is not 0 and, with how.top, among that share of the largest |x1| of its token.
    """
    folder.mkdir()
    layers, neurons = len(places(model)), places(model)[0][1].weight.shape[-1]
    active, labeled = torch.zeros(layers, neurons, dtype=torch.int64), torch.zeros(layers, dtype=torch.int64)
    files = {
        (kind, layer): open(folder / f"{kind}-{layer}", "wb")  # noqa: SIM115
        for kind in ("hidden", "labels")
        for layer in range(layers)
    }
    clock = _Clock(f"recording {folder.name.replace('_', '-')} rows", len(indices))

    def residual(layer: int, args: tuple[Tensor]) -> None:
        files["hidden", layer].write(args[0].flatten(0, -2).cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def intermediate(layer: int, args: tuple[Tensor]) -> None:
        x1 = args[0].flatten(0, -2)
        labels = x1 != 0
        active[layer] += labels.sum(0).cpu()
        if how.top is not None:
            size = x1.abs()
            labels &= size >= size.topk(max(1, int(how.top * neurons)), dim=-1).values[:, -1:]
        labeled[layer] += labels.sum().cpu()
        files["labels", layer].write(np.packbits(labels.cpu().numpy(), axis=1).tobytes())

    tokens = 0
    try:
        with _hooks(model, residual, intermediate):
            for start in range(0, len(indices), how.batch):
                data = make_batch(rows, indices[start : start + how.batch]).to(model.device)
                model(**data.inputs(), use_cache=False, logits_to_keep=1)
                tokens += data.input_ids.numel()
                clock.tell(start + how.batch)
    finally:
        for file in files.values():
            file.close()
    return Recording(folder, model.dtype, tokens, active, labeled)


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """A predictor on one layer's held-out tokens, by cutoff: shares of the labeled found and of all left out."""

    recall: list[float]
    predicted_sparsity: list[float]


@torch.no_grad()
def judge(predictor: Predictor, recording: Recording, layer: int, cutoffs: Sequence[float]) -> Seen:
    """Recall (1 where nothing is labeled) and predicted sparsity of one layer at each cutoff."""
    hidden, bits, device = recording.hidden(layer), recording.labels(layer), predictor.fc1.weight.device
    found, predicted = torch.zeros(2, len(cutoffs), dtype=torch.int64)
    for start in range(0, recording.tokens, CHUNK):
        logits = predictor(hidden[start : start + CHUNK].to(device))
        labels = recording.unpacked(bits[start : start + CHUNK]).to(device) == 1
        for number, cutoff in enumerate(cutoffs):
            chosen = logits >= cutoff
            predicted[number] += chosen.sum().cpu()
            found[number] += (chosen & labels).sum().cpu()
    labeled = recording.labeled[layer].item()
    elements = recording.tokens * recording.active.shape[1]
    recall = (found / labeled).tolist() if labeled else [1.0] * len(cutoffs)
    return Seen(recall, (1 - predicted / elements).tolist())


def fit(
    train: Recording, held_out: Recording, layer: int, rank: int, how: Predict, device: torch.device
) -> tuple[Predictor, int]:
    """A predictor of one layer, rounded to fp16, and the epochs it took.

    Binary cross-entropy in which actives weigh 1 and the others density + 0.005, as in the authors' predictors. Kept
    is the epoch with the largest recall + predicted sparsity on held-out tokens (recall alone grows by predicting
    everything); how.patience epochs without a larger one end the training.
    Trained on h over its own root mean square, each dimension brought to one size; both are folded into the weights.
    """
    generator = torch.Generator().manual_seed(how.seed + layer)
    hidden, bits = train.hidden(layer), train.labels(layer)
    sample = hidden[torch.randperm(train.tokens, generator=generator)[:CHUNK].sort().values].float()
    typical = sample.square().mean(-1).sqrt().mean().item()
    size = _normed(sample).square().mean(0).sqrt()
    size = size.clamp(min=1e-3 * size.mean()).to(device)
    weight = train.labeled[layer].item() / (train.tokens * train.active.shape[1]) + 0.005
    with torch.random.fork_rng():
        torch.manual_seed(how.seed + layer)
        network = Predictor(hidden.shape[1], rank, train.active.shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=how.lr, weight_decay=0.01)
    best, score, epoch, waited = network, -1.0, 0, 0
    while epoch < how.epochs and waited < how.patience:
        for chosen in torch.randperm(train.tokens, generator=generator).split(how.tokens):
            labels = train.unpacked(bits[chosen.numpy()]).to(device)
            logits = network(_normed(hidden[chosen].to(device)) / size)
            loss = F.binary_cross_entropy_with_logits(logits, labels, labels * (1 - weight) + weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        epoch, waited = epoch + 1, waited + 1
        folded = deepcopy(network).requires_grad_(False)
        folded.fc1.weight.div_(size)
        folded.fc2.weight.div_(typical)
        folded.half().float()  # what is judged is what is saved
        seen = judge(folded, held_out, layer, [0.0])
        if seen.recall[0] + seen.predicted_sparsity[0] > score:
            best, score, waited = folded, seen.recall[0] + seen.predicted_sparsity[0], 0
    return best, epoch


def _normed(hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-12)


def predict(
    model: PreTrainedModel, train_rows: Sequence[np.ndarray], held_out_rows: Sequence[np.ndarray], how: Predict
) -> dict:
    """Train the predictors of every layer of `model`, write them to how.out, and return what they find and cost.

    Rows of the two sets are of different documents. how.recall: in each layer the rank doubles, up to hidden, until the
    recall at how.cutoff on held-out tokens reaches it.
    Raises ValueError for an activation without zeros, for other layers than Llama's, and for a folder with other files.
    """
    name, _ = activation_of(model)
    if name not in WITH_ZEROS:
        raise ValueError(f"the model's activation is {name}, which has no zeros to predict: train it with relu first")
    hidden = places(model)[0][0].weight.shape[-1]
    start = how.rank or max(1, hidden // (4 if how.recall is None else 16))
    if start > hidden:
        raise ValueError(f"rank is {start}, more than the model's {hidden} dimensions: lower it")
    out = Path(how.out).expanduser()
    cutoffs = sorted({*how.cutoffs, how.cutoff})
    at = cutoffs.index(how.cutoff)
    device, layers = model.device, len(places(model))
    model.eval()
    chosen = spread(len(held_out_rows), how.evaluate_rows)
    with _scratch(out) as recorded:
        made = recorded / "made"
        (made / "activation").mkdir(parents=True)
        train = record(model, train_rows, spread(len(train_rows), how.rows), recorded / "training", how)
        held_out = record(model, held_out_rows, chosen, recorded / "held_out", how)
        predictors, seen, by_layer = [], [], []
        clock = _Clock("layer", layers)
        for layer in range(layers):
            rank = start
            while True:
                predictor, epochs = fit(train, held_out, layer, rank, how, device)
                judged = judge(predictor, held_out, layer, cutoffs)
                if how.recall is None or judged.recall[at] >= how.recall or rank == hidden:
                    break
                rank = min(2 * rank, hidden)
            predictors.append(predictor)
            seen.append(judged)
            by_layer.append(
                {
                    "rank": rank,
                    "epochs": epochs,
                    "recall": judged.recall[at],
                    "predicted_sparsity": judged.predicted_sparsity[at],
                    "sparsity": 1 - held_out.active[layer].sum().item() / (held_out.tokens * held_out.active.shape[1]),
                }
            )
            torch.save({key: value.half().cpu() for key, value in predictor.state_dict().items()}, made / _file(layer))
            frequency = train.active[layer] / train.tokens
            torch.save(frequency, made / "activation" / f"activation_{layer}.pt")
            clock.tell(layer + 1, f"rank {rank}  recall {judged.recall[at]:.1%}", always=True)
        (made / "config.json").write_text(json.dumps({"sparse_threshold": how.cutoff}) + "\n")
        sweep = []
        whole = measure(model, held_out_rows, batch=how.batch, indices=chosen).perplexity
        share = held_out.labeled / held_out.labeled.sum().clamp(min=1)
        for number, cutoff in enumerate(cutoffs):
            with only_predicted(model, predictors, cutoff):
                perplexity = measure(model, held_out_rows, batch=how.batch, indices=chosen).perplexity
            sweep.append(
                {
                    "cutoff": cutoff,
                    "recall": sum(share[layer].item() * part.recall[number] for layer, part in enumerate(seen)),
                    "predicted_sparsity": sum(part.predicted_sparsity[number] for part in seen) / layers,
                    "perplexity": perplexity,
                }
            )
            print(
                "cutoff {cutoff:<6g} recall {recall:6.1%}  predicted sparsity {predicted_sparsity:6.1%}  "
                "perplexity {perplexity:.3f}".format(**sweep[-1]),
                file=sys.stderr,
            )
        result = {
            "verb": "predict",
            **sweep[at],
            "sparsity": sum(part["sparsity"] for part in by_layer) / layers,
            "perplexity_all_neurons": whole,
            "training_tokens": train.tokens,
            "held_out_tokens": held_out.tokens,
            "by_layer": by_layer,
            "sweep": sweep,
        }
        _put(made, out)
    return result


def load_predictors(folder: str | Path, layers: int, hidden: int, neurons: int) -> tuple[list[Predictor], float]:
    """The predictors in `folder` and their cutoff; raises ValueError if they are not those of a model of this shape.

    Each is fc1.weight and fc2.weight and no more, of finite numbers.
    """
    folder = Path(folder).expanduser()
    predictors = []
    try:
        cutoff = float(json.loads((folder / "config.json").read_text())["sparse_threshold"])
        for layer in range(layers):
            weights = torch.load(folder / _file(layer), map_location="cpu", weights_only=True)
            if len(weights) != 2:
                raise ValueError(f"predictors={folder}: {_file(layer)} holds more than fc1.weight and fc2.weight")
            fc1, fc2 = (weights[key].float() for key in ("fc1.weight", "fc2.weight"))
            rank = fc1.shape[0]
            if not all(part.isfinite().all() for part in (fc1, fc2, torch.tensor(cutoff))):
                raise ValueError(
                    f"predictors={folder}: {_file(layer)} or the cutoff, {cutoff}, has a number not finite"
                )
            if fc1.shape != (rank, hidden) or fc2.shape != (neurons, rank):
                raise ValueError(
                    f"predictors={folder}: {_file(layer)} is {list(fc1.shape)}, {list(fc2.shape)}, and the model needs "
                    f"[rank, {hidden}], [{neurons}, rank]: train them on this model with prosparse predict"
                )
            predictor = Predictor(hidden, rank, neurons)
            predictor.load_state_dict({"fc1.weight": fc1, "fc2.weight": fc2})
            predictors.append(predictor.requires_grad_(False))
            if torch.load(folder / "activation" / f"activation_{layer}.pt", weights_only=True).shape != (neurons,):
                raise ValueError(f"predictors={folder}: activation_{layer}.pt does not hold {neurons} frequencies")
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"predictors={folder} cannot be read ({error}): make them with prosparse predict") from error
    if (folder / _file(layers)).exists():
        raise ValueError(f"predictors={folder} are of more than the model's {layers} layers: train them on this model")
    return predictors, cutoff


def trained_on(folder: str | Path) -> str | None:
    """The checkpoint that `prosparse predict` made the predictors in `folder` of; None if another program made them."""
    said = Path(folder).expanduser() / "result.json"
    return json.loads(said.read_text()).get("checkpoint") if said.exists() else None


def _file(layer: int) -> str:
    return f"model_{layer}.pt"


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A hidden folder in `out`, for as long as the block runs; if it fails, `out` goes, too, where there was none."""
    there = out.exists()
    _claim(out)
    try:
        with TemporaryDirectory(prefix=".predict-", dir=out) as scratch:
            yield Path(scratch)
    except BaseException as error:
        if not there:
            with suppress(OSError):
                out.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"out={out} cannot be written: {error.strerror}") from error
        raise


def _claim(out: Path) -> None:
    """Make the folder if needed; it is empty, or of an earlier `predict`, or has nothing but what is hidden."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in out.iterdir() if not path.name.startswith(".")]
        result = json.loads((out / "result.json").read_text()) if "result.json" in foreign else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"out={out} cannot be used ({error}): choose another folder") from error
    if foreign and result.get("verb") != "predict":
        raise ValueError(f"out={out} holds {min(foreign)}, which no earlier predict made: choose another folder")


def _put(made: Path, out: Path) -> None:
    """Move all that was made into `out`, in the place of an earlier result."""
    for old in (out / "result.json", *out.glob("model_*.pt"), out / "config.json"):
        old.unlink(missing_ok=True)
    shutil.rmtree(out / "activation", ignore_errors=True)
    for path in made.iterdir():
        path.rename(out / path.name)


class _Clock:
    """Says on stderr how far a loop is and how long the rest will take, at most every 10 seconds or when told to."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.start = what, total, time.monotonic()
        self.told = self.start

    def tell(self, done: int, more: str = "", always: bool = False) -> None:
        now, done = time.monotonic(), min(done, self.total)
        if always or now - self.told > 10:
            self.told = now
            eta = duration((now - self.start) / done * (self.total - done))
            print(f"{self.what} {done}/{self.total}  {more}  ETA {eta}", file=sys.stderr)
