"""Scores the two task files in tests/tasks without lm-eval: plain loops, one text at a time, no cache, BOS once.

python tests/direct.py MODEL_FOLDER prints how many items are right and the sparsity of what was computed for each task.
"""

import json
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TASKS = Path(__file__).parent / "tasks"


def items(task: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / f"{task}.jsonl").read_text().splitlines()]


class Direct:
    """One model; `computed`: by layer the zeros and elements of what enters down_proj, of each position once."""

    def __init__(self, model, tokenizer, bos: bool):
        self.model, self.tokenizer = model, tokenizer
        self.before = [tokenizer.bos_token_id] if bos else []
        self.computed: list[list[int]] = []
        self.positions = 0

    def ids(self, text: str) -> list[int]:
        return self.before + self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].float()

    @torch.no_grad()
    def count(self, ids: list[int]) -> None:
        downs = [module for name, module in self.model.named_modules() if name.endswith("down_proj")]
        seen: list[tuple[int, int]] = []
        hooks = [
            down.register_forward_pre_hook(lambda _, x: seen.append(((x[0] == 0).sum().item(), x[0].numel())))
            for down in downs
        ]
        self.model(torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        self.computed = self.computed or [[0, 0] for _ in downs]
        for total, (zeros, elements) in zip(self.computed, seen, strict=True):
            total[0] += zeros
            total[1] += elements
        self.positions += len(ids)

    def sparsity(self) -> list[float]:
        return [zeros / elements for zeros, elements in self.computed]

    def opposites(self) -> list[int]:
        """The choice with the largest log-likelihood, of each item."""
        chosen, inputs = [], set()
        for item in items("opposites"):
            context = self.ids(f"The opposite of {item['word']} is")
            scores = []
            for choice in item["choices"]:
                whole = self.ids(f"The opposite of {item['word']} is {choice}")
                logs = self.logits(whole[:-1]).log_softmax(-1)
                scores.append(sum(logs[p - 1, whole[p]].item() for p in range(len(context), len(whole))))
                inputs.add(tuple(whole[:-1]))
            chosen.append(scores.index(max(scores)))
        for ids in sorted(inputs):
            self.count(list(ids))
        return chosen

    def series(self) -> list[str]:
        """What is written up to a comma, a line's end, EOS or six tokens, of each item."""
        written = []
        for item in items("series"):
            prompt = self.ids(f"Count on: 1, 2, 3, 4, 5\nCount on: {item['shown']},")
            new: list[int] = []
            text = ""
            while len(new) < 6 and not set(text) & {",", "\n"}:
                new.append(self.logits(prompt + new)[-1].argmax().item())
                if new[-1] == self.tokenizer.eos_token_id:
                    break
                text = self.tokenizer.decode(new, skip_special_tokens=True)
            written.append(re.split("[,\n]", text)[0])
            self.count((prompt + new)[:-1])
        return written


def right_opposites(chosen: list[int]) -> int:
    return sum(one == item["label"] for one, item in zip(chosen, items("opposites"), strict=True))


def right_series(written: list[str]) -> int:
    numbers = [(re.findall(r"-?\d+", text) or [""])[0] for text in written]
    return sum(number == item["next"] for number, item in zip(numbers, items("series"), strict=True))


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
    for name, right in (("opposites", right_opposites), ("series", right_series)):
        direct = Direct(model, tokenizer, bos=True)
        number = right(getattr(direct, name)())
        layers = direct.sparsity()
        found = {"right": number, "of": len(items(name)), "accuracy": number / len(items(name))}
        print(json.dumps(found | {"sparsity": sum(layers) / len(layers), "tokens": direct.positions}))
