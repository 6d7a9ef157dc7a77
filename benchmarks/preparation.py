"""How fast text becomes rows, and in how much memory: `python benchmarks/preparation.py OUT [rounds [size in MB ...]]`.

In: the standard library's text with the demo's tokenizer, prepared with 1 and with 2 processes in turns; then generated
text of each size, as many documents of some 9 kB (.jsonl) and as a single one (.txt), with a tokenizer of whole words.
Out: OUT/preparation.json, tokens/s a core and the largest memory (of the process and its workers together, without the
files that are mapped: how much of a library's file counts depends on what else runs).
"""

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process stands for one core

from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from prosparse.cli import compose
from prosparse.config import Data, Source
from prosparse.models.load import load_tokenizer
from prosparse.preparation import prepare_shard

CONTEXT = 4096
LOOK_SECONDS = 0.2  # between two looks at the memory
WORDS = [f"{number:0>{100 + number % 101}}" for number in range(2000)]  # of 100 to 200 digits: fewer tokens a byte


def prepared(path: str, tokenizer: Any, processes: int, found: Any) -> None:
    """In a process of its own: prepare one text in a new cache."""
    with TemporaryDirectory(dir=".") as cache:
        data = Data(sources={"text": Source(path=path)}, cache=cache, processes=processes)
        found.put(prepare_shard(data, tokenizer, [CONTEXT], (1, 1)).to_dict())


def measured(path: str, tokenizer: Any, processes: int) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    process = spawn.Process(target=prepared, args=(path, tokenizer, processes, found))
    process.start()
    largest = 0
    while process.is_alive():
        largest = max(largest, sum(map(memory, tree(process.pid or 0))))
        time.sleep(LOOK_SECONDS)
    return {"processes": processes, "memory_bytes": largest} | found.get()


def tree(process: int) -> list[int]:
    try:
        below = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(other for child in below for other in tree(int(child)))]


def memory(process: int) -> int:
    """Pss_Anon in bytes: pages that several processes share count once."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


def whole_words() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def generate(path: Path, size: int) -> None:
    """Write `size` bytes: blocks of lines of random words, in .jsonl five of them a document, every block numbered."""
    chance = random.Random(0)
    texts = ["\n".join(" ".join(chance.choices(WORDS, k=12)) for _ in range(5)) + "\n" for _ in range(200)]
    with open(path, "w") as file, tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
        while bar.n < size:
            for text in texts:
                text = f"{bar.n} {text}"
                bar.n += file.write(json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text)
            bar.refresh()


def main(out: Path, rounds: int, sizes: list[int]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"context": CONTEXT, "cores": os.cpu_count(), "speed": [], "memory": []}
    own = load_tokenizer(compose("prepare", ["experiment=demo"]).model.source)
    began, turns = time.monotonic(), 2 * rounds

    def keep(done: int, of: int, part: str, row: dict[str, Any]) -> None:
        left = (time.monotonic() - began) * (of - done) / max(done, 1)
        speeds = f"{row['tokens_per_second']:,.0f} tokens/s, {row['tokens_per_second_per_core']:,.0f} a core"
        what = f"{part}, {row['processes']} processes: {speeds}, {row['memory_bytes'] / 1e6:,.0f} MB"
        print(f"{done}/{of} {what} ({left / 60:.0f} min left)", file=sys.stderr, flush=True)
        (out / "preparation.json").write_text(json.dumps(result, indent=1) + "\n")

    for number in range(turns):
        row = measured("stdlib", own, 1 + (number + number // 2) % 2)  # 1 2 2 1 ...
        result["speed"].append(row)
        keep(number + 1, turns, "stdlib", row)
    if result["speed"]:
        by = {n: median(r["tokens_per_second"] for r in result["speed"] if r["processes"] == n) for n in (1, 2)}
        result["tokens_per_second"] = by
        result["scaling"] = by[2] / by[1]
    began, done, every = time.monotonic(), 0, 2 * sum(sizes)
    for size in sizes:
        for ending in ("jsonl", "txt"):
            path = Path(f"generated.{ending}").absolute()
            generate(path, size * 10**6)
            row = {"text": ending, "megabytes": size} | measured(str(path), whole_words(), 2)
            path.unlink()
            result["memory"].append(row)
            done += size
            keep(done, every, f"{size} MB .{ending}", row)
    print(json.dumps(result))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0]), int(given[1]) if given[1:] else 3, [int(size) for size in given[2:]] or [10, 200, 2000])
