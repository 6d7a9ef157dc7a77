"""Export to a folder that vLLM serves with the model's own activation.

In: a model with a sparse activation. Out: for ReLU and FATReLU of a plain Llama the form that stock vLLM loads, its
MiniCPM class with the scalings undone; for the rest this project's own format, which vLLM loads with our plug-in.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prosparse.activations import ACTIVATIONS
from prosparse.exporters.hf import PROBE_TEXT, TOLERANCE, Card, export_hf, probe_ids, replacing, seal
from prosparse.ffn import activation_of, put_sparse_ffns, round_bf16
from prosparse.models.folding import fold_minicpm
from prosparse.models.formats import STOCK_ACTIVATIONS, family, inherited, stock_config
from prosparse.models.load import build_model
from prosparse.models.minicpm import MiniCPMConfig
from prosparse.vllm_plugin import FAMILIES

SPARSE_ACTIVATIONS = [name for name in ACTIVATIONS if name not in STOCK_ACTIVATIONS or name == "relu"]


def export_vllm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: str | Path,
    dtype: torch.dtype,
    plug_in: bool = True,
    card: Card | None = None,
) -> dict:
    """Write the folder `out` and return what was written, which vLLM serves it and by which command.

    A MiniCPM for the plug-in is folded into a Llama: folding_logit_difference is how far that moved its logits.
    plug_in: False refuses what needs the plug-in. card: what README.md shall say. Atomic and checked as `export_hf`;
    the stock form is loaded again through this project's MiniCPM class, which computes what vLLM's does.
    Raises ValueError if the model's activation is dense or vLLM cannot serve it, RuntimeError if the folder does not
    load as the same model; nothing is left behind then.
    """
    activation, param = activation_of(model)
    if activation not in SPARSE_ACTIVATIONS:
        raise ValueError(
            f"the model's activation is {activation}, which is not sparse: vLLM serves its folder as it is; "
            f"format=vllm is for {', '.join(SPARSE_ACTIVATIONS)}"
        )
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype is {dtype}: format=vllm writes {' and '.join(map(str, TOLERANCE))}")
    name = family(model.config)
    if name not in (*FAMILIES, "minicpm"):
        raise ValueError(f"format=vllm cannot carry the family {name}: it is for {', '.join(FAMILIES)} and minicpm")
    state_dict = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    obstacles = stock_obstacles(model, activation)
    if obstacles and not plug_in:
        raise ValueError(f"stock vLLM cannot carry {'; '.join(obstacles)}: leave out plug_in=false and use the plug-in")
    out = Path(out).expanduser().resolve()
    said = {"format": "vllm", "plug_in": bool(obstacles), "obstacles": obstacles}
    if not obstacles:
        said["serve"] = f"stock vLLM loads it: vllm serve {out}"
        return _export_stock(model, activation, param, tokenizer, out, dtype, state_dict, said, card)
    said["serve"] = (
        f"vLLM needs the plug-in ({'; '.join(obstacles)}): pip install --no-deps -e PATH_OF_THE_CLONE "
        f"beside vLLM, then vllm serve {out}"
    )
    if name == "minicpm":  # its architecture's name belongs to stock vLLM
        source, model = model, fold_minicpm(model)
        token_ids = torch.tensor(probe_ids(model.config))
        with torch.no_grad():
            before, after = (made(token_ids.to(made.device)).logits.float().cpu() for made in (source, model))
        said["folding_logit_difference"] = (after - before).abs().max().item()
        state_dict = dict(model.state_dict())
    generation = model.generation_config
    how: dict = {"own": True, "said": said, "card": card}
    return export_hf(state_dict, model.config, activation, param, tokenizer, generation, out, dtype, **how)


def stock_obstacles(model: PreTrainedModel, activation: str) -> list[str]:
    """What of the model vLLM's MiniCPM class cannot compute, in words; empty if that form carries it."""
    config, names = model.config, list(model.state_dict())
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    bias = next((name for name in names if name.endswith(".bias")), None)
    found = {
        f"activation {activation}": activation not in ("relu", "fatrelu"),
        f"head_dim {head_dim} where hidden_size / heads is {hidden / heads:g}": head_dim * heads != hidden,
        f"biases ({bias})": bias is not None,
        "qk-norm": any(".q_norm." in name for name in names),
        f"a sliding window of {window}": window is not None,
        "fused projections (gate_up_proj)": any(".gate_up_proj." in name for name in names),
    }
    return [what for what, holds in found.items() if holds]


def greater_than(threshold: float) -> float:
    """The float32 t' for which x > t', vLLM's cut, is x >= threshold, ours; 0 stays 0, where both give the same."""
    cut = torch.tensor(threshold, dtype=torch.float32)
    return torch.nextafter(cut, torch.tensor(-math.inf)).item() if threshold != 0 else 0.0


def _export_stock(
    model: PreTrainedModel,
    activation: str,
    param: float,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    dtype: torch.dtype,
    state_dict: dict[str, Tensor],
    said: dict,
    card: Card | None,
) -> dict:
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    undone = {"scale_emb": 1, "scale_depth": math.sqrt(layers), "dim_model_base": hidden}
    values = {key: value for key, value in inherited(model.config).items() if key != "sliding_window"}
    if family(model.config) != "minicpm":  # whose own keys they are; others' configs may bear them astray
        values |= undone
    with replacing(out, "vllm") as folder:
        reference = build_model(stock_config(model.config), state_dict, dtype)
        put_sparse_ffns(reference, activation, param)
        cut = round_bf16(param) if dtype == torch.bfloat16 else param  # torch compares bf16 gates with a bf16 number
        config = MiniCPMConfig(**values, hidden_act="fatrelu", hidden_act_param=greater_than(cut))
        written = build_model(config, reference.state_dict(), dtype)
        written.generation_config = model.generation_config
        written.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        file = folder / "config.json"
        kept = json.loads(file.read_text()) | {"model_type": "llama", "num_experts": 0}
        file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
        result = {
            "model_type": "llama",
            "activation": activation,
            "param": float(param),
            "dtype": str(dtype).removeprefix("torch."),
            **_verify_stock(folder, reference, tokenizer),
        }
        return seal(folder, out, result | said, card)


def _verify_stock(folder: Path, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict:
    """Load what was written through this project's MiniCPM class and compare logits and token ids; as hf.verify."""
    values = json.loads((folder / "config.json").read_text())
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    loaded = build_model(MiniCPMConfig.from_dict(values), weights, reference.dtype)
    token_ids = torch.tensor(probe_ids(reference.config))
    with torch.no_grad():
        expected, seen = (made(token_ids).logits.float() for made in (reference, loaded))
    difference, bound = (seen - expected).abs().max().item(), TOLERANCE[reference.dtype] * expected.abs().max().item()
    if not difference <= bound:
        raise RuntimeError(f"the export loads as another model: a logit differs by {difference:.3g}, over {bound:.3g}")
    if (
        tokenizer is not None
        and AutoTokenizer.from_pretrained(folder)(PROBE_TEXT)["input_ids"] != (tokenizer(PROBE_TEXT)["input_ids"])
    ):
        raise RuntimeError("the export loads as another model: its tokenizer gives other token ids")
    return {"class": values["architectures"][0], "max_logit_difference": difference, "logit_difference_bound": bound}
