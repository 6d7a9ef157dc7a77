"""Export to a Hugging Face folder that loads without prosparse.

In: weights under the base model's names, its config, an activation. Out: safetensors, config, tokenizer and, for an
activation that transformers lacks, one self-contained modeling file; reloaded in a fresh process, then renamed.
"""

import errno
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prosparse import ffn
from prosparse.activations import ACTIVATIONS, intermediate
from prosparse.card import CARD
from prosparse.ffn import activation_of, put_sparse_ffns, sparse_ffns
from prosparse.models import SPARSE_CLASSES, sparse
from prosparse.models.formats import released_config, stock_config
from prosparse.models.load import build_model
from prosparse.telemetry import write_atomically

RESULT = "result.json"  # what the export says of itself, and the mark by which a later one may replace it
Card = Callable[[dict], str]  # makes README.md of what the export says of itself
PROBE_TEXT = "The sparse model says: def f(x): return x + 1\n"
# Largest difference of a logit, as a share of the largest logit. Weights, kernels and threads are the same in both
# processes, so the difference is 0 unless the kernels sum in another order (memory alignment): the bounds are some
# hundred roundings in fp32 and two in bf16. The activation and its threshold are compared by value, not by logits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def export_hf_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: str | Path,
    dtype: torch.dtype,
    max_shard_size: str = "5GB",
    card: Card | None = None,
) -> dict:
    """`export_hf` of a loaded model: stock, substituted or of a sparse class."""
    activation, param = activation_of(model)
    assert all((made.activation, made.param) == (activation, param) for made in sparse_ffns(model))
    state_dict = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return export_hf(
        state_dict,
        model.config,
        activation,
        param,
        tokenizer,
        model.generation_config,
        out,
        dtype,
        max_shard_size=max_shard_size,
        card=card,
    )


def export_hf(
    state_dict: dict[str, Tensor],
    config: PreTrainedConfig,
    activation: str,
    param: float,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: GenerationConfig | None,
    out: str | Path,
    dtype: torch.dtype,
    max_shard_size: str = "5GB",
    own: bool = False,
    said: dict | None = None,
    card: Card | None = None,
) -> dict:
    """Write the model to the folder `out` and return what was written and how far the reloaded logits differ.

    state_dict: CPU tensors under the base model's names; tied weights may be absent or given twice. config: of the base
    family, or of an earlier export of it. param: the threshold (shifted_relu: the offset) as it shall stand in
    config.json. own: write this project's class where the stock one would do. said: more for result.json.
    card: what README.md shall say.
    Memory: the model once in `dtype` here and once in the fresh process.

    Raises ValueError if `out` holds anything but an earlier export or cannot be written, or the family has no format;
    RuntimeError if the folder does not load in a fresh process as the same model. Nothing is left behind then.
    """
    out = Path(out).expanduser().resolve()
    exported_config = released_config(config, activation, param, own)
    said = {"format": "hf"} | (said or {})
    with replacing(out, said["format"]) as folder:
        reference = build_model(stock_config(config), state_dict, dtype)
        put_sparse_ffns(reference, activation, param)  # a public release's threshold may not be a bf16 number
        model = build_model(exported_config, reference.state_dict(), dtype)
        model_class = SPARSE_CLASSES.get(model.config.model_type)
        if model_class is not None:
            file = f"modeling_{model.config.model_type}"
            (folder / f"{file}.py").write_text(modeling_source(model_class))
            model.config.auto_map = {
                "AutoConfig": f"{file}.{model_class.config_class.__name__}",
                "AutoModelForCausalLM": f"{file}.{model_class.__name__}",
            }
        if generation_config is not None:
            model.generation_config = generation_config
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        result = {
            "model_type": model.config.model_type,
            "activation": activation,
            "param": float(param),
            "dtype": str(dtype).removeprefix("torch."),
            **verify(folder, reference, activation, param, tokenizer),
        }
        return seal(folder, out, said | result, card)


def seal(folder: Path, out: Path, said: dict, card: Card | None = None) -> dict:
    """End the writing of `folder`, which becomes `out`: README.md by `card`, then result.json; returns the latter.

    result.json has what is `said`, the files and their bytes.
    """
    result = {"verb": "export", "out": str(out), **said}
    if card is not None:
        (folder / CARD).write_text(card(result | {"files": _files(folder)}))
    for weights in folder.glob("*.safetensors"):  # written for their owner alone
        weights.chmod((folder / "config.json").stat().st_mode)
    result |= {"files": _files(folder), "bytes": _bytes(folder)}
    (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    return result


def put_card(out: str | Path, card: Card) -> dict:
    """Replace README.md of an export that has one, and its bytes in result.json, which is returned.

    Each file is whole at every moment, and the list of files does not change.
    """
    folder = Path(out)
    result = json.loads((folder / RESULT).read_text())
    assert CARD in result["files"], f"{folder} was exported without a card"
    write_atomically(folder / CARD, card(result))
    result["bytes"] = _bytes(folder)
    write_atomically(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in _files(folder) if name != RESULT)


def modeling_source(model_class: type[PreTrainedModel]) -> str:
    """The text of a module with `model_class` and its config class that imports only torch and transformers."""
    config_class = model_class.config_class
    assert config_class is not None
    stock = sorted(base.__name__ for base in (config_class.__bases__[0], model_class.__bases__[0]))
    functions = dict.fromkeys(ACTIVATIONS.values())
    table = [f'    "{name}": {function.__name__},' for name, function in ACTIVATIONS.items()]
    text = inspect.getsource(model_class)
    helpers = [part for part in (sparse.stock_activation, sparse.scale_output) if part.__name__ in text]
    forms: list[Any] = [ffn.SparseFFN, *ffn.FORMS, ffn.by_expert, ffn.ffn_forms, ffn.put_sparse_ffns]
    parts = [
        f'"""{model_class.__name__} for Hugging Face transformers: {stock[1]} with sparse feed-forward layers.\n\n'
        'Written by prosparse from its own source; load the folder with trust_remote_code=True.\n"""\n\n'
        "from collections.abc import Callable, Iterator\n"
        "from contextlib import contextmanager\n\n"
        "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\nfrom torch import Tensor\n"
        f"from transformers import {stock[0]}, {stock[1]}, PreTrainedConfig",
        *(inspect.getsource(function) for function in functions),
        "\n".join(["ACTIVATIONS = {", *table, "}"]),
        f"ACTIVATION_KEYS = {ffn.ACTIVATION_KEYS}",
        *(inspect.getsource(part) for part in (intermediate, *forms)),
        f"FORMS = ({', '.join(form.__name__ for form in ffn.FORMS)},)",
        *(inspect.getsource(part) for part in (ffn.activation_key, *helpers, config_class, model_class)),
    ]
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def verify(
    folder: Path, reference: PreTrainedModel, activation: str, param: float, tokenizer: PreTrainedTokenizerBase | None
) -> dict:
    """Load `folder` in a fresh process and compare class, activations, token ids and logits with the `reference`.

    Returns the loaded class, the largest difference of a logit and its bound; raises RuntimeError if they do not agree.
    """
    config, dtype = reference.config, reference.dtype
    token_ids = probe_ids(config)
    with torch.no_grad():
        expected = reference(torch.tensor(token_ids)).logits.float()
    with tempfile.TemporaryDirectory(prefix="prosparse-reload-") as scratch:
        job: dict[str, Any] = {
            "folder": str(folder),
            "trust_remote_code": "auto_map" in json.loads((folder / "config.json").read_text()),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "token_ids": token_ids,
            "text": PROBE_TEXT if tokenizer is not None else None,
            "logits": f"{scratch}/logits.safetensors",
        }
        seen = reload_in_fresh_process([job], Path(scratch))[0]
        logits = load_file(job["logits"])["logits"].float()
    difference, bound = (logits - expected).abs().max().item(), TOLERANCE[dtype] * expected.abs().max().item()
    text_ids = tokenizer(PROBE_TEXT)["input_ids"] if tokenizer is not None else None
    for holds, problem in (
        (not seen["imports_prosparse"], "its modeling file imports prosparse"),
        (not seen["problems"], f"weights are missing or surplus: {', '.join(seen['problems'])}"),
        (
            all(pair == [activation, float(param)] for pair in seen["activations"]),
            f"its activations are {seen['activations']}, not {activation} with {param}",
        ),
        (difference <= bound, f"a logit differs by {difference:.3g}, more than {bound:.3g}"),
        (seen["text_ids"] == text_ids, "its tokenizer gives other token ids"),
    ):
        if not holds:
            raise RuntimeError(f"the export loads as another model in a fresh process: {problem}")
    return {"class": seen["class"], "max_logit_difference": difference, "logit_difference_bound": bound}


def probe_ids(config: PreTrainedConfig) -> list[list[int]]:
    """The tokens whose logits are compared, [1, 32]."""
    return [[(37 * position + 11) % config.vocab_size for position in range(32)]]


def reload_in_fresh_process(jobs: list[dict], scratch: Path) -> list[dict]:
    """Run `reload.py` on the jobs, offline and on the CPU; returns what it says of each."""
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("reload.py")
    process = subprocess.run(
        [
            sys.executable,
            "-P",
            str(script),
            str(scratch / "jobs.json"),
        ],  # -P: the folder of reload.py stays out of sys.path
        cwd=scratch,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(scratch / "modules"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        reason = next((line for line in reversed(process.stderr.splitlines()) if line.strip()), "no message")
        raise RuntimeError(f"the export does not load in a fresh process (exit code {process.returncode}): {reason}")
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


@contextmanager
def replacing(out: Path, form: str, name: str | None = None) -> Iterator[Path]:
    """A temporary sibling that takes the place of `out` when the block ends well and vanishes when it does not.

    Raises ValueError if `out` holds anything but an earlier export of the format `form` and, of a GGUF, of this `name`.
    """
    _check_replaceable(out, form, name)
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error.strerror}): choose another folder") from error
    try:
        yield temporary
        if out.exists():
            os.rename(out, old)
        os.rename(temporary, out)
        shutil.rmtree(old, ignore_errors=True)
    except (SafetensorError, OSError) as error:  # the former is a full disk, too, most likely
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"out={out} cannot be written: {getattr(error, 'strerror', error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(out: Path, form: str, name: str | None) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"out={out} is a file: give a folder")
    found = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    if not found:
        return
    try:
        result = json.loads((out / RESULT).read_text())
        result = result.get("export", result)  # a verb that exports at its end nests it in its own result
        ours = {RESULT, *result["files"]} if result["verb"] == "export" else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours = set()
    if found - ours:
        foreign = min(found - ours)
        raise ValueError(f"out={out} holds {foreign}, which is no part of an earlier export: choose another folder")
    if (result.get("format"), result.get("gguf")) != (form, name):
        held = result.get("gguf") or f"format={result.get('format')}"
        raise ValueError(f"out={out} holds an earlier export, {held}, and not {name or form}: choose another folder")
