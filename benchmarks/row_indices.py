"""What it takes to know and to read the rows of a window: `python benchmarks/row_indices.py`.

In: a recipe of three stages, 500 B tokens for 512 ranks, and a mixture of four sources whose rows are their own
numbers, so that nothing is read; then the standard library in rows of 512 tokens of the demo's tokenizer. Out: as JSON,
median and largest of 2,000 random windows and ranks in microseconds: of the row numbers in the mixture alone, and with
the source and the row in it that each stands for; of reading 8 rows at random places as the tensors of a batch.
"""

import json
import random
import time
from collections.abc import Iterator
from itertools import chain
from statistics import median
from tempfile import TemporaryDirectory

from prosparse import schedule
from prosparse.cli import compose
from prosparse.config import L1, Activation, Batch, Lr, Recipe, Stage
from prosparse.data import batch, mixture
from prosparse.models.load import load_tokenizer
from prosparse.preparation import prepare

RANKS, MICRO_BATCH, CONTEXT, SEQUENCES, READ = 512, 2, 4096, 1024, 512
WEIGHTS = {"web": 0.7, "code": 0.2, "books": 0.07, "math": 0.03}


def reading(rounds: int) -> Iterator[float]:
    """Microseconds of each of so many batches."""
    with TemporaryDirectory() as cache:
        config = compose("prepare", ["experiment=demo", f"data.cache={cache}"])
        prepared = prepare(config.data, load_tokenizer(config.model.source), [READ])[READ]
        of = mixture(prepared.train, {name: 1.0 for name in prepared.train}, seed=0)
        chance = random.Random(0)
        for _ in range(rounds):
            first = chance.randrange(10**6)
            began = time.perf_counter()
            batch(of, range(first, first + 8))
            yield 1e6 * (time.perf_counter() - began)


def main(rounds: int = 2000) -> None:
    steps = round(5e11 / SEQUENCES / CONTEXT)
    lengths = {"substitution": steps // 10, "rise": steps // 2, "settle": steps - steps // 10 - steps // 2}
    stages = {name: Stage(steps=length, l1=L1(factor=0.1)) for name, length in lengths.items()}
    batch, lr = Batch(sequences=SEQUENCES, context=CONTEXT), Lr(peak=3e-5)
    recipe = Recipe(activation=Activation(name="relu"), stages=stages, batch=batch, lr=lr)
    virtual = mixture({name: range(round(1.2e8 * share)) for name, share in WEIGHTS.items()}, WEIGHTS, seed=0)
    chance, numbers, rows = random.Random(0), [], []
    for _ in range(rounds):
        step, rank = chance.randint(1, steps), chance.randrange(RANKS)
        began = time.perf_counter()
        first, sequences = schedule.window_rows(recipe, step, step - 1)
        mine = list(chain(*schedule.share(first, sequences, MICRO_BATCH, rank, RANKS)))
        numbers.append(1e6 * (time.perf_counter() - began))
        for index in mine:
            virtual[index]
        rows.append(1e6 * (time.perf_counter() - began))
    reads = list(reading(rounds))
    every = {"numbers": numbers, "rows": rows, f"reading 8 x {READ} tokens": reads}
    told = {name: {"median": median(s), "largest": max(s)} for name, s in every.items()}
    print(json.dumps({"tokens": steps * SEQUENCES * CONTEXT, "rows_a_rank": len(mine), "microseconds": told}))


if __name__ == "__main__":
    main()
