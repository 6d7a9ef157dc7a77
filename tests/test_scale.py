"""What holds for 512 ranks and 500 billion tokens, by index alone: rows, stages, batches, weights, pieces of a save."""

from collections import Counter
from dataclasses import asdict
from itertools import chain

import numpy as np
import pytest
import torch

from prosparse import checkpoint, schedule, shards
from prosparse.config import L1, Activation, Batch, L1Shape, Lr, Recipe, Stage, StageBatch
from prosparse.data import epochs, mixture

RANKS, MICRO_BATCH = 512, 2
WEIGHTS = {"web": 0.7, "code": 0.2, "books": 0.07, "math": 0.03}
LENGTHS = {"web": 90_000_000, "code": 20_000_000, "books": 9_000_000, "math": 2_000_000}
LAST = {"web": 1.0, "math": 1.0}
RECIPE = Recipe(
    activation=Activation(name="relu"),
    stages={
        "substitution": Stage(steps=10_000),
        "rise": Stage(steps=30_000, l1=L1(L1Shape.sine, 0.1), batch=StageBatch(sequences=2048)),
        "own data": Stage(steps=5_000, l1=L1(factor=0.1), data=dict(LAST)),
        "long rows": Stage(steps=2_000, l1=L1(factor=0.1), batch=StageBatch(sequences=1024, context=16384)),
        "settle": Stage(steps=36_200, l1=L1(factor=0.1), batch=StageBatch(sequences=1024)),
    },
    lr=Lr(peak=3e-5, warmup_steps=500),
    batch=Batch(sequences=1024, context=4096),
)


class Virtual:
    """As many rows as a source has, each its own number: nothing is stored."""

    def __init__(self, source: int, length: int):
        self.source, self.length = source, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> np.ndarray:
        return np.array([self.source, row])


ROWS = {name: Virtual(number, length) for number, (name, length) in enumerate(LENGTHS.items())}


def share(step: int, window: int, rank: int, ranks: int = RANKS) -> list[int]:
    first, sequences = schedule.window_rows(RECIPE, step, window)
    return list(chain(*schedule.share(first, sequences, MICRO_BATCH, rank, ranks)))


def test_the_recipe_is_one_of_500_billion_tokens():
    assert schedule.total_tokens(RECIPE) == pytest.approx(5e11, rel=0.001)


@pytest.mark.parametrize("ranks", [512, 256, 64])
def test_the_ranks_of_any_window_read_each_of_its_rows_once(ranks):
    for span in schedule.spans(RECIPE):
        for step in (span.first, (span.first + span.last) // 2, span.last):
            first, sequences = schedule.window_rows(RECIPE, step, step - 1)
            parts = [share(step, step - 1, rank, ranks) for rank in range(ranks)]
            assert sorted(chain(*parts)) == list(range(first, first + sequences))
            accumulated = schedule.accumulation(sequences, MICRO_BATCH, ranks)
            assert {len(part) for part in parts} == {accumulated * MICRO_BATCH}
            assert accumulated * MICRO_BATCH * ranks == sequences == schedule.batch_at(RECIPE, step)[0]


def test_stages_read_on_from_one_another_and_no_row_comes_twice():
    ends: dict[str, int] = {}
    for span in schedule.spans(RECIPE):
        key = str((span.stage.data, schedule.batch_at(RECIPE, span.first)[1]))
        for step in (span.first, span.last):
            first, sequences = schedule.window_rows(RECIPE, step, step - 1)
            if step == span.first:
                assert first == ends.get(key, 0)
            ends[key] = first + sequences
    steps = {span.name: span.stage.steps for span in schedule.spans(RECIPE)}
    assert ends[str(({}, 4096))] == 1024 * (steps["substitution"] + steps["settle"]) + 2048 * steps["rise"]
    assert ends[str((LAST, 4096))] == 1024 * steps["own data"] and ends[str(({}, 16384))] == 1024 * steps["long rows"]


def test_a_run_of_512_ranks_goes_on_with_256_at_the_same_rows():
    for step, skipped in ((10_000, 0), (39_999, 3), (83_000, 7)):
        window = step - 1 + skipped
        many, few = (sorted(chain(*(share(step, window, rank, n) for rank in range(n)))) for n in (512, 256))
        assert many == few


UNEVEN = {"web": 1.004, "code": 1.0, "books": 0.037, "math": 1e-3}


@pytest.mark.parametrize("weights", [WEIGHTS, UNEVEN])
def test_any_stretch_of_the_mixture_has_the_weights_within_1_in_3000(weights):
    rows, whole = mixture(ROWS, weights, seed=0), sum(weights.values())
    total = schedule.window_rows(RECIPE, 83_200, 83_199)[0]
    for first in (0, 41_803_398, total - 30_000):  # anywhere in the run
        found = Counter(int(rows[index][0]) for index in range(first, first + 30_000))
        for number, name in enumerate(WEIGHTS):
            assert abs(found[number] / 30_000 - weights[name] / whole) < 1 / 3000, (name, first)
    passes = epochs(ROWS, weights, total)
    assert passes["web"] == pytest.approx(total * weights["web"] / whole / LENGTHS["web"], rel=1e-9)


def test_the_rows_of_a_window_are_a_function_of_its_number_whoever_asks():
    rows, again = (mixture(ROWS, WEIGHTS, seed=0) for _ in range(2))
    step = 60_000
    backwards = {rank: [again[i].tolist() for i in share(step, step, rank)] for rank in (511, 300, 0)}
    for rank in (0, 300, 511):
        assert [rows[i].tolist() for i in share(step, step, rank)] == backwards[rank]
    assert len({tuple(row) for part in backwards.values() for row in part}) == sum(map(len, backwards.values()))


def test_a_row_costs_the_same_at_the_start_and_at_the_end_of_the_corpus():
    read: list[int] = []

    class Counted(Virtual):
        def __getitem__(self, row: int) -> np.ndarray:
            read.append(row)
            return super().__getitem__(row)

    rows = mixture({name: Counted(v.source, v.length) for name, v in ROWS.items()}, WEIGHTS, seed=0)
    for step in (1, 83_200):
        read.clear()
        mine = [rows[index] for index in share(step, step - 1, 511)]
        assert len(read) == len(mine)  # no other row is touched on the way


def holds(folder, rank: int) -> bool:
    try:
        return bool(checkpoint.verify(folder, rank, 300))
    except ValueError as error:
        assert "engine/rank-00411.safetensors is not the file that was saved" in str(error)
        return False


def test_the_checkpoint_of_512_ranks_is_read_whole_by_any_number(tmp_path):
    """Parameters in a row, cut into 512 equal parts wherever that falls, as ZeRO-1 and 2 cut them."""
    shapes = {"embed": [331, 16], "gate": [48, 16], "norm": [16], "up": [48, 16], "down": [16, 48]}
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    values = {name: torch.rand(size, generator=torch.Generator().manual_seed(1)) for name, size in sizes.items()}
    values = {
        state: {name: value + number for name, value in values.items()} for number, state in enumerate(shards.STATES)
    }

    def pieces(rank: int, ranks: int, fill: bool) -> list[shards.Piece]:
        part, at, found = -(-sum(sizes.values()) // ranks), 0, []
        for name, size in sizes.items():
            begin, end = max(at, rank * part), min(at + size, (rank + 1) * part)
            if begin < end:
                own = slice(begin - at, end - at)
                states = {s: values[s][name][own] if fill else torch.zeros(end - begin) for s in shards.STATES}
                found.append(shards.Piece(name, begin - at, end - begin, states))
            at += size
        return found

    final = tmp_path / "checkpoints" / "step-00000007"
    temporary, entries = final.with_suffix(".tmp"), {}
    (temporary / checkpoint.ENGINE).mkdir(parents=True)
    for rank in range(RANKS):
        path = checkpoint.rank_files(temporary, {"ranks": RANKS})[rank]
        entries[str(path.relative_to(temporary))] = shards.write(
            path, *shards.tensors_of(pieces(rank, RANKS, fill=True))
        )
    state = asdict(checkpoint.TrainState(step=7))
    manifest = {"format": checkpoint.FORMAT, "state": state, "ranks": RANKS, "shapes": shapes, "files": entries}
    checkpoint._commit(temporary, final, manifest)
    assert checkpoint.find(tmp_path) == final
    assert all(checkpoint.verify(final, rank, 300) == manifest for rank in (0, 1, 299))  # each its share of digests
    files = checkpoint.rank_files(final, manifest)
    weights = shards.read_weights(files, shapes)
    assert all(torch.equal(weights[name].flatten(), values["master"][name]) for name in shapes)
    for ranks in (256, 7):
        for rank in (0, ranks // 2, ranks - 1):
            parts = pieces(rank, ranks, fill=False)
            shards.read_into(files, parts)
            for piece in parts:
                for state in shards.STATES:
                    kept = values[state][piece.name][piece.start : piece.start + piece.numel]
                    assert torch.equal(piece.states[state], kept), (ranks, rank, piece.name)
    with pytest.raises(ValueError, match=r"of \d+ elements are in the files"):
        shards.read_weights([*files[:100], *files[101:]], shapes)
    with open(files[411], "r+b") as damaged:
        damaged.seek(-1, 2)
        damaged.write(bytes([files[411].read_bytes()[-1] ^ 1]))
    assert [rank for rank in range(300) if not holds(final, rank)] == [411 % 300]
