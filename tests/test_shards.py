"""Tensors as files: any cut of the parameters reads any other, and bytes are what safetensors writes."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from prosparse import shards
from prosparse.shards import STATES, Piece

SHAPES = {"embed": [7, 3], "gate": [5, 4], "norm": [4], "down": [4, 5]}


def whole() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: {state: torch.randn(torch.Size(shape).numel(), generator=generator) for state in STATES}
        for name, shape in SHAPES.items()
    }


def cut(values: dict, ranks: int, how: str) -> list[list[Piece]]:
    """The parameters over ranks: one after the other in equal parts (ZeRO-1, 2), or each by itself (ZeRO-3)."""
    parts: list[list[Piece]] = [[] for _ in range(ranks)]
    total, position = sum(len(v["master"]) for v in values.values()), 0
    for name, states in values.items():
        numel = len(states["master"])
        size = -(-(total if how == "flat" else numel) // ranks)
        origin = position if how == "flat" else 0
        for rank in range(ranks):
            low, high = max(rank * size - origin, 0), min((rank + 1) * size - origin, numel)
            if low < high:
                parts[rank].append(Piece(name, low, high - low, {s: t[low:high].clone() for s, t in states.items()}))
        position += numel
    return parts


def written(tmp_path, parts) -> list:
    files = [tmp_path / f"rank-{rank}.safetensors" for rank in range(len(parts))]
    for file, pieces in zip(files, parts, strict=True):
        entry = shards.write(file, *shards.tensors_of(pieces))
        assert entry == shards.digest(file) and entry["size"] == file.stat().st_size
    return files


@pytest.mark.parametrize("how", ["flat", "each"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [8, 1 << 26])
def test_every_cut_reads_every_other_bit_for_bit(tmp_path, monkeypatch, how, ranks, chunk):
    monkeypatch.setattr(shards, "CHUNK", chunk)
    values = whole()
    files = written(tmp_path, cut(values, ranks, how))
    for other_how in ("flat", "each"):
        for other in (1, 2, 4):
            for pieces in cut(values, other, other_how):
                for piece in pieces:
                    for tensor in piece.states.values():
                        tensor.fill_(torch.nan)
                shards.read_into(files, pieces)
                for piece in pieces:
                    for state, tensor in piece.states.items():
                        assert torch.equal(tensor, values[piece.name][state][piece.start : piece.start + piece.numel])
    weights = shards.read_weights(files, SHAPES)
    assert all(torch.equal(weights[name], values[name]["master"].view(SHAPES[name])) for name in SHAPES)


def test_a_file_is_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([1, 2, 255], dtype=torch.uint8),
        "c": torch.ones(()),
    }
    shards.write(tmp_path / "x.safetensors", tensors, {"starts": "{}"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_part_that_no_file_has_is_named(tmp_path):
    parts = cut(whole(), 2, "flat")
    files = written(tmp_path, parts)
    with pytest.raises(ValueError, match=r"master of \w+: \d+ of \d+ elements are in the files"):
        shards.read_weights(files[:1], SHAPES)
    with pytest.raises(ValueError, match="master of other: 0 of 2"):
        shards.read_weights(files, {"other": [2]})


def test_a_digest_depends_on_every_byte(tmp_path):
    path = tmp_path / "x.safetensors"
    shards.write(path, {"a": torch.zeros(100)}, {"starts": json.dumps({"a": 0})})
    before, content = shards.digest(path), path.read_bytes()
    for place in random.Random(0).sample(range(len(content)), 50):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert shards.digest(path) != before
