"""What several tests share: tiny models, tiny text, the real launcher."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported: its kernels then run on a CPU

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
torch.set_num_threads(1)


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(
        **(sizes | heads | {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True} | changes)
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def make_tiny(root: Path, model: PreTrainedModel | None = None, **changes) -> dict[str, Path]:
    """A tiny base model with its tokenizer, text to train it on, and a place for the rows: their folders by name.

    `changes` are of the tiny Llama's config; `model`, with 300 tokens, stands in its place.
    """
    (root / "text").mkdir()
    words = [
        "a",
        "the",
        "sparse",
        "dense",
        "neuron",
        "gate",
        "layer",
        "fires",
        "rests",
        "counts",
        "often",
        "never",
        "when",
        "while",
    ]
    for number in range(60):
        lines = [" ".join(words[(i * i + j * (number + 1)) % len(words)] for j in range(12)) + "." for i in range(12)]
        (root / "text" / f"{number:02}.txt").write_text(f"document {number}\n" + "\n".join(lines))
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator((path.read_text() for path in (root / "text").glob("*.txt")), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    (model or tiny_llama(**changes)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    with open(root / "chat.jsonl", "w") as file:
        for number in range(80):
            said = [" ".join(words[(number * i + j) % len(words)] for j in range(3)) for i in range(1, 5)]
            turns = zip(("user", "assistant") * 2, said[: 2 + 2 * (number % 2)], strict=False)
            messages = [{"role": role, "content": f"{text} {number}"} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return {"model": root / "model", "text": root / "text", "chat": root / "chat.jsonl", "cache": root / "cache"}


@pytest.fixture(scope="session")
def nursery():
    """Forks groups of ranks: see tests/faults/ranks.py."""
    from ranks import Nursery

    with Nursery(notice_seconds=2.0) as process:
        yield process


def tiny_overrides(tiny: dict[str, Path], run_dir: Path) -> list[str]:
    """Overrides that make the demo's recipe a matter of seconds."""
    return [
        "model=hf",
        "data=files",
        f"model.source={tiny['model']}",
        f"data.sources.files.path={tiny['text']}",
        f"data.cache={tiny['cache']}",
        "data.held_out=0.2",
        f"run_dir={run_dir}",
        "recipe.stages.substitution.steps=3",
        "recipe.stages.rise.steps=4",
        "recipe.stages.hold.steps=3",
        "recipe.batch.context=32",
        "recipe.lr.warmup_steps=2",
        "recipe.lr.peak=1e-3",
        "recipe.shift.calibration_rows=8",
        "recipe.shift.start=0.0001",
        "micro_batch=1",
        "evaluate.rows=8",
        "threads=1",
        "save.every=2",
    ]


def script(name: str):
    """The module benchmarks/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(*arguments: str, ranks: int = 2, script: str = "launch/train.py", timeout: int = 240):
    """Start a script through DeepSpeed's own launcher on CPU ranks."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        str(ranks),
        "--master_port",
        _port(),
        script,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def prosparse(*arguments: str, timeout: int = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run one verb in a process of its own, without a launcher."""
    command = [sys.executable, "-m", "prosparse.cli", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


BITWISE = ("step", "window", "stage", "tokens", "loss", "l1", "l1_factor", "lr", "sparsity_by_layer", "grad_norm")


def trained(run_dir: Path) -> list[dict]:
    """The training rows, without what depends on the clock."""
    return [{key: row[key] for key in BITWISE} for row in metrics(run_dir) if row["kind"] == "train"]


def _port() -> str:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
