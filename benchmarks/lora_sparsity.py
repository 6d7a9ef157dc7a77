"""What LoRA does to a sparse model: `python benchmarks/lora_sparsity.py CHECKPOINT [steps]`, with peft installed.

In: a model that `prosparse train` made sparse; the text is the Python source of the installed torch.nn. Out: perplexity
and sparsity on its held-out files, as a table: before, with adapters on attention, on gate and up, on gate and up
trained under the L1 penalty as well, each apart from the model and merged into it.
"""

import importlib.util
import sys
import time
from pathlib import Path

import torch

from prosparse import PenaltyContext, load_model, load_tokenizer, measure, new_statistics, prepare, set_penalty
from prosparse.config import Data, Source
from prosparse.ffn import activation_of, substitute
from prosparse.sparsity import spread

ROWS, CONTEXT, MEASURED = 2, 128, 12  # rows of a step, tokens of a row, held-out rows
RANK, RATE, FACTOR = 8, 1e-3, 0.75  # FACTOR: the λ of the demo's recipe, in the unit `mean`
ADAPTERS = {
    "attention": (["q_proj", "k_proj", "v_proj", "o_proj"], 0.0),
    "gate and up": (["gate_proj", "up_proj"], 0.0),
    "gate and up, with the penalty": (["gate_proj", "up_proj"], FACTOR),
}


def main(checkpoint: str, steps: int) -> None:
    import peft

    tokenizer, text = load_tokenizer(checkpoint), str(Path(torch.__file__).parent / "nn")
    data = Data(sources={"nn": Source(path=text)}, held_out=0.1)
    prepared = prepare(data, tokenizer, [CONTEXT], len(tokenizer))[CONTEXT]
    rows, held_out = prepared.train["nn"], prepared.held_out
    print(f"{steps} steps of {ROWS} x {CONTEXT} tokens of torch.nn, rank {RANK}, learning rate {RATE}, bf16")
    print("| adapters | perplexity | sparsity | held-out tokens |\n|---|---|---|---|")
    for name, (modules, factor) in ADAPTERS.items():
        start = time.perf_counter()
        model = load_model(checkpoint, dtype=torch.bfloat16)
        substitute(model, *activation_of(model))
        if name == next(iter(ADAPTERS)):
            show("none", model, held_out)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules))
        train(adapted, model, rows, steps, factor)
        show(name, model, held_out)
        show(f"{name}, merged", adapted.merge_and_unload(), held_out)
        print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr)


def train(adapted, model, rows, steps: int, factor: float) -> None:
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=RATE, weight_decay=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    scale = torch.tensor(factor / (ROWS * CONTEXT))
    set_penalty(model, PenaltyContext(scale, new_statistics(model.config.num_hidden_layers)) if factor else None)
    adapted.train()
    for step in range(steps):
        ids = torch.stack([torch.tensor(rows[i]).long() for i in order[step * ROWS : (step + 1) * ROWS]])
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    set_penalty(model, None)


def show(name: str, model, rows) -> None:
    found = measure(model, rows, indices=spread(len(rows), MEASURED))
    print(f"| {name} | {found.perplexity:.3f} | {found.sparsity:.2%} | {found.tokens:,} |", flush=True)


if __name__ == "__main__":
    if importlib.util.find_spec("peft") is None:
        print("benchmarks/lora_sparsity.py needs peft, which prosparse does not install: pip install peft")
        sys.exit(2)
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 24)
