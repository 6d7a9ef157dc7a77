"""How long one rank of 512 takes to know its rows of any window of 500 B tokens: `python benchmarks/row_indices.py`.

In: a recipe of three stages and a mixture of four sources whose rows are their own numbers, so that nothing is read.
Out: median and largest of 2,000 random windows and ranks in microseconds, as JSON: of the row numbers in the mixture
alone, and with the source and the row in it that each stands for.
"""

import json
import random
import time
from itertools import chain
from statistics import median

from prosparse import schedule
from prosparse.config import L1, Activation, Batch, Lr, Recipe, Stage
from prosparse.data import mixture

RANKS, MICRO_BATCH, CONTEXT, SEQUENCES = 512, 2, 4096, 1024
WEIGHTS = {"web": 0.7, "code": 0.2, "books": 0.07, "math": 0.03}


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
    told = {name: {"median": median(s), "largest": max(s)} for name, s in (("numbers", numbers), ("rows", rows))}
    print(json.dumps({"tokens": steps * SEQUENCES * CONTEXT, "rows_a_rank": len(mine), "microseconds": told}))


if __name__ == "__main__":
    main()
