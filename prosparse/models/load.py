"""The only place that opens a model.

In: a source (Hub name, Hugging Face folder, .gguf file, package://NAME/FILE, run folder or one of its checkpoints).
Out: its model in eval mode, its config or its tokenizer. No code of a source runs unless trust_remote_code is set.
"""

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.utils import logging

import prosparse.models  # registers the sparse classes
from prosparse import checkpoint, shards
from prosparse.decoding import enable_sparse_decoding
from prosparse.ffn import activation_key, substitute

PACKAGE = "package://"


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
    zero3: dict | None = None,
) -> PreTrainedModel:
    """The model in `source` with its own activation, in `dtype`, on `device`, in eval mode.

    `zero3` is a DeepSpeed config: weights of a Hub name or folder then go straight into this rank's partitions, on
    DeepSpeed's device. GGUF files and checkpoints are loaded whole. Raises ValueError that names the source if it does
    not exist, cannot be read, is damaged, or lacks weights.
    The model has `enable_sparse_decoding(...)` of prosparse.decoding as a method.
    """
    place = locate(source)
    model: Any
    if isinstance(place, Path) and place.is_file():
        model = _load_gguf(place, dtype, attention)
    elif isinstance(place, Path) and (place / "manifest.json").is_file():
        found = place != Path(source).expanduser()  # by checkpoint.find, which verified it
        manifest = checkpoint.read_manifest(place) if found else checkpoint.verify(place)
        model = _load_checkpoint(place, manifest, dtype, attention)
    else:
        partitioning = None
        if zero3 is not None:
            from transformers.integrations import HfDeepSpeedConfig

            partitioning = HfDeepSpeedConfig(zero3)  # from_pretrained looks for it for as long as it is alive
        config = load_config(source, revision=revision, trust_remote_code=trust_remote_code)
        if isinstance(place, Path) and not trust_pickle and not any(place.glob("*.safetensors")):
            raise ValueError(
                f"{source} has no safetensors: convert its weights, or, if you trust who made them (a pickle can run "
                "code), set model.trust_pickle=true (trust_pickle=true for the other verbs)"
            )
        if not trust_remote_code and config.model_type not in prosparse.models.SPARSE_CLASSES:
            _no_unknown_activation(source, config.get_text_config())
        with _one_line(source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                revision=revision,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if trust_pickle else True,
                output_loading_info=True,
            )
        model, report = loaded
        _no_weights_missing(source, report)
        if partitioning is not None:
            device = model.device
    try:
        model.generation_config.validate(strict=True)
    except (
        ValueError
    ):  # sampling values without do_sample, as in the Llama 2 release: save_pretrained would refuse them
        model.generation_config.do_sample = True
    model = model.to(device).eval()
    model.enable_sparse_decoding = partial(enable_sparse_decoding, model)
    return model


def load_config(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of the model in `source`; of a run's checkpoint that of its base model, before the substitution."""
    place = locate(source)
    with _one_line(source):
        if isinstance(place, Path) and place.is_file():
            with _quiet():
                config = AutoConfig.from_pretrained(place.parent, gguf_file=place.name)
            return _without_gguf(config)
        config = AutoConfig.from_pretrained(_hf_folder(place), revision=revision, trust_remote_code=trust_remote_code)
    if hasattr(config, "auto_map") and not trust_remote_code:
        del config.auto_map  # it names a file that our registered class does not need and a saved copy would not have
    return config


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer in `source`; raises ValueError that names the source if there is none."""
    place = locate(source)
    with _one_line(source):
        if isinstance(place, Path) and place.is_file():
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name)
            if tokenizer.eos_token == tokenizer.bos_token:  # transformers 5.17 mistakes BOS for EOS: ask the file
                config = load_config(place)
                tokenizer.eos_token_id, tokenizer.pad_token_id = config.eos_token_id, config.pad_token_id
            return tokenizer
        return AutoTokenizer.from_pretrained(_hf_folder(place), revision=revision, trust_remote_code=trust_remote_code)


def build_model(
    config: PreTrainedConfig, state_dict: dict[str, Tensor], dtype: torch.dtype, attention: str = "sdpa"
) -> PreTrainedModel:
    """The causal language model of `config` with exactly these weights, cast to `dtype`, on the CPU, in eval mode.

    Weights tied by the config may be absent or given twice; weights that are in `dtype` already are shared, not copied.
    Raises ValueError that names missing or surplus weights.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with _quiet():
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(state_dict),
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
        )
    _no_weights_missing(type(model).__name__, report)
    if report["unexpected_keys"]:
        raise ValueError(f"{type(model).__name__} has no place for {', '.join(sorted(report['unexpected_keys']))}")
    return model.eval()


def _load_gguf(file: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    with _one_line(file), _quiet():
        packed = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    # Even dequantized it calls itself quantized and refuses to be saved: keep its weights, not the model.
    model = build_model(_without_gguf(packed.config), packed.state_dict(), dtype, attention)
    model.generation_config = packed.generation_config
    return model


def _without_gguf(config: PreTrainedConfig) -> PreTrainedConfig:
    values = config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        values.pop(key, None)
    return type(config).from_dict(values)


def _load_checkpoint(folder: Path, manifest: dict, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of a run's checkpoint, from the fp32 master weights in the ranks' files."""
    if (folder / "skeleton" / "thresholds.safetensors").exists():
        raise ValueError(
            f"{folder} has thresholds by neuron, to be folded when its run ends: end it, and open RUN/model"
        )
    state_dict = shards.read_weights(checkpoint.rank_files(folder, manifest), manifest["shapes"])
    model = build_model(load_config(folder), state_dict, dtype, attention)
    if (folder / "skeleton" / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder / "skeleton")
    substitute(model, manifest["activation"]["name"], manifest["activation"]["param"])
    return model


def locate(source: str | Path) -> str | Path:
    """A Hub name as it is, anything else as the path of a .gguf file, a Hugging Face folder or a run's checkpoint."""
    name = str(source)
    if name.startswith(PACKAGE):
        path = _in_package(name)
    else:
        path = Path(name).expanduser()
        first = Path(path.parts[0]) if path.parts else path
        hub = not name.startswith(("/", ".", "~")) and not name.endswith(".gguf") and name.count("/") <= 1
        if hub and isinstance(source, str) and not path.exists() and not ("/" in name and first.is_dir()):
            return name
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{name} is a file: give a .gguf file or the folder of a model")
        return path
    if not path.is_dir():
        raise ValueError(f"{name} does not exist: give a Hub name, a folder, a .gguf file, or package://NAME/FILE")
    if (path / "config.json").is_file() or (path / "manifest.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    newest = checkpoint.find(path)
    if newest is None:
        raise ValueError(f"{name} holds no model: no config.json, no finished model/ and no complete checkpoint")
    return newest


def _in_package(name: str) -> Path:
    """The file of package://NAME/FILE, without importing the package."""
    package, _, file = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not file:
        raise ValueError(f"{name}: write package://NAME/FILE, a file inside the installed Python package NAME")
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise ValueError(f"{name}: no Python package {package} is installed here; install it with pip")
    for folder in folders:
        path = Path(folder) / file
        if not path.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{name} leads out of the package: name a file inside it")
        if path.exists():
            return path
    models = sorted(str(path.relative_to(folders[0])) for path in Path(folders[0]).rglob("*.gguf"))
    raise ValueError(f"{name}: package {package} has no file {file}; its models are: {', '.join(models) or 'none'}")


def _hf_folder(place: str | Path) -> str | Path:
    if isinstance(place, Path) and (place / "manifest.json").is_file():
        return place / "skeleton"
    return place


def _no_weights_missing(source: object, report: dict) -> None:
    if report["missing_keys"]:
        raise ValueError(
            f"{source} lacks weights that its config asks for: {', '.join(sorted(report['missing_keys']))}"
        )


def _no_unknown_activation(source: object, config: PreTrainedConfig) -> None:
    key = activation_key(config)
    name = getattr(config, key, None)
    if isinstance(name, str) and name not in ACT2FN:
        raise ValueError(f"{source}: {key} is {name}, which transformers' {config.model_type} does not have")


@contextmanager
def _one_line(source: object) -> Iterator[None]:
    """Failures to read `source` as ValueErrors of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{source} cannot be loaded: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and load reports of transformers: what matters of them is raised as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
